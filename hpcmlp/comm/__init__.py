"""Arrays between ranks: topology, collectives by our ring, by node memory or by the MPI library."""

from dataclasses import dataclass
from functools import partial
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
    is this rank's own. `wire` is what crosses the network. `note` says what is not as it was asked for, and why; ""
    when all is.
    """

    name: str
    collective: Any
    params: np.ndarray
    grads: np.ndarray
    wire: str = "float32"
    note: str = ""


def make_ring(comm: Any, wire: str = "float32", **options: Any) -> Ring:
    """Return the ring that sends float32 arrays as `wire`, one of `comm.wire.WIRES`.

    Collective over `comm`. `options` are those of `Ring` and, for narrow wires, of `WireRing`.
    """
    if wire == "float32":
        return Ring(comm, **options)
    from hpcmlp.comm.ring_wire import WireRing  # few runs want it
    return WireRing(comm, wire, **options)


def check_wire(sync: str, wire: str) -> None:
    """Raise ConfigError when numbers cannot be narrowed to `wire` with `sync`. Local.

    Only our ring does the additions itself: MPI's operations take float32.
    """
    if wire != "float32" and sync in ("native", "server"):
        raise ConfigError(f"--wire {wire} has no effect with --sync {sync}: only our own ring sends narrow numbers; "
                          "give --sync auto, shared or ring, or use --wire float32.")


def open_exchange(name: str, topology: Topology, size: int, dtype: Any, own_params: bool = False,
                  wire: str = "float32", servers: int = 1) -> Exchange:
    """Return collectives and zeroed flat vectors of `size` elements.

    Collective over `topology.comm`. `name` may be "auto": node memory where several ranks share a node, else the ring.
    Where node memory is not to be had the ring is taken. A `wire` other than "float32" is that of the ring, between
    nodes or between all ranks; where there are no messages between ranks it is float32 after all, so that one
    configuration serves one node and many. `note` says so. Raises ConfigError for an unknown name, or a wire with
    "native" or "server". `servers` counts for "server" alone.
    """
    check_wire(name, wire)
    if name == "server":
        from hpcmlp.comm.served import Served  # few runs want it
        collective = Served(topology.comm, servers)
        return Exchange(name, collective, *_vectors(collective, size, dtype, own_params), wire)
    note = ""
    if name == "shared" or (name == "auto" and topology.size > topology.num_nodes):
        narrow, shared = wire if topology.num_nodes > 1 else "float32", None
        try:
            shared = Shared(topology, partial(make_ring, wire=narrow))
            return Exchange("shared", shared, *_vectors(shared, size, dtype, own_params), narrow,
                            "" if narrow == wire else _idle(wire, "all ranks share one node"))
        except SharedUnavailable as why:
            note = f"sync ring instead of shared: {why}"
        if shared is not None:
            shared.free()       # it may hold one of the two vectors
    name = "ring" if name in ("auto", "shared") else name
    if topology.size == 1 and wire != "float32":
        note, wire = _idle(wire, "there is one rank"), "float32"
    collective = make_ring(topology.comm, wire) if name == "ring" else make_collective(name, topology)
    return Exchange(name, collective, *_vectors(collective, size, dtype, own_params), wire, note)


def _idle(wire: str, why: str) -> str:
    return f"wire {wire} has nothing to act on: {why}, so no gradient crosses a network"


def _vectors(collective: Any, size: int, dtype: Any, own_params: bool) -> tuple[np.ndarray, np.ndarray]:
    params = collective.empty(size, dtype) if own_params else collective.common(size, dtype)
    return params, collective.empty(size, dtype)
