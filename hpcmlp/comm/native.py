"""The MPI library's own collectives behind the same methods as the ring."""

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from hpcmlp.comm.exact_sum import join, num_bins, split
from hpcmlp.comm.messages import LIMIT_BYTES, aligned_zeros, broadcast, pieces, sum_in_place

Bounds = Sequence[int] | np.ndarray


class Native:
    """`comm.Collective` by MPI_Reduce_scatter, MPI_Allgatherv and MPI_Allreduce.

    Local. `comm` itself is used, and its ranks must make all their calls in it in one order, from one thread. The same
    bits on all ranks rest on the library: MPI recommends it and the common ones keep to it.
    """

    starts = narrow = threads = False
    bytes_sent = None   # how often the library sends what it is given is its own affair

    def __init__(self, comm: MPI.Intracomm, limit_bytes: int = LIMIT_BYTES):
        self.comm = comm
        self.rank = self.part = comm.rank
        self.size = comm.size
        self.limit_bytes = limit_bytes
        self._work = np.empty(0, np.uint8)
        self._bins = np.empty((num_bins(self.size), 0))

    def empty(self, size: int, dtype: np.dtype | type) -> np.ndarray:
        """As `Collective.empty`. Local."""
        return aligned_zeros(size, dtype)

    def common(self, size: int, dtype: np.dtype | type) -> np.ndarray:
        """As `Collective.common`; every rank has its own. Local."""
        return aligned_zeros(size, dtype)

    def reduce_scatter(self, array: np.ndarray, bounds: Bounds, words: np.ndarray | None = None) -> None:
        """As `Collective.reduce_scatter`. Collective over `comm`."""
        if self.size == 1:
            return
        if words is not None:
            self._sum_words(words)
        bounds = [int(bound) for bound in bounds]
        whole = array[bounds[0]:bounds[-1]]
        if whole.nbytes > self.limit_bytes:
            for rank in range(self.size):
                self._reduce_part(array[bounds[rank]:bounds[rank + 1]], rank)
            return
        own = array[bounds[self.rank]:bounds[self.rank + 1]]
        work = self._work_like(own)
        counts = [stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
        self.comm.Reduce_scatter(whole, work, counts, MPI.SUM)
        own[:] = work

    def all_gather(self, array: np.ndarray, bounds: Bounds) -> None:
        """As `Collective.all_gather`. Collective over `comm`."""
        if self.size == 1:
            return
        bounds = [int(bound) for bound in bounds]
        if array[bounds[0]:bounds[-1]].nbytes > self.limit_bytes:
            for rank in range(self.size):
                broadcast(self.comm, array[bounds[rank]:bounds[rank + 1]], rank, self.limit_bytes)
            return
        counts = [stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
        self.comm.Allgatherv(MPI.IN_PLACE, [array, counts, bounds[:-1], MPI._typedict[array.dtype.char]])

    def all_reduce(self, array: np.ndarray, words: np.ndarray | None = None) -> None:
        """As `Collective.all_reduce`. Collective over `comm`."""
        if self.size == 1:
            return
        sum_in_place(self.comm, array, self.limit_bytes)
        if words is not None:
            self._sum_words(words)

    def advance(self) -> bool:
        """Return True: nothing is ever under way. Local."""
        return True

    def meet(self) -> None:
        """Return: ranks have no common memory here. Local."""

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """As `Collective.broadcast`. Collective over `comm`."""
        broadcast(self.comm, array, root, self.limit_bytes)

    def free(self) -> None:
        """Do nothing: the communicator is the caller's. Local."""

    def _sum_words(self, words: np.ndarray) -> None:
        if self._bins.shape[1] != words.size:
            self._bins = np.empty((num_bins(self.size), words.size))
        split(words, self._bins)
        self.comm.Allreduce(MPI.IN_PLACE, self._bins, MPI.SUM)
        join(self._bins, words)

    def _reduce_part(self, part: np.ndarray, root: int) -> None:
        for piece in pieces(part, self.limit_bytes):
            if self.rank == root:
                self.comm.Reduce(MPI.IN_PLACE, piece, MPI.SUM, root)
            else:
                self.comm.Reduce(piece, None, MPI.SUM, root)

    def _work_like(self, own: np.ndarray) -> np.ndarray:
        if self._work.nbytes < own.nbytes:
            self._work = np.empty(own.nbytes, np.uint8)
        return self._work[:own.nbytes].view(own.dtype)
