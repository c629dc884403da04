"""What the ring sends, what it allocates, and several collectives under way."""

import time
import tracemalloc

import numpy as np
import pytest

from hpcmlp.comm import make_ring
from hpcmlp.comm import ring as module
from hpcmlp.comm.ring import Ring


class Counting:
    """A communicator that counts the bytes of the messages that go through it."""

    def __init__(self, comm):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.sent = self.largest = 0

    def Dup(self):
        self.dup = self.comm.Dup()
        return self

    def Send_init(self, piece, *where):
        self.sent += piece.nbytes
        self.largest = max(self.largest, piece.nbytes)
        return self.dup.Send_init(piece, *where)

    def Recv_init(self, piece, *where):
        return self.dup.Recv_init(piece, *where)

    def Free(self):
        self.dup.Free()


@pytest.mark.mpi
@pytest.mark.parametrize("limit_bytes", [2**30, 4096])
@pytest.mark.parametrize("words", [0, 16])
def test_exactly_the_promised_bytes_are_sent_in_messages_below_the_limit(comm, limit_bytes, words):
    n = 12_000 * comm.size      # parts alike, so that every rank sends (P-1)/P of the array in each half
    counting = Counting(comm)
    ring = Ring(counting, limit_bytes=limit_bytes)
    array = np.ones(n, np.float32)
    bounds = [12_000 * rank for rank in range(comm.size + 1)]
    half = (comm.size - 1) * 12_000 * 4
    ring.reduce_scatter(array, bounds, np.zeros(words) if words else None)
    per_word = 8 if comm.size == 2 else 32
    assert counting.sent == half + (comm.size - 1) * words * per_word
    counting.sent = 0
    ring.all_gather(array, bounds)
    assert counting.sent == half
    assert counting.largest <= limit_bytes
    assert (array == comm.size).all()
    # The second time the same messages are used again: none is prepared anew.
    counting.sent = 0
    ring.reduce_scatter(array, np.array(bounds))
    ring.reduce_scatter(array, np.array(bounds))
    assert counting.sent == (half if comm.size > 1 else 0)
    ring.free()


@pytest.mark.mpi
def test_a_steady_call_allocates_nothing_that_grows_with_the_array(comm):
    ring = Ring(comm, segment_bytes=2**16)
    array = np.zeros(500_000, np.float32)
    words = np.zeros(16)
    for _ in range(3):
        ring.all_reduce(array, words)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for _ in range(5):
        ring.all_reduce(array, words)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < 32_000 and now - before < 8_000
    ring.free()


@pytest.mark.mpi
def test_every_part_is_summed_in_the_order_of_the_ring(comm):
    # Part c starts at rank c + 1 and ends at its owner: float32 sums of mixed magnitudes show the order.
    every = [np.random.default_rng(rank).standard_normal(4 * comm.size).astype(np.float32) * np.float32(10.0**rank)
             for rank in range(comm.size)]
    array = every[comm.rank].copy()
    ring = Ring(comm, small_bytes=0)
    ring.all_reduce(array)
    for part in range(comm.size):
        where = slice(4 * part, 4 * part + 4)
        expected = np.zeros(4, np.float32)
        for step in range(1, comm.size + 1):
            expected = expected + every[(part + step) % comm.size][where]
        np.testing.assert_array_equal(array[where], expected)
    ring.free()


def started(collective, comm, sizes, seed=0):
    """Arrays of these sizes with the reductions started on them, and what the blocking call makes of the same."""
    rng = np.random.default_rng([seed, comm.rank])
    arrays = [rng.standard_normal(n).astype(np.float32) for n in sizes]
    wanted, words, wanted_words = [], [], []
    for k, array in enumerate(arrays):
        copy, word = array.copy(), np.array([comm.rank + 0.1 * k, 1.0])
        own = word.copy()
        collective.reduce_scatter(copy, bounds(array.size, comm.size), own)
        wanted.append(copy)
        wanted_words.append(own)
        words.append(word)
    operations = [collective.start_reduce_scatter(array, bounds(array.size, comm.size), word)
                  for array, word in zip(arrays, words, strict=True)]
    return arrays, words, operations, wanted, wanted_words


def bounds(n, size):
    return [n * rank // size for rank in range(size + 1)]


@pytest.mark.mpi
@pytest.mark.parametrize("drive", ["wait", "advance", "last first"])
def test_reductions_under_way_give_the_bits_of_the_blocking_ones(comm, drive):
    ring = Ring(comm, segment_bytes=256)
    arrays, words, operations, wanted, wanted_words = started(ring, comm, [1009, 0, 5, 100, 3000])
    if drive == "advance":
        while not ring.advance():
            time.sleep(1e-4)
        assert all(operation.ended for operation in operations)
    if drive == "last first":   # waiting for the last finishes those before it
        operations[-1].wait()
    for operation in operations:
        operation.wait()
    own = [slice(*bounds(a.size, comm.size)[comm.rank:comm.rank + 2]) for a in arrays]
    for array, place, want, word, want_word in zip(arrays, own, wanted, words, wanted_words, strict=True):
        assert array[place].tobytes() == want[place].tobytes()
        assert word.tobytes() == want_word.tobytes()
    gathers = [ring.start_all_gather(array, bounds(array.size, comm.size)) for array in arrays]
    other = np.ones(7, np.float32)
    ring.all_reduce(other)      # a blocking call takes its turn behind what is under way
    assert (other == comm.size).all()
    for array, want, gather in zip(arrays, wanted, gathers, strict=True):
        gather.wait()
        ring.all_gather(want, bounds(want.size, comm.size))
        assert array.tobytes() == want.tobytes()
    assert ring.advance()
    ring.free()


@pytest.mark.mpi(min_size=2)
def test_nothing_but_wait_waits_for_other_ranks(comm):
    ring = Ring(comm)
    array, tail = np.ones(300_000, np.float32), np.ones(10, np.float32)
    late = comm.size - 1
    if comm.rank != late:
        operations = [ring.start_reduce_scatter(a, bounds(a.size, comm.size)) for a in (array, tail)]
        for _ in range(100):
            assert not ring.advance()
        assert operations[0].ended == 0
    comm.Barrier()      # the last rank starts only now
    if comm.rank == late:
        operations = [ring.start_reduce_scatter(a, bounds(a.size, comm.size)) for a in (array, tail)]
    for operation in operations:
        operation.wait()
        assert operation.ended >= operation.began
    for a in (array, tail):
        cut = bounds(a.size, comm.size)
        assert (a[cut[comm.rank]:cut[comm.rank + 1]] == comm.size).all()
    ring.free()


@pytest.mark.mpi
def test_more_are_under_way_than_plans_are_kept(comm, monkeypatch):
    monkeypatch.setattr(module, "MAX_PLANS", 4)
    ring = Ring(comm)
    for turn in range(3):   # what is dropped and made anew must have the same tags on all ranks
        arrays = [np.full(50, k + turn, np.float32) for k in range(9)]
        operations = [ring.start_reduce_scatter(a, bounds(50, comm.size)) for a in arrays]
        if comm.rank == 0:
            while not ring.advance():
                time.sleep(1e-4)
        for k, operation in enumerate(operations):
            operation.wait()
            own = arrays[k][slice(*bounds(50, comm.size)[comm.rank:comm.rank + 2])]
            assert (own == comm.size * (k + turn)).all()
    assert comm.size == 1 or len(ring._plans) >= 4
    ring.free()


@pytest.mark.mpi
def test_an_array_under_way_is_not_started_again(comm):
    if comm.size == 1:
        return
    ring, array = Ring(comm), np.ones(50, np.float32)
    first = ring.start_all_gather(array, bounds(50, comm.size))
    with pytest.raises(AssertionError, match="before it has been waited for"):
        ring.start_all_gather(array, bounds(50, comm.size))
    first.wait()
    ring.start_all_gather(array, bounds(50, comm.size)).wait()
    ring.free()


@pytest.mark.mpi
@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_narrow_collectives_under_way_give_the_bits_of_the_blocking_ones(comm, wire):
    results = []
    for begin in (False, True):
        ring = make_ring(comm, wire, segment_bytes=512)
        arrays = [np.random.default_rng([comm.rank, k]).standard_normal(n).astype(np.float32)
                  for k, n in enumerate((1009, 3, 400))]
        replicas = [np.zeros_like(a) for a in arrays]
        for _ in range(3):
            cuts = [bounds(a.size, comm.size) for a in arrays]
            if begin:
                for operation in [ring.start_reduce_scatter(a, c) for a, c in zip(arrays, cuts, strict=True)]:
                    operation.wait()
            else:
                for a, c in zip(arrays, cuts, strict=True):
                    ring.reduce_scatter(a, c)
            kept = [r[c[comm.rank]:c[comm.rank + 1]].copy() for r, c in zip(replicas, cuts, strict=True)]
            for a, r, c in zip(arrays, replicas, cuts, strict=True):
                own = slice(c[comm.rank], c[comm.rank + 1])
                r[own] = a[own]     # the masters
            if begin:
                for operation in [ring.start_gather_towards(*x) for x in zip(replicas, cuts, kept, strict=True)]:
                    operation.wait()
            else:
                for x in zip(replicas, cuts, kept, strict=True):
                    ring.gather_towards(*x)
        results.append([a.tobytes() for a in [*replicas, *kept]])
        assert all(np.isfinite(a).all() and (a.any() or a.size < 5) for a in replicas)
        ring.free()
    assert results[0] == results[1]


@pytest.mark.mpi(min_size=2)
def test_links_are_measured_alike_on_all_ranks(comm):
    ring = Ring(comm)
    few, many = ring.least_bytes(0.0, 0.3), ring.least_bytes(100.0, 0.3)
    assert set(comm.allgather((few, many))) == {(few, many)} and 0 < few < many
    ring.free()
