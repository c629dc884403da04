"""NCCL among ranks that each have a GPU of their own: sums and gathers on device memory, in the order of a stream.

The collectives are only queued, so that they can be captured into a graph between the launches of a step. The unique id
travels by MPI. `own_gpus` tells beforehand whether every rank has a GPU to itself: NCCL refuses two ranks on one.
`OverHost` does the same for arrays of the host, at once: what tests of several ranks without GPUs use.
"""

import importlib
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcmlp.comm.messages import all_gather_bytes, broadcast_bytes, min_in_place, sum_in_place
from hpcmlp.ops.gpu_places import sharing


def own_gpus(comm: MPI.Intracomm, identity: str, available: bool) -> str:
    """Return why NCCL cannot be used, or an empty text.

    Collective over `comm`; the same text on all ranks.

    identity : of this rank's GPU, its UUID, which no other GPU of any node has.
    available : whether this rank has the library.
    """
    seen = [text.decode() for text in all_gather_bytes(comm, f"{int(available)}{identity}".encode())]
    without = [rank for rank, text in enumerate(seen) if text[0] == "0"]
    if without:
        return f"NCCL is not there on rank {without[0]}"
    groups = sharing([[text] for text in seen])
    return f"ranks {groups[0][0]} and {groups[0][1]} share a GPU" if groups else ""


class Nccl:
    """A communicator of all ranks of `comm`, on the current device.

    Collective over `comm`. The methods queue one call each into `stream`; arrays are CuPy's, and in place.

    part : elements of a rank's part of the flat vectors; rank r has part r.
    """

    def __init__(self, comm: MPI.Intracomm, stream: Any, part: int):
        nccl = importlib.import_module("cupy.cuda.nccl")
        self._comm, self._stream, self._part, self._rank = comm, stream, part, comm.rank
        self._float32, self._float64, self._sum = nccl.NCCL_FLOAT32, nccl.NCCL_FLOAT64, nccl.NCCL_SUM
        self._byte = nccl.NCCL_INT8
        unique = nccl.get_unique_id() if comm.rank == 0 else None
        # A tuple of signed characters before CuPy 14, bytes since.
        data = None if unique is None else bytes(c & 0xFF for c in unique)
        data = broadcast_bytes(comm, data)
        is_tuple = bool(int(broadcast_bytes(comm, str(int(isinstance(unique, tuple))).encode()
                                            if comm.rank == 0 else None)))
        if is_tuple:
            data = tuple(c - 256 if c > 127 else c for c in data)
        self._nccl = nccl.NcclCommunicator(comm.size, data, comm.rank)

    def sum_parts(self, array: Any) -> None:
        """Leave the sum over the ranks of part r of float32 `array` on rank r; other parts stay. Collective."""
        begin = array.data.ptr
        self._nccl.reduceScatter(begin, begin + 4 * self._rank * self._part, self._part, self._float32, self._sum,
                                 self._stream.ptr)

    def sum(self, array: Any) -> None:
        """Sum a float64 array over the ranks. Collective."""
        self._nccl.allReduce(array.data.ptr, array.data.ptr, array.size, self._float64, self._sum, self._stream.ptr)

    def gather_parts(self, array: Any) -> None:
        """Give every rank all parts of `array`, of any type: bytes are moved. Collective."""
        begin, count = array.data.ptr, array.itemsize * self._part
        self._nccl.allGather(begin + self._rank * count, begin, count, self._byte, self._stream.ptr)

    def least(self, number: int) -> int:
        """Return the smallest of the ranks' numbers. Collective; by MPI."""
        return _least(self._comm, number)


class OverHost:
    """The methods of `Nccl` over MPI, for arrays of the host."""

    def __init__(self, comm: MPI.Intracomm, part: int):
        self._comm, self._part = comm, part

    def sum_parts(self, array: np.ndarray) -> None:
        """As `Nccl.sum_parts`. Collective."""
        rank, total = self._comm.rank, array.copy()
        sum_in_place(self._comm, total)
        own = slice(rank * self._part, (rank + 1) * self._part)
        array[own] = total[own]

    def sum(self, array: np.ndarray) -> None:
        """As `Nccl.sum`. Collective."""
        sum_in_place(self._comm, array)

    def gather_parts(self, array: np.ndarray) -> None:
        """As `Nccl.gather_parts`. Collective."""
        own = slice(self._comm.rank * self._part, (self._comm.rank + 1) * self._part)
        array[:] = np.concatenate([np.frombuffer(data, array.dtype)
                                   for data in all_gather_bytes(self._comm, array[own].tobytes())])

    def least(self, number: int) -> int:
        """As `Nccl.least`. Collective."""
        return _least(self._comm, number)


def _least(comm: MPI.Intracomm, number: int) -> int:
    value = np.array([float(number)])
    min_in_place(comm, value)
    return int(value[0])
