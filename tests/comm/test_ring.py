"""What the ring sends, and what it allocates."""

import tracemalloc

import numpy as np
import pytest

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
