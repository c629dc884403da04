"""Ring reduce-scatter, all-gather and all-reduce over point-to-point messages.

The array is cut into one part per rank. In hop k of the reduce-scatter rank r sends its partial sum of part
(r - 1 - k) to rank r + 1, receives part (r - 2 - k) from rank r - 1 and adds its own numbers; after size - 1 hops rank
r holds the whole sum of part r. The all-gather passes the finished parts on the same way. Parts are cut into segments:
a segment is added while the next one is under way, and goes on to the next rank at once. One rank adds a part up and
the others copy it, and the order of the ranks in the sum is fixed, so all ranks hold the same bits in every run.

Cost, for n bytes on P ranks: each rank sends (P-1)/P n in each half, 2 (P-1)/P n in an all-reduce, which is the least
possible, in 2 (P-1) hops. P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", J. Parallel Distrib. Comput. 69 (2009).
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from hpcmlp.comm.exact_sum import join, num_bins, split
from hpcmlp.comm.messages import LIMIT_BYTES, aligned_zeros, pieces

# Between two ranks of a node, 23 MB: 2.2 ms for a reduce-scatter in segments of 1 MiB, 2.7 ms of 256 KiB, 4 of 64 KiB.
SEGMENT_BYTES = 2**20
DEPTH = 2           # segments that may be on their way to this rank at once
MAX_PLANS = 64      # prepared (array, bounds) pairs that are kept
DATA_TAG, WORDS_TAG = 1, 2

Bounds = Sequence[int] | np.ndarray


class Ring:
    """Collectives on 1-D float32 or float64 arrays, by messages between neighbours in the ring.

    Collective over `comm`, which is duplicated. Messages for an array and its bounds are prepared at the first call
    and kept (persistent requests, work buffers), so a steady step allocates nothing; the ring therefore holds a
    reference to the arrays it was last used with, until `forget` or `free`.

    Parameters
    ----------
    segment_bytes : size of one message.
    limit_bytes : no message is larger; for tests.
    """

    narrow = False      # whether float32 arrays are rounded on their way: then there is `gather_towards` and `settle`

    def __init__(self, comm: MPI.Intracomm, segment_bytes: int = SEGMENT_BYTES, limit_bytes: int = LIMIT_BYTES):
        self.comm = comm.Dup()
        self.rank = self.part = comm.rank    # part: which part of the bounds this rank gets
        self.size = comm.size
        self.segment_bytes = min(segment_bytes, limit_bytes)
        self._left = (self.rank - 1) % self.size
        self._right = (self.rank + 1) % self.size
        self._work = [np.empty(max(8, self.segment_bytes), np.uint8) for _ in range(DEPTH)]
        self._plans: OrderedDict[tuple, _ReduceScatter | _AllGather] = OrderedDict()

    def empty(self, size: int, dtype: np.dtype | type) -> np.ndarray:
        """Return a zeroed (size,) array of this rank, 64-byte aligned, that the collectives handle well. Local."""
        return aligned_zeros(size, dtype)

    def common(self, size: int, dtype: np.dtype | type) -> np.ndarray:
        """Return a zeroed (size,) array for what is the same on all ranks; here every rank has its own. Local."""
        return aligned_zeros(size, dtype)

    def reduce_scatter(self, array: np.ndarray, bounds: Bounds, words: np.ndarray | None = None) -> None:
        """Sum over the ranks; rank r gets the sum of its part, `array[bounds[r]:bounds[r+1]]`, in place.

        Collective over `comm`.

        Parameters
        ----------
        array : contiguous, the same length and dtype on all ranks; what lies between the bounds but outside the own
            part holds partial sums afterwards.
        bounds : (size+1,) ascending element offsets, the same on all ranks; parts may be empty.
        words : (W,) float64 or None; replaced by its sum over the ranks, with the same bits on all of them. A copy
            travels with every part.
        """
        if self.size > 1:
            self._plan(_ReduceScatter, array, bounds, 0 if words is None else words.size).run(words)

    def all_gather(self, array: np.ndarray, bounds: Bounds) -> None:
        """Copy every rank's part, `array[bounds[r]:bounds[r+1]]`, to all ranks, in place.

        Collective over `comm`. Parameters as for `reduce_scatter`.
        """
        if self.size > 1:
            self._plan(_AllGather, array, bounds, 0).run()

    def all_reduce(self, array: np.ndarray, words: np.ndarray | None = None) -> None:
        """Replace `array` by its sum over the ranks, with the same bits on all of them; `words` likewise.

        Collective over `comm`.
        """
        bounds = [array.size * rank // self.size for rank in range(self.size + 1)]
        self.reduce_scatter(array, bounds, words)
        self.all_gather(array, bounds)

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """Copy `array` (contiguous, any dtype) of rank `root` to all ranks, in place, as a chain of segments.

        Collective over `comm`.
        """
        sends = []
        for piece in pieces(array.reshape(-1).view(np.uint8), self.segment_bytes):
            if self.rank != root:
                self.comm.Recv(piece, self._left, DATA_TAG)
            if self._right != root:
                sends.append(self.comm.Isend(piece, self._right, DATA_TAG))
        MPI.Request.Waitall(sends)

    def forget(self) -> None:
        """Drop the prepared messages and with them the references to the caller's arrays. Local."""
        while self._plans:
            self._plans.popitem()[1].free()

    def free(self) -> None:
        """Give everything back.

        Collective over `comm`.
        """
        self.forget()
        self.comm.Free()

    def _plan(self, kind: type, array: np.ndarray, bounds: Bounds, num_words: int) -> "_ReduceScatter | _AllGather":
        where = bounds.tobytes() if isinstance(bounds, np.ndarray) else tuple(bounds)
        # The plan keeps the memory alive, so an address cannot come to mean another array.
        key = (kind, array.__array_interface__["data"][0], array.dtype.char, where, num_words)
        plan = self._plans.get(key)
        if plan is None:
            plan = kind(self, array, [int(bound) for bound in bounds], num_words)
            self._plans[key] = plan
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)[1].free()
        self._plans.move_to_end(key)
        return plan

    def _parts(self, array: np.ndarray, bounds: list[int]) -> list[list[np.ndarray]]:
        """Cut every part into its segments, alike on all ranks."""
        assert array.ndim == 1 and array.flags.c_contiguous and array.dtype.char in "fd"
        assert len(bounds) == self.size + 1 and 0 <= bounds[0] and bounds[-1] <= array.size
        return [list(pieces(array[start:stop], self.segment_bytes))
                for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]


class _ReduceScatter:
    """The messages of one reduce-scatter, prepared."""

    def __init__(self, ring: Ring, array: np.ndarray, bounds: list[int], num_words: int):
        comm, rank, size = ring.comm, ring.rank, ring.size
        parts = ring._parts(array, bounds)
        first_sends = [comm.Send_init(piece, ring._right, DATA_TAG) for piece in parts[rank - 1]]
        self._sends = list(first_sends)
        self._receives = []
        hops = []
        for hop in range(size - 1):
            steps = []
            for own in parts[(rank - 2 - hop) % size]:
                work = ring._work[len(self._receives) % DEPTH][:own.nbytes].view(array.dtype)
                self._receives.append(comm.Recv_init(work, ring._left, DATA_TAG))
                send = comm.Send_init(own, ring._right, DATA_TAG) if hop < size - 2 else None
                if send is not None:
                    self._sends.append(send)
                steps.append((own, work, send))
            hops.append(steps)
        # A work buffer takes segment i + DEPTH as soon as segment i has been added.
        later = iter([*self._receives[DEPTH:], *[None] * DEPTH])
        receives = iter(self._receives)
        self._hops = [[(next(receives), own, work, next(later), send) for own, work, send in steps] for steps in hops]
        self._prepare_words(ring, num_words)
        self._first = [*self._receives[:DEPTH], *self._word_receives, *self._word_sends[:1], *first_sends]

    def _prepare_words(self, ring: Ring, num_words: int) -> None:
        # Row 0 holds this rank's words; row k + 1 what hop k brings, then plus row 0, which hop k + 1 sends on.
        self._rows = list(np.empty((ring.size, num_bins(ring.size), num_words)))
        self._word_sends = []
        self._word_receives = []
        if num_words:
            self._word_sends = [ring.comm.Send_init(row, ring._right, WORDS_TAG) for row in self._rows[:-1]]
            self._word_receives = [ring.comm.Recv_init(row, ring._left, WORDS_TAG) for row in self._rows[1:]]
            self._sends.extend(self._word_sends)

    def run(self, words: np.ndarray | None) -> None:
        add, rows = np.add, self._rows
        if words is not None:
            split(words, rows[0])
        MPI.Prequest.Startall(self._first)
        for hop, steps in enumerate(self._hops):
            if self._word_sends:
                self._word_receives[hop].Wait()
                add(rows[hop + 1], rows[0], rows[hop + 1])
                if hop + 1 < len(self._hops):
                    self._word_sends[hop + 1].Start()
            for receive, own, work, later, send in steps:
                receive.Wait()
                add(own, work, own)
                if later is not None:
                    later.Start()
                if send is not None:
                    send.Start()
        MPI.Request.Waitall(self._sends)
        if words is not None:
            join(rows[-1], words)

    def free(self) -> None:
        for request in [*self._sends, *self._receives, *self._word_receives]:
            request.Free()


class _AllGather:
    """The messages of one all-gather, prepared; every segment is received in its place."""

    def __init__(self, ring: Ring, array: np.ndarray, bounds: list[int], num_words: int):
        comm, rank, size = ring.comm, ring.rank, ring.size
        parts = ring._parts(array, bounds)
        first_sends = [comm.Send_init(piece, ring._right, DATA_TAG) for piece in parts[rank]]
        self._sends = list(first_sends)
        self._receives = []
        self._forward = []
        for hop in range(size - 1):
            for piece in parts[(rank - 1 - hop) % size]:
                receive = comm.Recv_init(piece, ring._left, DATA_TAG)
                self._receives.append(receive)
                if hop < size - 2:
                    send = comm.Send_init(piece, ring._right, DATA_TAG)
                    self._sends.append(send)
                    self._forward.append((receive, send))
        self._first = [*self._receives, *first_sends]
        self._all = [*self._receives, *self._sends]

    def run(self) -> None:
        MPI.Prequest.Startall(self._first)
        for receive, send in self._forward:
            receive.Wait()
            send.Start()
        MPI.Request.Waitall(self._all)

    def free(self) -> None:
        for request in self._all:
            request.Free()
