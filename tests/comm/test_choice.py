"""Which collectives "auto" takes: by rule on one node, by a trial between nodes, alike on all ranks."""

import time

import numpy as np
import pytest

from hpcmlp.comm import Exchange, choice, open_exchange, rule
from hpcmlp.comm.native import Native
from hpcmlp.comm.ring import Ring
from hpcmlp.comm.shared import SharedUnavailable


class Slow:
    """Collectives for which one rank takes its time, by its own clock."""

    def __init__(self, comm, clock, seconds, late, starts=False):
        self.starts = starts
        self.inner, self.clock, self.seconds = Ring(comm), clock, seconds if comm.rank == late else 1e-5

    def reduce_scatter(self, array, bounds):
        self.clock[0] += self.seconds
        self.inner.reduce_scatter(array, bounds)

    def all_gather(self, array, bounds):
        self.inner.all_gather(array, bounds)

    def free(self):
        self.inner.free()


@pytest.mark.mpi(min_size=2)
def test_the_fastest_is_taken_by_the_slowest_rank(comm, monkeypatch):
    late = {"a": (0.003, 0), "b": (1e-5, 0), "c": (0.006, comm.size - 1)}   # c is slow on another rank than a
    lengths, clock = [], [0.0]
    monkeypatch.setattr(choice, "perf_counter", lambda: clock[0])

    def make(name, elements):
        lengths.append(elements)
        vector = np.zeros(elements, np.float32)
        return Exchange(name, Slow(comm, clock, *late[name]), vector.copy(), vector)

    name, why = choice.fastest(make, ("a", "b", "c"), comm, 1 << 22)
    assert name == "b" and why.endswith(": b 0.01 ms, a 3.00 ms, c 6.00 ms")
    assert len(set(comm.allgather((name, why)))) == 1
    # One that takes 6 ms is not tried with 4 million numbers, and all are tried with as many.
    assert len(set(lengths[-3:])) == 1 and lengths[-1] < 1 << 22 and f"{lengths[-1]:,} of 4,194,304" in why


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("size, hides, taken", [(1 << 17, True, "blocking"), (1 << 18, True, "started"),
                                                (1 << 18, False, "blocking")])
def test_what_can_be_hidden_may_take_longer_where_there_are_buckets(comm, monkeypatch, size, hides, taken):
    clock = [0.0]
    monkeypatch.setattr(choice, "perf_counter", lambda: clock[0])

    def make(name, elements):
        started = name == "started"
        collective = Slow(comm, clock, 2.2e-5 if started else 1e-5, 0, started)
        return Exchange(name, collective, np.zeros(elements, np.float32), np.zeros(elements, np.float32))

    assert choice.fastest(make, ("started", "blocking"), comm, size, hides)[0] == taken


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("first, second, taken", [(1.2e-5, 1e-5, "first"), (1e-5, 1.2e-5, "first"),
                                                  (1.3e-5, 1e-5, "second")])
def test_what_is_too_close_to_call_is_decided_by_the_standing_order(comm, monkeypatch, first, second, taken):
    clock = [0.0]
    monkeypatch.setattr(choice, "perf_counter", lambda: clock[0])

    def make(name, elements):
        collective = Slow(comm, clock, first if name == "first" else second, 0)
        return Exchange(name, collective, np.zeros(elements, np.float32), np.zeros(elements, np.float32))

    name, why = choice.fastest(make, ("first", "second"), comm, 100)
    assert name == taken and why.startswith(f"by trial: {taken} ")
    assert ("too close to call" in why) == (first == 1.2e-5)


@pytest.mark.mpi(min_size=2)
def test_a_candidate_that_is_not_to_be_had_is_left_out_and_said(comm):
    def make(name, elements):
        if name == "shared":
            raise SharedUnavailable("no memory")
        return Exchange(name, Native(comm), np.zeros(elements, np.float32), np.zeros(elements, np.float32))

    name, why = choice.fastest(make, ("shared", "native"), comm, 100)
    assert name == "native" and "no shared: no memory" in why and "numbers" not in why


@pytest.mark.mpi
def test_auto_knows_one_node_and_tries_several(comm, monkeypatch, nodes_of):
    tried = []

    def told(make, names, *rest, **options):
        tried.append(names)
        return names[1], "as told"

    monkeypatch.setattr(choice, "fastest", told)
    for per_node in range(1, comm.size + 1):
        topology = nodes_of(per_node)
        exchange = open_exchange("auto", topology, 100, np.float32)
        if comm.size == 1:
            assert (exchange.name, exchange.why) == ("ring", "one rank")
        elif per_node == comm.size:
            assert (exchange.name, exchange.why) == ("shared", "one node")
        else:
            assert exchange.why == "as told"
            assert tried.pop() == (("ring", "native") if per_node == 1 else ("shared", "ring", "native"))
        assert not tried
        exchange.grads[:] = 1
        exchange.collective.all_reduce(exchange.grads)
        assert (exchange.grads == comm.size).all()
        exchange.params = exchange.grads = None
        exchange.collective.free()


@pytest.mark.mpi(min_size=2)
def test_a_narrow_wire_is_never_given_to_the_library(comm, nodes_of):
    topology = nodes_of(1)
    assert rule(topology, "bf16") == ("ring", "one rank per node")
    exchange = open_exchange("auto", topology, 100, np.float32, wire="bf16")
    assert exchange.name == "ring" and exchange.wire == "bf16"
    exchange.collective.free()


@pytest.mark.mpi(min_size=2)
def test_the_trial_itself_ends_in_one_of_the_candidates(comm, nodes_of):
    topology = nodes_of(1)
    begin = time.perf_counter()
    exchange = open_exchange("auto", topology, 30_000, np.float32)
    assert time.perf_counter() - begin < 20
    assert exchange.name in ("ring", "native") and exchange.why.startswith("by trial")
    assert len(set(comm.allgather((exchange.name, exchange.why)))) == 1
    exchange.collective.free()


@pytest.mark.mpi(min_size=2)
def test_what_is_to_overlap_can_be_started(comm, nodes_of):
    for per_node in (n for n in range(1, comm.size) if comm.size % n == 0):
        topology = nodes_of(per_node)
        exchange = open_exchange("auto", topology, 5000, np.float32, overlap=True)
        assert exchange.collective.starts and "native" not in exchange.why
        assert len(set(comm.allgather((exchange.name, exchange.why)))) == 1
        collective, exchange.params, exchange.grads = exchange.collective, None, None
        collective.free()
