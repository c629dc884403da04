"""Whole arrays and bytes between ranks, cut into messages below a limit.

Counts in MPI are 32-bit integers in most libraries, so a message stays below `LIMIT_BYTES`; every function takes the
limit as an argument so that tests can force the cut. Only buffers travel, never pickles.
"""

from collections.abc import Iterator

import numpy as np
from mpi4py import MPI

LIMIT_BYTES = 2**30


def sum_in_place(comm: MPI.Intracomm, array: np.ndarray, limit_bytes: int = LIMIT_BYTES) -> None:
    """Replace `array` (contiguous, any shape) by its sum over the ranks.

    Collective over `comm`.
    """
    for piece in pieces(array, limit_bytes):
        comm.Allreduce(MPI.IN_PLACE, piece, MPI.SUM)


def max_in_place(comm: MPI.Intracomm, array: np.ndarray, limit_bytes: int = LIMIT_BYTES) -> None:
    """Replace `array` (contiguous, any shape) by its maximum over the ranks.

    Collective over `comm`.
    """
    for piece in pieces(array, limit_bytes):
        comm.Allreduce(MPI.IN_PLACE, piece, MPI.MAX)


def min_in_place(comm: MPI.Intracomm, array: np.ndarray, limit_bytes: int = LIMIT_BYTES) -> None:
    """Replace `array` (contiguous, any shape) by its minimum over the ranks.

    Collective over `comm`.
    """
    for piece in pieces(array, limit_bytes):
        comm.Allreduce(MPI.IN_PLACE, piece, MPI.MIN)


def broadcast(comm: MPI.Intracomm, array: np.ndarray, root: int = 0, limit_bytes: int = LIMIT_BYTES) -> None:
    """Copy `array` (contiguous, same shape and dtype everywhere) of rank `root` to all ranks, in place.

    Collective over `comm`. Any dtype of fixed size: the bytes are sent.
    """
    for piece in pieces(_as_bytes(array), limit_bytes):
        comm.Bcast(piece, root)


def broadcast_bytes(comm: MPI.Intracomm, data: bytes | None, root: int = 0, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """Return the bytes that rank `root` passes; the others pass None.

    Collective over `comm`.
    """
    length = np.array([len(data) if comm.rank == root else 0], dtype=np.int64)
    comm.Bcast(length, root)
    buffer = np.empty(length[0], np.uint8)
    if comm.rank == root:
        buffer[:] = np.frombuffer(data, np.uint8)
    broadcast(comm, buffer, root, limit_bytes)
    return buffer.tobytes()


def gather_bytes(comm: MPI.Intracomm, data: bytes, root: int = 0,
                 limit_bytes: int = LIMIT_BYTES) -> list[bytes] | None:
    """Return the bytes of every rank, in rank order, on rank `root`; None elsewhere.

    Collective over `comm`.
    """
    lengths = np.zeros(comm.size, np.int64)
    comm.Allgather(np.array([len(data)], np.int64), lengths)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    out = np.empty(bounds[-1] if comm.rank == root else 0, np.uint8)
    gather_ranges(comm, np.frombuffer(data, np.uint8), bounds, out, root, limit_bytes)
    return _cut(out, bounds) if comm.rank == root else None


def all_gather_bytes(comm: MPI.Intracomm, data: bytes, limit_bytes: int = LIMIT_BYTES) -> list[bytes]:
    """Return the bytes of every rank, in rank order, on every rank.

    Collective over `comm`.
    """
    lengths = np.zeros(comm.size, np.int64)
    comm.Allgather(np.array([len(data)], np.int64), lengths)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    out = np.empty(bounds[-1], np.uint8)
    gather_ranges(comm, np.frombuffer(data, np.uint8), bounds, out, 0, limit_bytes)
    broadcast(comm, out, 0, limit_bytes)
    return _cut(out, bounds)


def gather_ranges(comm: MPI.Intracomm, part: np.ndarray, bounds: np.ndarray, out: np.ndarray | None, root: int = 0,
                  limit_bytes: int = LIMIT_BYTES) -> None:
    """Collect 1-D parts of any lengths: `out[bounds[r]:bounds[r+1]]` on `root` becomes rank r's `part`.

    Collective over `comm`. `bounds` (size+1,) is the same on all ranks; `out` is read on `root` only.
    """
    bounds = np.asarray(bounds, dtype=np.int64)
    total = int(bounds[-1] - bounds[0]) * part.itemsize
    if total <= limit_bytes:
        receive = None
        if comm.rank == root:
            receive = [out, np.diff(bounds), bounds[:-1], MPI._typedict[out.dtype.char]]
        comm.Gatherv(part, receive, root)
        return
    if comm.rank != root:
        for piece in pieces(part, limit_bytes):
            comm.Send(piece, root)
        return
    for rank in range(comm.size):
        place = out[bounds[rank]:bounds[rank + 1]]
        if rank == root:
            place[:] = part
            continue
        for piece in pieces(place, limit_bytes):
            comm.Recv(piece, rank)


def collect(comm: MPI.Intracomm, part: np.ndarray | None, ranges: list[list[tuple[int, int]]],
            out: np.ndarray | None, root: int = 0, limit_bytes: int = LIMIT_BYTES) -> None:
    """Bring scattered pieces together: `out[start:stop]` on `root` becomes rank r's piece, for all its `ranges[r]`.

    Collective over `comm`. `part` is the pieces of this rank one behind the other (unused on `root`, whose own pieces
    are in `out` already), `out` a 1-D array on `root`, None elsewhere. Each rank sends straight into its place.
    """
    if comm.rank != root:
        at = 0
        for start, stop in ranges[comm.rank]:
            for piece in pieces(part[at:at + stop - start], limit_bytes):
                comm.Send(piece, root)
            at += stop - start
        return
    for rank in range(comm.size):
        for start, stop in ranges[rank] if rank != root else ():
            for piece in pieces(out[start:stop], limit_bytes):
                comm.Recv(piece, rank)


def barrier(comm: MPI.Intracomm) -> None:
    """Return when all ranks have come here.

    Collective over `comm`.
    """
    comm.Barrier()


def there_and_back(comm: MPI.Intracomm, array: np.ndarray, other: int, limit_bytes: int = LIMIT_BYTES) -> None:
    """Send `array` from rank 0 to rank `other` and back again; the other ranks return at once.

    Collective over `comm`: for timing messages.
    """
    for piece in pieces(array, limit_bytes):
        if comm.rank == 0:
            comm.Send(piece, other)
            comm.Recv(piece, other)
        elif comm.rank == other:
            comm.Recv(piece, 0)
            comm.Send(piece, 0)


def aligned_zeros(size: int, dtype: np.dtype | type, alignment: int = 64) -> np.ndarray:
    """Return a zeroed (size,) array whose memory starts at a multiple of `alignment` bytes. Local."""
    dtype = np.dtype(dtype)
    raw = np.zeros(size * dtype.itemsize + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start:start + size * dtype.itemsize].view(dtype)


def pieces(array: np.ndarray, limit_bytes: int = LIMIT_BYTES) -> Iterator[np.ndarray]:
    """Yield 1-D views that cover the contiguous `array` in order, each at most `limit_bytes` (at least one element).

    Local. An empty array gives nothing, so that all ranks make the same number of calls.
    """
    assert array.flags.c_contiguous, "a copy would be filled in place of the array"
    flat = array.reshape(-1)
    count = max(1, limit_bytes // max(1, flat.itemsize))
    for start in range(0, flat.size, count):
        yield flat[start:start + count]


def cut_parts(array: np.ndarray, bounds: list[int], size: int, segment_bytes: int) -> list[list[np.ndarray]]:
    """Return the pieces, of `segment_bytes` at most, of every rank's part of an array of `comm.Collective`. Local.

    Alike on all ranks. What is no such array, or no bounds of `size` parts within it, is our own fault: AssertionError.
    """
    assert array.ndim == 1 and array.flags.c_contiguous and array.dtype.char in "fd"
    assert len(bounds) == size + 1 and 0 <= bounds[0] and bounds[-1] <= array.size
    return [list(pieces(array[start:stop], segment_bytes)) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]


def _as_bytes(array: np.ndarray) -> np.ndarray:
    assert array.flags.c_contiguous, "a copy would be filled in place of the array"
    return array.reshape(-1).view(np.uint8)


def _cut(out: np.ndarray, bounds: np.ndarray) -> list[bytes]:
    return [out[start:stop].tobytes() for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
