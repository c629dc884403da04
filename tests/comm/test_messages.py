"""Arrays and bytes between ranks, whole and cut."""

import numpy as np
import pytest

from hpcmlp.comm import messages

LIMITS = [messages.LIMIT_BYTES, 24]


@pytest.mark.mpi
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int32])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5)])
def test_sum_max_and_min_in_place(comm, limit, dtype, shape):
    every = [np.random.default_rng(rank).integers(-50, 50, shape).astype(dtype) for rank in range(comm.size)]
    for function, plain in ((messages.sum_in_place, np.sum), (messages.max_in_place, np.max),
                            (messages.min_in_place, np.min)):
        array = every[comm.rank].copy()
        function(comm, array, limit_bytes=limit)
        np.testing.assert_array_equal(array, plain(every, axis=0))
        assert array.dtype == dtype


@pytest.mark.mpi
@pytest.mark.parametrize("limit", LIMITS)
def test_broadcast_of_any_dtype_from_any_root(comm, limit):
    for root in range(comm.size):
        for dtype in (np.float16, np.float32, np.uint64, bool, "S5"):
            truth = np.arange(12).reshape(3, 4).astype(dtype)
            array = truth.copy() if comm.rank == root else np.zeros((3, 4), dtype)
            messages.broadcast(comm, array, root, limit_bytes=limit)
            np.testing.assert_array_equal(array, truth)


@pytest.mark.mpi
@pytest.mark.parametrize("limit", LIMITS)
def test_bytes_of_any_length(comm, limit):
    for data in (b"", b"x", bytes(range(256)) * 3):
        root = comm.size - 1
        assert messages.broadcast_bytes(comm, data if comm.rank == root else None, root, limit_bytes=limit) == data
    mine = bytes([comm.rank]) * (comm.rank * 17)      # rank 0 has nothing to say
    expected = [bytes([rank]) * (rank * 17) for rank in range(comm.size)]
    assert messages.all_gather_bytes(comm, mine, limit_bytes=limit) == expected
    for root in range(comm.size):
        gathered = messages.gather_bytes(comm, mine, root, limit_bytes=limit)
        assert gathered == (expected if comm.rank == root else None)


@pytest.mark.mpi
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8])
def test_ranges_of_uneven_lengths_are_collected_in_order(comm, limit, dtype):
    lengths = [(5 * rank) % 7 for rank in range(comm.size)]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    truth = np.arange(bounds[-1]).astype(dtype)
    for root in range(comm.size):
        out = np.zeros(bounds[-1], dtype) if comm.rank == root else None
        messages.gather_ranges(comm, truth[bounds[comm.rank]:bounds[comm.rank + 1]].copy(), bounds, out, root,
                               limit_bytes=limit)
        if comm.rank == root:
            np.testing.assert_array_equal(out, truth)


def test_pieces_cover_the_array_and_stay_below_the_limit():
    array = np.arange(101, dtype=np.float32)
    cut = list(messages.pieces(array, 64))
    assert all(piece.nbytes <= 64 and piece.base is not None for piece in cut)
    np.testing.assert_array_equal(np.concatenate(cut), array)
    assert [piece.size for piece in messages.pieces(array[:3], 1)] == [1, 1, 1]
    assert list(messages.pieces(array[:0], 64)) == []


@pytest.mark.mpi
def test_barrier_returns(comm):
    messages.barrier(comm)


@pytest.mark.mpi
@pytest.mark.parametrize("limit", [64, messages.LIMIT_BYTES])
@pytest.mark.parametrize("root", [0, -1])
def test_scattered_pieces_are_collected_in_their_places(comm, limit, root):
    root %= comm.size
    bounds = [0, 3, 3, 10, 64, 65, 200]
    pieces = list(zip(bounds[:-1], bounds[1:], strict=True))
    ranges = [pieces[rank::comm.size] for rank in range(comm.size)]
    whole = np.arange(200, dtype=np.float32)
    part = np.concatenate([whole[:0], *(whole[a:b] for a, b in ranges[comm.rank])])
    out = None
    if comm.rank == root:
        out = np.full(200, -1, np.float32)
        for a, b in ranges[root]:
            out[a:b] = whole[a:b]
    messages.collect(comm, part, ranges, out, root, limit)
    if comm.rank == root:
        np.testing.assert_array_equal(out, whole)
