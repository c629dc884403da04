"""Push and pull of a parameter server whose ranks share one node: servers read gradients where the workers have them.

`comm.served` without messages. A push is a meeting of the ranks, after which every server adds its slice of the
workers' arrays, in ascending order of their ranks, as there: the same bits. A pull is a meeting: the parameters exist
once, each server has written its slice into them, and workers read them in place.

Cost for n bytes, W workers, K servers: a server reads W n/K; nothing is sent, and nothing copied but by the addition.
Measured with 2 to 4 ranks on 2 cores, 128 KiB to 4 MiB: 2.3 to 5.2 times as fast as the same by messages, 2.0 to 6.1
as by MPI-3 windows (benchmarks/notes/2026-11-28-server-on-a-node.md).

No cycle of waiting: all ranks make the same calls in one order, each of which waits for nothing but all others' coming
(`comm.shared`). A version is a number of meetings, which cannot be lost or doubled as messages might.
"""

from typing import Any

import numpy as np

from hpcmlp.comm.ring import Bounds
from hpcmlp.comm.served import Roles
from hpcmlp.comm.shared import Shared
from hpcmlp.comm.topology import Topology


class ServedOnNode(Shared):
    """`comm.served.Served` through the memory of the one node that all ranks are on.

    Collective over `topology.comm`; raises SharedUnavailable as `Shared` does. `bytes_received` counts what this rank
    has read of other ranks' arrays to add it, `bytes_sent` stays 0.
    """

    starts = False
    bytes_sent = 0

    def __init__(self, topology: Topology, servers: int, **options: Any):
        self.roles = Roles(servers, topology.size)
        super().__init__(topology, **options)
        self.bytes_received = 0
        self._others = sum(rank != topology.rank for rank in self.roles.workers)

    def reduce_scatter(self, array: np.ndarray, bounds: Bounds, words: np.ndarray | None = None) -> None:
        """As `Served.reduce_scatter`, of an array made by `empty`; for how long neighbours read it see `Shared`.

        Collective over the ranks. Raises SharedUnavailable for any other array.
        """
        plan = self._plan_in_node(array, bounds)
        self._reduce_on_node(plan, words)
        self.bytes_received += plan.share.nbytes * self._others

    def _order(self) -> list[int]:
        return list(self.roles.workers)
