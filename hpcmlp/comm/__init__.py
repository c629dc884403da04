"""Arrays between ranks: topology, collectives by our ring, by node memory or by the MPI library."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcmlp.comm.ring import Ring
from hpcmlp.comm.shared import Shared, SharedUnavailable
from hpcmlp.comm.topology import Topology
from hpcmlp.errors import ConfigError

COLLECTIVES = ("ring", "shared", "native")    # those that need no further choice


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


def make_ring(comm: Any, wire: str = "float32", **options: Any) -> Ring:
    """Return the ring that sends gradients as `wire`, one of `comm.wire.WIRES`.

    Collective over `comm`. `options` are those of `Ring` and, for narrow wires, of `WireRing`.
    """
    if wire == "float32":
        return Ring(comm, **options)
    from hpcmlp.comm.ring_wire import WireRing  # few runs want it
    return WireRing(comm, wire, **options)


def check_wire(sync: str, wire: str) -> None:
    """Raise ConfigError when gradients cannot be narrowed to `wire` with `sync`. Local.

    Only our ring does the additions itself: MPI's operations and sums over node memory take float32.
    """
    if wire != "float32" and sync not in ("auto", "ring"):
        raise ConfigError(f"--wire {wire} has no effect with --sync {sync}: only the ring sends narrow numbers; give "
                          "--sync ring, leave --sync out, or use --wire float32.")


def open_exchange(name: str, topology: Topology, size: int, dtype: Any, own_params: bool = False,
                  wire: str = "float32", servers: int = 1) -> Exchange:
    """Return collectives and zeroed flat vectors of `size` elements.

    Collective over `topology.comm`. `name` may be "auto": node memory where several ranks share a node, else the ring.
    Where node memory is not to be had the ring is taken, and `note` says why. A `wire` other than "float32" makes
    "auto" the ring; raises ConfigError where it cannot take effect. `servers` counts for "server" alone.
    """
    check_wire(name, wire)
    if name == "server":
        from hpcmlp.comm.served import Served  # few runs want it
        collective = Served(topology.comm, servers)
        return Exchange(name, collective, *_vectors(collective, size, dtype, own_params))
    note = ""
    if wire != "float32":
        name = "ring"
    if name == "shared" or (name == "auto" and topology.size > topology.num_nodes):
        try:
            shared = Shared(topology)
            return Exchange("shared", shared, *_vectors(shared, size, dtype, own_params))
        except SharedUnavailable as why:
            note = f"sync ring instead of shared: {why}"
    name = "ring" if name in ("auto", "shared") else name
    collective = make_ring(topology.comm, wire) if name == "ring" else make_collective(name, topology)
    return Exchange(name, collective, *_vectors(collective, size, dtype, own_params), note)


def _vectors(collective: Any, size: int, dtype: Any, own_params: bool) -> tuple[np.ndarray, np.ndarray]:
    params = collective.empty(size, dtype) if own_params else collective.common(size, dtype)
    return params, collective.empty(size, dtype)
