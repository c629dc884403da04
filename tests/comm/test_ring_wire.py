"""One table for algorithm x wire x length, and narrow wires: the bound, exact words, no bias with feedback, bytes."""

import tracemalloc

import numpy as np
import pytest

from hpcmlp.comm import check_wire, make_ring, open_exchange
from hpcmlp.comm.native import Native
from hpcmlp.comm.ring_wire import WireRing
from hpcmlp.comm.shared import Shared
from hpcmlp.comm.wire import FORMATS, WIRES
from hpcmlp.errors import ConfigError

ROUNDING = {"float32": 2.0**-24, "bf16": 2.0**-8, "float16": 2.0**-11}  # largest relative error of one hop
LENGTHS = {"0": 0, "1": 1, "size-1": -1, "size": 0, "size+1": 1, "prime": 1009, "large": 100_003}


def shared_with(wire, topology, **options):
    return Shared(topology, lambda cross: make_ring(cross, wire, **options))


# algorithm -> the collective over the ranks of a topology that sends `wire`; "cut": messages so small that every part
# takes many, as arrays beyond 2**31 bytes do.
MAKERS = {
    "ring": lambda topology, wire: make_ring(topology.comm, wire),
    "ring cut": lambda topology, wire: make_ring(topology.comm, wire, limit_bytes=64),
    "shared": lambda topology, wire: shared_with(wire, topology),
    "nodes": lambda topology, wire: shared_with(wire, topology),
    "nodes cut": lambda topology, wire: shared_with(wire, topology, limit_bytes=64),
    "native": lambda topology, wire: Native(topology.comm),
}
TABLE = [(algorithm, wire, name) for algorithm in MAKERS for wire in WIRES for name in LENGTHS
         if (wire == "float32" or algorithm not in ("shared", "native"))
         and ("cut" not in algorithm or name in ("size+1", "prime"))]


@pytest.fixture
def equal_nodes(comm, nodes_of):
    """The ranks as nodes of two, or, where that does not come out even, as many nodes as ranks."""
    return nodes_of(2 if comm.size % 2 == 0 else 1)


@pytest.fixture
def opened(topology, equal_nodes, given_back):
    """A function that opens the collective of an algorithm for a wire, until the test ends."""
    return lambda algorithm, wire: given_back(
        MAKERS[algorithm](equal_nodes if "nodes" in algorithm else topology, wire))


class Counting:
    """A communicator that counts the bytes of the messages that go through it, by tag."""

    def __init__(self, comm):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.sent = {}

    def Dup(self):
        self.dup = self.comm.Dup()
        return self

    def Send_init(self, piece, rank, tag):
        self.sent.setdefault(1 + tag % 2, []).append(piece.nbytes)  # data have even tags, words odd ones
        return self.dup.Send_init(piece, rank, tag)

    def Recv_init(self, piece, *where):
        return self.dup.Recv_init(piece, *where)

    def Free(self):
        self.dup.Free()


def length(name, size):
    return LENGTHS[name] + (size if name.startswith("size") else 0)


def every_rank(comm, n, seed=0):
    return [np.random.default_rng([seed, n, rank]).standard_normal(n).astype(np.float32) for rank in range(comm.size)]


def bound(wire, every):
    """How far a sum may be from the exact one: a rounding of the partial sum on each hop, float32 additions."""
    size = np.sum([np.abs(a.astype(np.float64)) for a in every], axis=0)
    hops = len(every) - 1
    additions = hops * 2.0**-23 * size
    if wire == "int8":
        return 1.02 * hops * size.max(initial=0.0) / 254 + additions
    return 1.02 * hops * (ROUNDING[wire] * size + (2.0**-25 if wire == "float16" else 0)) + additions


def assert_same_bits_everywhere(comm, array):
    said = comm.allgather(array.tobytes())
    assert all(one == said[0] for one in said)


@pytest.mark.mpi
@pytest.mark.parametrize("algorithm, wire, name", TABLE)
def test_sums_are_within_the_bound_and_have_the_same_bits_on_every_rank(comm, algorithm, wire, name, opened):
    n = length(name, comm.size)
    if "cut" in algorithm:
        n = min(n, 203)
    every = every_rank(comm, n)
    collective = opened(algorithm, wire)
    alone = 2 if "nodes" in algorithm and comm.size == 2 else 1     # two ranks are one node
    assert collective.narrow == (wire != "float32" and comm.size > alone)
    array = collective.empty(n, np.float32)
    array[:] = every[comm.rank]
    words = np.random.default_rng(comm.rank).standard_normal(7)
    expected_words = np.sum(comm.allgather(words.copy()), axis=0)
    collective.all_reduce(array, words)
    exact = np.sum([a.astype(np.float64) for a in every], axis=0)
    assert array.dtype == np.float32
    assert (np.abs(array - exact) <= bound(wire, every)).all()
    np.testing.assert_allclose(words, expected_words, rtol=1e-15, atol=1e-15)
    assert_same_bits_everywhere(comm, array)
    assert_same_bits_everywhere(comm, words)
    del array


@pytest.mark.mpi
@pytest.mark.parametrize("algorithm, wire, name", [row for row in TABLE if row[1] != "float32"])
def test_all_ranks_follow_the_masters_with_the_same_bits(comm, algorithm, wire, name, opened):
    """Masters that move at random: nobody is ever further away than one rounding of the last way."""
    n = length(name, comm.size)
    if "cut" in algorithm:
        n = min(n, 203)
    collective = opened(algorithm, wire)
    bounds = np.arange(comm.size + 1, dtype=np.int64) * n // comm.size
    own = slice(bounds[collective.part], bounds[collective.part + 1])
    array = collective.common(n, np.float32)
    goal = np.zeros(n, np.float32)
    for step in range(6):
        goal += np.random.default_rng([n, step]).standard_normal(n).astype(np.float32)
        kept = array[own].copy()
        way = np.abs(goal[own] - kept).astype(np.float64)
        array[own] = goal[own]
        collective.gather_towards(array, bounds, kept)
        np.testing.assert_array_equal(kept, goal[own])
        assert_same_bits_everywhere(comm, array)
        error = np.abs(array[own].astype(np.float64) - goal[own])
        rounding = way.max(initial=0.0) / 250 if wire == "int8" else 1.01 * ROUNDING[wire] * way + 2.0**-25
        assert (error <= rounding + 2.0**-22 * np.abs(goal[own]) + 1e-7).all()
        comm.Barrier()      # a common array is read before anybody moves on
    before = array.copy()
    comm.Barrier()
    collective.gather_towards(array, bounds, before[own].copy())
    np.testing.assert_array_equal(array, before)    # who has arrived stays
    del array


@pytest.mark.mpi
@pytest.mark.parametrize("wire", FORMATS)
def test_any_bounds_are_kept_to(comm, wire):
    n = 5003
    bounds = np.sort(np.random.default_rng([n, comm.size]).integers(n // 7, n + 1, comm.size + 1))
    every = every_rank(comm, n)
    array = every[comm.rank].copy()
    exact = np.sum([a.astype(np.float64) for a in every], axis=0)
    ring = make_ring(comm, wire)
    ring.reduce_scatter(array, bounds)
    own = slice(bounds[comm.rank], bounds[comm.rank + 1])
    limit = np.broadcast_to(bound(wire, every), n)
    assert (np.abs(array - exact)[own] <= limit[own]).all()
    ring.all_gather(array, [int(b) for b in bounds])
    inside = slice(bounds[0], bounds[-1])
    assert (np.abs(array - exact)[inside] <= limit[inside]).all()
    assert_same_bits_everywhere(comm, array[inside])
    outside = np.r_[0:bounds[0], bounds[-1]:n]
    np.testing.assert_array_equal(array[outside], every[comm.rank][outside])
    ring.free()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("wire", FORMATS)
@pytest.mark.parametrize("settle", [False, True])
def test_feedback_takes_the_bias_away(comm, wire, settle):
    """Of a constant gradient the results add up to the exact sum less the residuals, which do not grow.

    Nor does anything get lost when the residuals are now and then added up and given to one rank each.
    """
    n, steps = 1009, 100
    every = every_rank(comm, n, seed=3)
    exact = np.sum([a.astype(np.float64) for a in every], axis=0)
    bounds = [n * rank // comm.size for rank in range(comm.size + 1)]
    own = slice(bounds[comm.rank], bounds[comm.rank + 1])
    error = {}
    for feedback in (True, False):
        ring = WireRing(comm, wire, feedback=feedback)
        array, total, owed = np.empty(n, np.float32), np.zeros(n), np.empty(n, np.float32)
        for step in range(steps):
            array[:] = every[comm.rank]
            ring.reduce_scatter(array, bounds)
            total += array
            if settle and step % 7 == 0:
                ring.settle(array, bounds, owed)
                assert_same_bits_everywhere(comm, owed)
                assert owed.any() == feedback
        mean_error = np.abs(total / steps - exact)[own]
        error[feedback] = comm.allreduce(mean_error.sum()) / n
        if feedback:
            # 2: residuals are roundings of sums that hold residuals themselves.
            limit = np.broadcast_to(2 * bound(wire, every), n)[own] / steps + 1e-6
            assert (mean_error <= limit).all()
            residual = next(iter(ring._residuals.values()))[1].astype(np.float64)
            left = np.sum(comm.allgather(residual), axis=0)
            np.testing.assert_allclose((total + left)[own], (steps * exact)[own], atol=steps * 2e-6)
        ring.free()
    assert error[True] < error[False] / 20


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("wire", FORMATS)
def test_a_gradient_below_the_smallest_step_arrives_with_feedback(comm, wire):
    """One large element hides the others' small ones from int8's scale; float16 has no number below 2**-24."""
    tiny = np.float32({"bf16": 1e-20, "float16": 2e-9, "int8": 1e-3}[wire])
    ring, total, steps = WireRing(comm, wire), 0.0, 400
    array = np.empty(64, np.float32)
    bounds = [0] * comm.size + [64]     # the last rank owns all
    for _ in range(steps):
        array[:] = tiny
        array[0] = 1.0
        ring.reduce_scatter(array, bounds)
        total += float(array[9])
    if comm.rank == comm.size - 1:
        assert total == pytest.approx(steps * comm.size * float(tiny), rel=0.1)
    ring.free()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("wire", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_arrive_and_leave_no_trace(comm, wire, bad):
    ring = WireRing(comm, wire)
    array = np.ones(600, np.float32)
    if comm.rank == 0:
        array[5] = bad
    ring.all_reduce(array)
    assert not np.isfinite(array[5]) and (array[-1] == comm.size)
    for _ in range(2):
        array[:] = 1
        ring.all_reduce(array)
        np.testing.assert_allclose(array, comm.size, rtol=1e-2)
    ring.free()


@pytest.mark.mpi
@pytest.mark.parametrize("wire", WIRES)
def test_exactly_the_promised_bytes_are_sent(comm, wire):
    part, hops = 12_000, comm.size - 1
    counting = Counting(comm)
    ring = make_ring(counting, wire)
    array, bounds = np.ones(part * comm.size, np.float32), [part * rank for rank in range(comm.size + 1)]
    ring.reduce_scatter(array, bounds, np.zeros(16))
    data, words = (sum(counting.sent.get(tag, [])) for tag in (1, 2))
    assert data == hops * {"float32": 48_000, "bf16": 24_000, "float16": 24_000, "int8": 12_000 + 4 * 47}[wire]
    assert words == hops * 16 * (8 if comm.size == 2 else 32)
    if wire != "float32":
        counting.sent.clear()
        ring.gather_towards(array, bounds, np.zeros(part, np.float32))
        assert sum(counting.sent.get(1, [])) == data
    counting.sent.clear()
    ring.all_gather(array, bounds)      # what is not narrowed: float32
    assert sum(counting.sent.get(1, [])) == hops * 48_000
    counting.sent.clear()
    ring.reduce_scatter(array, bounds, np.zeros(16))
    assert not counting.sent    # the same messages again
    ring.free()


@pytest.mark.mpi
@pytest.mark.parametrize("wire", FORMATS)
def test_float64_arrays_are_not_narrowed(comm, wire):
    ring = make_ring(comm, wire)
    array = np.random.default_rng(comm.rank).standard_normal(1009)
    exact = np.sum(comm.allgather(array.copy()), axis=0)
    ring.all_reduce(array)
    np.testing.assert_allclose(array, exact, rtol=1e-13, atol=1e-13)
    ring.free()


@pytest.mark.mpi
@pytest.mark.parametrize("wire", FORMATS)
def test_more_arrays_than_plans_keep_their_residuals(comm, wire):
    from hpcmlp.comm import ring as module
    ring = make_ring(comm, wire)
    arrays = [np.ones(33, np.float32) for _ in range(module.MAX_PLANS + 10)]
    for array in arrays:
        ring.all_reduce(array)
    assert len(ring._plans) <= module.MAX_PLANS
    assert len(ring._residuals) == (len(arrays) if comm.size > 1 else 0)
    ring.forget()
    assert not ring._residuals
    ring.free()


@pytest.mark.mpi
@pytest.mark.parametrize("wire", FORMATS)
def test_a_steady_call_allocates_nothing_that_grows_with_the_array(comm, wire):
    ring = make_ring(comm, wire, segment_bytes=2**16)
    array, words = np.zeros(500_000, np.float32), np.zeros(16)
    bounds = np.arange(comm.size + 1) * array.size // comm.size
    master = np.ones(bounds[comm.rank + 1] - bounds[comm.rank], np.float32)
    for _ in range(3):
        ring.all_reduce(array, words)
        ring.gather_towards(array, bounds, master)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    ring.all_reduce(array, words)
    ring.gather_towards(array, bounds, master)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - before < 150_000
    ring.free()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("wire", FORMATS)
def test_a_run_that_goes_on_after_settling_and_one_that_resumes_have_the_same_bits(comm, wire, given_back):
    n = 3001
    bounds = [n * rank // comm.size for rank in range(comm.size + 1)]
    owed = np.empty(n, np.float32)

    def sums(ring, array, seeds):
        found = []
        for seed in seeds:
            array[:] = every_rank(comm, n, seed)[comm.rank]
            ring.reduce_scatter(array, bounds)
            found.append(array[bounds[comm.rank]:bounds[comm.rank + 1]].copy())
        return found

    first, array = WireRing(comm, wire), np.empty(n, np.float32)
    sums(first, array, range(5))
    first.settle(array, bounds, owed)
    resumed, other = WireRing(comm, wire), np.empty(n, np.float32)
    resumed.put_residual(other, bounds, owed)
    for a, b in zip(sums(first, array, range(5, 9)), sums(resumed, other, range(5, 9)), strict=True):
        np.testing.assert_array_equal(a, b)
    afresh = sums(given_back(WireRing(comm, wire)), np.empty(n, np.float32), range(5, 9))
    assert any((a != b).any() for a, b in zip(afresh, sums(first, array, range(5, 9)), strict=True))
    first.free()
    resumed.free()


@pytest.mark.mpi
def test_a_wire_acts_where_messages_cross_a_network(comm, topology):
    with pytest.raises(ConfigError, match="--wire bf16 has no effect with --sync native"):
        open_exchange("native", topology, 100, np.float32, wire="bf16")
    check_wire("native", "float32")
    for sync in ("auto", "shared", "ring"):
        exchange = open_exchange(sync, topology, 100, np.float32, wire="bf16")
        acts = sync == "ring" and comm.size > 1
        assert exchange.wire == ("bf16" if acts else "float32") and exchange.collective.narrow == acts
        assert ("wire bf16 has nothing to act on" in exchange.note) != acts
        exchange.params = exchange.grads = None
        exchange.collective.free()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("sync", ["auto", "shared"])
def test_between_nodes_only_the_network_is_narrow(comm, sync, equal_nodes, nodes_of):
    exchange = open_exchange(sync, equal_nodes, 100, np.float32, wire="int8")
    if comm.size == 2 and sync == "auto":
        assert exchange.name == "shared" and exchange.wire == "float32"     # they are one node
    exchange.params = exchange.grads = None
    exchange.collective.free()
    nodes = nodes_of(1)     # one rank per node: auto is the ring
    exchange = open_exchange(sync, nodes, 100, np.float32, wire="int8")
    assert exchange.name == ("ring" if sync == "auto" else "shared")
    assert exchange.wire == "int8" and exchange.collective.narrow and not exchange.note
    exchange.params = exchange.grads = None
    exchange.collective.free()
