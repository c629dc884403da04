"""The timeline: clocks of ranks made one, events packed and written, shadows taken away again."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.ops import open_ops
from hpcmlp.run import trace


class World:
    """True time, and clocks that start elsewhere and run at their own rates."""

    def __init__(self, seed):
        self.now, self.random = 5_000_000_000, random.Random(seed)

    def clock(self, offset, rate):
        return lambda: offset + round(self.now * rate)

    def asking(self, clock):
        """Ask over a link whose two ways take unequal, changing times."""
        def ask():
            self.now += self.random.randrange(2_000, 90_000)
            there = clock()
            self.now += self.random.randrange(2_000, 90_000)
            return there
        return ask


@pytest.mark.parametrize("seed", range(20))
def test_another_clock_is_found_within_the_stated_error(seed):
    world = World(seed)
    own, other = world.clock(0, 1.0), world.clock(-7_000_000_000_123, 1.0)
    _, offset, error = trace.compare_clocks(world.asking(other), own)
    assert abs(offset + 7_000_000_000_123) <= error < 90_000


@pytest.mark.parametrize("rate", [1.0, 1 + 4e-5, 1 - 4e-5])
@pytest.mark.parametrize("seed", range(5))
def test_times_of_a_clock_that_drifts_become_those_of_rank_0(seed, rate):
    world = World(seed)
    own, other = world.clock(0, 1.0), world.clock(123_456_789, rate)
    before = np.array(trace.compare_clocks(world.asking(other), own))
    true, shown = [], []
    for _ in range(500):
        world.now += world.random.randrange(1_000, 20_000_000)
        true.append(own())
        shown.append(other())
    after = np.array(trace.compare_clocks(world.asking(other), own))
    found = trace.on_first_clock(np.array(shown), before, after)
    assert np.abs(found - np.array(true)).max() <= max(before[2], after[2]) + 2
    assert (np.diff(found) >= 0).all()


def check_nesting(events):
    """Events of one thread lie apart or one within the other."""
    open_ends = []
    for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        begin, end = round(1e3 * e["ts"]), round(1e3 * (e["ts"] + e["dur"]))
        assert begin >= 0 and e["dur"] >= 0
        while open_ends and open_ends[-1] <= begin:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1], e
        open_ends.append(end)


def some_events(clock):
    events = trace.Events(clock)
    inner = events.timed("inner", lambda: None)
    outer = events.timed("an \"outer\" name", lambda: (inner(), inner()))
    for number in (4, 5):
        begin = clock()
        outer()
        inner()
        events.put((-1 - number, begin, clock()))
    return events


def test_the_file_is_a_chrome_trace_with_every_rank():
    ticks = iter(range(1_000, 10**6, 7))
    clocks = [lambda: next(ticks), lambda: next(ticks) + 10**12]
    ranks = [trace.from_bytes(some_events(clock).to_bytes()) for clock in clocks]
    rows = np.array([[900, 0, 0], [900, 10**12, 1500]])
    later = np.array([[10**6, 0, 0], [10**6, 10**12 + 3, 2500]])
    content = json.loads("\n".join(trace.timeline(ranks, rows, later)))
    assert content["otherData"]["clock_uncertainty_us"] == [0.0, 2.5]
    spans = [e for e in content["traceEvents"] if e["ph"] == "X"]
    for pid in (0, 1):
        own = [e for e in spans if e["pid"] == pid]
        assert [e["name"] for e in own] == ["inner", "inner", "an \"outer\" name", "inner", "step"] * 2
        assert [e["args"]["step"] for e in own] == [5] * 5 + [6] * 5
        check_nesting(own)
    assert min(e["ts"] for e in spans) == 0 and max(e["ts"] for e in spans) < 1000
    names = {e["pid"]: e["args"]["name"] for e in content["traceEvents"] if e["name"] == "process_name"}
    assert names[0].startswith("rank 0 ") and names[1].startswith("rank 1 ")


def test_layers_are_told_with_an_overlapping_exchange_and_nothing_stays_behind():
    network = Network(NetworkSpec((5, 4, 3)), open_ops("cpu"), 6)
    x, closed = np.ones((6, 5), np.float32), []
    collective = SimpleNamespace(reduce_scatter=print, all_gather=print, narrow=False)
    strategy = SimpleNamespace(buckets=[], reduce=print, update=print, share=print, grad_norm=print,
                               collective=collective, overlaps=False, finish=lambda: None)
    step = SimpleNamespace(network=network, ops=network.ops, loss=lambda: None, strategy=strategy)
    before = dict(vars(step)), dict(vars(network))
    recorder = trace.Recorder(SimpleNamespace(size=1, rank=0), step, SimpleNamespace(batch=print), 0, 1)
    recorder.begin_step(0)
    logits = network.forward(x, training=True)
    network.backward(logits, on_closed=lambda start, stop: closed.append((start, stop)))
    network.forward(x)
    events = recorder.events
    told = [events.names[code] for code in trace.from_bytes(events.to_bytes()).codes]
    assert told == ["forward layer 0", "forward layer 1", "backward layer 1", "backward layer 0"]
    assert closed[0][1] == network.layout.size and closed[-1][0] == 0 and len(closed) == 2
    recorder._unwatch()
    assert vars(step) == before[0] and vars(network).keys() == before[1].keys()


@pytest.mark.mpi
def test_clocks_of_the_ranks_are_compared(comm):
    def skewed():
        return trace.time.perf_counter_ns() + 10**9 * comm.rank

    found = trace.compare_all_clocks(comm, skewed)
    if comm.rank == 0:
        # Ranks of one node share a clock; what differs is what this test adds.
        assert (np.abs(found[:, 1] - 10**9 * np.arange(comm.size)) <= found[:, 2]).all()
    else:
        assert not found.any()
