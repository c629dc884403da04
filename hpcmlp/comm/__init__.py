"""Arrays between ranks: topology, collectives by our ring, by node memory or by the MPI library."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcmlp.comm.ring import Ring
from hpcmlp.comm.shared import Shared, SharedUnavailable
from hpcmlp.comm.topology import Topology
from hpcmlp.errors import ConfigError

COLLECTIVES = ("ring", "shared", "native")


def make_collective(name: str, topology: Topology) -> Any:
    """Return the collectives called `name` over all ranks.

    Collective over `topology.comm`. Raises ConfigError when there are none of that name, SharedUnavailable (on all
    ranks) where node memory cannot be used.
    """
    if name not in COLLECTIVES:
        raise ConfigError(f"sync = {name!r} is not known (legal: auto, {', '.join(COLLECTIVES)}).")
    if name == "shared":
        return Shared(topology)
    if name == "ring":
        return Ring(topology.comm)
    from hpcmlp.comm.native import Native  # few runs want it; every module costs each rank file-system calls
    return Native(topology.comm)


@dataclass
class Exchange:
    """Collectives with the two flat vectors that they serve best.

    `params` is meant for what all ranks hold alike (one copy per node in shared memory, unless `own_params`), `grads`
    is this rank's own. `note` says why another algorithm than the one asked for was taken; "" when it was not.
    """

    name: str
    collective: Any
    params: np.ndarray
    grads: np.ndarray
    note: str = ""


def open_exchange(name: str, topology: Topology, size: int, dtype: Any, own_params: bool = False) -> Exchange:
    """Return collectives and zeroed flat vectors of `size` elements.

    Collective over `topology.comm`. `name` may be "auto": node memory where several ranks share a node, else the ring.
    Where node memory is not to be had the ring is taken, and `note` says why.
    """
    note = ""
    if name == "shared" or (name == "auto" and topology.size > topology.num_nodes):
        try:
            shared = Shared(topology)
            return Exchange("shared", shared, *_vectors(shared, size, dtype, own_params))
        except SharedUnavailable as why:
            note = f"sync ring instead of shared: {why}"
    name = "ring" if name in ("auto", "shared") else name
    collective = make_collective(name, topology)
    return Exchange(name, collective, *_vectors(collective, size, dtype, own_params), note)


def _vectors(collective: Any, size: int, dtype: Any, own_params: bool) -> tuple[np.ndarray, np.ndarray]:
    params = collective.empty(size, dtype) if own_params else collective.common(size, dtype)
    return params, collective.empty(size, dtype)
