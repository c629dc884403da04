"""Where the ranks are: in the world, in the node and across nodes."""

import os

import numpy as np
from mpi4py import MPI

from hpcmlp.launch import cpu_quota


class Topology:
    """The place of this rank, and the communicators that go with it.

    Collective over `comm`. `node` joins the ranks that share this rank's memory, `cross` the ranks with the same
    local rank on all nodes. Nodes may hold different numbers of ranks: then `cross_size` differs between local ranks
    and `num_nodes` is still the number of nodes. MPI is asked (COMM_TYPE_SHARED); launchers' variables lie.
    `local_sizes`, `cores` and `threads` are the fewest and the most, over all ranks, of ranks on a node, of cores that
    a rank may use and of its BLAS threads (0: not set).

    one_node : all ranks are known to share one node: no communicator is made.
    """

    def __init__(self, comm: MPI.Intracomm, one_node: bool = False):
        self.comm = comm
        self.rank = comm.rank
        self.size = comm.size
        self.node = comm if one_node else comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
        self.local_rank = self.node.rank
        self.local_size = self.node.size
        self.cross = MPI.COMM_SELF if one_node else comm.Split(self.local_rank, key=comm.rank)
        self._one_node = one_node
        self.cross_rank = self.cross.rank
        self.cross_size = self.cross.size
        leaders = np.array([self.local_rank == 0], dtype=np.int64)
        comm.Allreduce(MPI.IN_PLACE, leaders, MPI.SUM)
        self.num_nodes = int(leaders[0])
        self.host = MPI.Get_processor_name()
        own = (self.local_size, len(os.sched_getaffinity(0)), _blas_threads())
        spread = np.array([*own, *(-count for count in own)], dtype=np.int64)
        comm.Allreduce(MPI.IN_PLACE, spread, MPI.MAX)
        self.local_sizes, self.cores, self.threads = zip((-spread[3:]).tolist(), spread[:3].tolist(), strict=True)

    @property
    def made(self) -> tuple[MPI.Intracomm, ...]:
        """The communicators that were made here. Local."""
        return () if self._one_node else (self.node, self.cross)

    def free(self) -> None:
        """Give back the communicators made here; `comm` stays the caller's.

        Collective over `comm`.
        """
        for comm in self.made:
            comm.Free()


def usable_cores(node: MPI.Intracomm) -> int:
    """Return how many cores the ranks of `node` may use together, 1 at least. Collective over `node`, one node's."""
    held = np.zeros(4096, np.uint8)
    held[[core for core in os.sched_getaffinity(0) if core < held.size]] = 1
    node.Allreduce(MPI.IN_PLACE, held, MPI.MAX)
    quota = cpu_quota()
    return max(1, int(held.sum() if quota is None else min(held.sum(), quota)))


def _blas_threads() -> int:
    text = os.environ.get("OPENBLAS_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "")).split(",")[0]
    return int(text) if text.isdigit() else 0


def mpi_library() -> str:
    """Return name and version of the MPI library in a few words. Local."""
    first = MPI.Get_library_version().split("\n")[0].strip(" \0").replace("MPICH Version:", "MPICH")
    return " ".join(first.split(",")[0].split())
