"""The event model on a machine of round numbers, where every time can be added up by hand."""

from dataclasses import replace

import numpy as np
import pytest

from hpcmlp.errors import ConfigError
from hpcmlp.plan.demand import sent_bytes
from hpcmlp.plan.events import step_time, transfer_s
from hpcmlp.plan.record import Op, Transfer, record
from hpcmlp.sync.overlap import INTERVAL_S

RATE, PASS_S, HOP_S = 1e9, 1e-9, 1e-3       # of conftest's machine
LATENCY_S, S_PER_BYTE = 1e-4, 1e-8


def test_a_rank_alone_takes_the_sum_of_its_operations(workload, machine):
    w = workload((20, 12, 3), batch=64)
    events = [e for e in record(w).events if isinstance(e, Op)]
    found = step_time(w, machine)
    assert found.parts["products"] == pytest.approx(sum(e.flops for e in events) / RATE)
    assert found.parts["passes"] + found.parts["update"] == pytest.approx(
        sum(e.elements * PASS_S for e in events if not e.product))
    assert found.parts["comm"] == 0 and found.step_s == pytest.approx(sum(found.parts.values()))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_ring_on_a_node_takes_p_minus_1_hops_in_each_half(workload, machine, ranks):
    w = workload((300, 300, 10), ranks=ranks, batch=60)
    assert step_time(w, machine).parts["comm"] == pytest.approx(2 * (ranks - 1) * HOP_S)


def test_a_small_array_takes_one_call_for_its_reduction(workload, machine):
    w = workload((20, 12, 3), ranks=2)
    assert step_time(w, machine).parts["comm"] == pytest.approx(2 * HOP_S)      # "together", and a hop to gather


def test_between_nodes_every_byte_takes_the_links_time(workload, machine):
    w = workload((300, 300, 10), ranks=4, per_node=1, batch=60, overlap=False)
    part = 4 * max(record(w).planned.buckets[0].bounds[1:] - record(w).planned.buckets[0].bounds[:-1])
    assert step_time(w, machine).parts["comm"] == pytest.approx(6 * (LATENCY_S + part * S_PER_BYTE), rel=0.2)


def test_ranks_of_a_node_share_its_link(workload, machine):
    spread = workload((1000, 1000, 10), ranks=8, per_node=1, batch=64, overlap=False)
    packed = workload((1000, 1000, 10), ranks=8, per_node=4, batch=64, overlap=False, sync="shared")
    # 8 parts around 8 links against half of everything over 2 links, by 4 ranks each: 7/8 and 4/8 of the bytes.
    n = 4 * packed.spec.layout().size * S_PER_BYTE
    assert step_time(spread, machine).parts["comm"] == pytest.approx(2 * 7 / 8 * n, rel=0.1)
    assert step_time(packed, machine).parts["comm"] == pytest.approx(2 * 4 / 8 * n, rel=0.1)


def test_a_ring_between_nodes_that_passes_inside_them_is_as_slow_as_its_slowest_hop(workload, machine):
    w = workload((300, 300, 10), ranks=8, per_node=4, batch=64, overlap=False)
    quick = replace(machine, net={**machine.net, **dict.fromkeys(("reduce", "gather"), [[4, 1e-6], [2**30, 1e-6]])})
    assert step_time(w, quick).parts["comm"] == pytest.approx(2 * 7 * HOP_S)
    alone = replace(w, ranks_per_node=1)
    assert step_time(alone, quick).parts["comm"] == pytest.approx(2 * 7 * 1e-6)


def test_messages_behind_computing_cost_only_what_is_left(workload, machine):
    """With much to compute everything but the last bucket's way and the first one's way back is hidden."""
    def comm(**options):
        w = workload((1000, 1000, 1000, 10), ranks=2, per_node=1, batch=4096, **options)
        return step_time(w, machine)

    blocking, overlapped = comm(overlap=False), comm(overlap=True, bucket_mb=1.0)
    assert overlapped.parts["comm"] < 0.5 * blocking.parts["comm"]
    assert overlapped.hidden_s >= blocking.parts["comm"] * 0.8
    last = LATENCY_S + 2**19 * S_PER_BYTE + INTERVAL_S / 2
    assert overlapped.parts["comm"] > last


def test_overlap_never_beats_both_bounds(workload, machine):
    for batch in (16, 256, 4096):
        w = workload((1000, 1000, 10), ranks=4, per_node=1, batch=batch, overlap=True, bucket_mb=0.5)
        found = step_time(w, machine)
        wire = 2 * 3 / 4 * 4 * w.spec.layout().size * S_PER_BYTE
        compute = sum(machine.op_s(e, 1) for e in record(w, links=machine.links).events if isinstance(e, Op))
        assert found.step_s >= 0.999 * max(wire, compute)


def test_half_the_bytes_on_the_wire_take_half_the_time(workload, machine):
    wide, narrow = (step_time(workload((1000, 1000, 10), ranks=4, per_node=1, batch=64, overlap=False, wire=wire),
                              machine).parts["comm"] for wire in ("float32", "bf16"))
    assert narrow == pytest.approx(wide / 2, rel=0.1)


def test_ranks_without_a_core_each_take_turns(workload, machine):
    four = step_time(workload((300, 300, 10), ranks=4, batch=64), machine)
    eight = step_time(workload((300, 300, 10), ranks=8, per_node=8, batch=128), machine)
    assert eight.parts["products"] == pytest.approx(2 * four.parts["products"])
    one_core = replace(machine, cores=1, busy=1, step_s={"1": 1e-5})    # measured by one of two ranks that share it
    two = step_time(workload((300, 300, 10), ranks=2, batch=32), one_core)
    assert two.parts["products"] == pytest.approx(2 * four.parts["products"])
    assert two.parts["fixed"] == pytest.approx(2e-5)


def test_what_the_machine_file_does_not_know_is_an_error(workload, machine):
    with pytest.raises(ConfigError, match="links between nodes"):
        step_time(workload(ranks=8, per_node=4), replace(machine, net={}))
    ring_alone = {name: table for name, table in machine.node.items() if not name.startswith("shared")}
    with pytest.raises(ConfigError, match="/dev/shm"):
        step_time(workload(ranks=2, sync="shared"), replace(machine, node=ring_alone))
    with pytest.raises(ConfigError, match="one rank on a node"):
        step_time(workload(ranks=2), replace(machine, node={}))


def test_all_wait_for_the_last_of_the_ranks(workload, machine):
    uneven = replace(machine, late_s=[[1e-6, 1e-7], [1.0, 0.1]])    # two ranks differ by a tenth of what they compute
    alone, two, four = (step_time(workload((300, 300, 10), ranks=ranks, batch=60 * ranks), uneven)
                        for ranks in (1, 2, 4))
    assert alone.parts["wait"] == 0.0
    assert two.parts["wait"] == pytest.approx(0.1 * two.computing_s / 2)
    assert four.parts["wait"] == pytest.approx(0.1 * four.computing_s * (1 / 2 + 1 / 3 + 1 / 4))
    assert four.step_s == pytest.approx(sum(four.parts.values()))
    even = step_time(workload((300, 300, 10), ranks=4, batch=240), machine)
    assert even.parts["wait"] == 0.0 and four.step_s - even.step_s == pytest.approx(four.parts["wait"])


def test_chance_evens_out_over_local_steps_and_nobody_waits_out_of_step(workload, machine):
    chance = replace(machine, late_s=[[1e-6, 1e-6], [1.0, 1e-3]])   # grows with the root of the time
    every, eighth = (step_time(workload((300, 300, 10), ranks=4, batch=240, local_steps=n), chance) for n in (1, 4))
    assert eighth.parts["wait"] == pytest.approx(every.parts["wait"] / 2, rel=0.1)
    w = workload((300, 300, 10), ranks=4, batch=240, sync="server", staleness=True)
    assert step_time(w, chance).parts["wait"] == 0.0


def test_on_one_node_a_server_reads_its_slice_of_all_workers_and_sends_nothing(workload, machine):
    push, read_s = Transfer("run", "reduce", 0, 30_000), 1e-9
    reads = {"shared_reduce": [[4, 4 * read_s], [2**30, 2**30 * read_s]]}
    machine = replace(machine, node={**machine.node, **reads})
    for servers, factor in ((1, 3), (2, 1), (4, 1)):     # workers / servers; four of four ranks are both
        w = workload((300, 300, 10), ranks=4, sync="server", servers=servers)
        assert transfer_s(w, machine, push) == pytest.approx(4 * 30_000 * factor * read_s)
        assert sent_bytes(w, record(w)) == 0
    apart = workload((300, 300, 10), ranks=4, sync="server", staleness=True)
    assert transfer_s(apart, machine, push) == pytest.approx(3 * HOP_S)     # worker by worker


@pytest.mark.parametrize("ranks", [2, 7, 64])
def test_the_last_of_many_draws_is_as_late_as_foretold(machine, ranks):
    """Against draws with an exponential tail: what two of them show foretells the greatest of many."""
    random = np.random.default_rng(ranks)
    pair = 1.0 + random.exponential(0.2, (2, 20_000))
    late = replace(machine, late_s=[[0.1, 1e-9], [1.2, float(np.abs(pair[0] - pair[1]).mean())]])
    many = 1.0 + random.exponential(0.2, (20_000, ranks))
    assert late.wait_s(1.2, ranks) == pytest.approx((many.max(axis=1) - many.mean(axis=1)).mean(), rel=0.05)
