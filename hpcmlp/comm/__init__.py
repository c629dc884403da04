"""Arrays between ranks: topology, collectives by our ring, by node memory or by the MPI library."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from hpcmlp.comm.ring import Ring
from hpcmlp.comm.shared import Shared, SharedUnavailable
from hpcmlp.comm.topology import Topology
from hpcmlp.errors import ConfigError
from hpcmlp.traffic import DEVICE_SEGMENT_BYTES, check_wire, segment_bytes, small_limit

COLLECTIVES = ("ring", "shared", "native")    # those that need no further choice


class Collective(Protocol):
    """What every way of adding and copying arrays between ranks does; each class says where it does otherwise.

    Arrays are 1-D, contiguous, float32 or float64, of the same length and dtype on all ranks. `bounds` are (size+1,)
    ascending element offsets, the same on all ranks, of one part per rank; parts may be empty. `words` are (W,) float64
    or None, and are summed over the ranks, with the same bits on all of them. Results stand in place. All methods are
    collective over the ranks that it was made for, but those that are called local.

    Attributes
    ----------
    part : which part of the bounds this rank gets; its rank, where memory of the node sets no other order.
    starts : whether there are `start_reduce_scatter` and `start_all_gather`, which return at once, to `wait()` for.
    narrow : whether float32 arrays are rounded on their way: then there are `gather_towards` and `settle`.
    threads : whether another thread may call `advance`, in turn.
    bytes_sent : by this rank so far, in reductions and gatherings; None where the MPI library sends by its own rules.
    """

    part: int
    starts: bool
    narrow: bool
    threads: bool
    bytes_sent: int | None

    def empty(self, size: int, dtype: Any) -> np.ndarray:
        """Return a zeroed (size,) array of this rank, 64-byte aligned, that the methods handle well."""

    def common(self, size: int, dtype: Any) -> np.ndarray:
        """Return a zeroed (size,) array for what is the same on all ranks: once per node where they share memory."""

    def reduce_scatter(self, array: np.ndarray, bounds: Sequence[int] | np.ndarray,
                       words: np.ndarray | None = None) -> None:
        """Sum over the ranks; this rank gets the sum of part `part`, `array[bounds[part]:bounds[part+1]]`.

        What lies between the bounds but outside the own part holds partial sums or anything afterwards.
        """

    def all_gather(self, array: np.ndarray, bounds: Sequence[int] | np.ndarray) -> None:
        """Copy every rank's part to all ranks."""

    def all_reduce(self, array: np.ndarray, words: np.ndarray | None = None) -> None:
        """Replace `array` by its sum over the ranks, with the same bits on all of them."""

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """Copy `array` (contiguous, any dtype) of rank `root` to all ranks."""

    def free(self) -> None:
        """Give everything back: communicators, memory of the node, prepared messages."""


def make_collective(name: str, topology: Topology) -> Collective:
    """Return the collectives called `name` over all ranks.

    Collective over `topology.comm`. Raises ConfigError when there are none of that name, SharedUnavailable (on all
    ranks) where node memory cannot be used.
    """
    if name not in COLLECTIVES:
        raise ConfigError(f"sync = {name!r} is not known (legal: auto, {', '.join(COLLECTIVES)}).")
    if name == "shared":
        return Shared(topology)
    if name == "ring":
        return _ring_of_all(topology)
    from hpcmlp.comm.native import Native  # few runs want it; every module costs each rank file-system calls
    return Native(topology.comm)


@dataclass
class Exchange:
    """Collectives with the two flat vectors that they serve best.

    `params` is meant for what all ranks hold alike (one copy per node in shared memory, unless `own_params`), `grads`
    is this rank's own. `wire` is what crosses the network. `note` says what is not as it was asked for, and why; ""
    when all is. `why` is why these collectives were taken, "" when they were asked for by name; or how a server gets
    and gives.
    """

    name: str
    collective: Collective
    params: np.ndarray
    grads: np.ndarray
    wire: str = "float32"
    note: str = ""
    why: str = ""


def make_ring(comm: Any, wire: str = "float32", **options: Any) -> Ring:
    """Return the ring that sends float32 arrays as `wire`, one of `comm.wire.WIRES`.

    Collective over `comm`. `options` are those of `Ring` and, for narrow wires, of `WireRing`.
    """
    if wire == "float32":
        return Ring(comm, **options)
    from hpcmlp.comm.ring_wire import WireRing  # few runs want it
    return WireRing(comm, wire, **options)


def _ring_of_all(topology: Topology, wire: str = "float32", by_layer: bool = False) -> Ring:
    one_node = topology.num_nodes == 1
    return make_ring(topology.comm, wire, small_bytes=small_limit(topology.size, one_node),
                     segment_bytes=segment_bytes(one_node, by_layer))


def rule(topology: Topology, wire: str = "float32") -> tuple[str | None, str]:
    """Return the collectives known to suit the topology best, and why; None where only a trial can tell. Local.

    On one node nothing beats node memory, whatever the size: no other way moves as few bytes or has as few
    synchronisations. Between nodes it depends on sizes, network and MPI library.
    """
    if topology.size == 1:
        return "ring", "one rank"
    if topology.num_nodes == 1:
        return "shared", "one node"
    if wire != "float32":   # only ours send it
        return ("shared", "ranks share nodes") if topology.size > topology.num_nodes else ("ring", "one rank per node")
    return None, ""


def open_exchange(name: str, topology: Topology, size: int, dtype: Any, own_params: bool = False,
                  wire: str = "float32", servers: int = 1, in_step: bool = True, overlap: bool | None = False,
                  by_layer: bool = False) -> Exchange:
    """Return collectives and zeroed flat vectors of `size` elements.

    Collective over `topology.comm`. `name` may be "auto": by `rule`, or else the fastest in a short trial with vectors
    of this size (`comm.choice`); all ranks take the same. Where node memory is not to be had the ring is taken, or the
    trial goes on without it. A `wire` other than "float32" is that of the ring, between nodes or between all ranks;
    where there are no messages between ranks it is float32 after all, so that one configuration serves one node and
    many. `note` says so, `why` why "auto" took what it took, or how a server gets and gives. Raises ConfigError for an
    unknown name, or a wire with "native" or "server". `servers` and `in_step` count for "server" alone: on one node it
    works in node memory, but where its workers are not in step. With `overlap` "auto" takes only what can be under way
    while the ranks compute (a collective's `starts`); None lets that count in the trial.
    """
    check_wire(name, wire)
    taken, why, note = *(rule(topology, wire) if name == "auto" else (name, "")), ""

    def make(which: str, elements: int, on_node: bool = False) -> Exchange:
        return _open(which, topology, elements, dtype, own_params, wire, servers, on_node, by_layer)

    if taken == "server" and in_step and topology.num_nodes == 1 and topology.size > 1:
        try:
            return make("server", size, on_node=True)
        except SharedUnavailable as reason:
            note = f"sync server by messages instead of node memory: {reason}"

    if taken == "shared":
        try:
            exchange = make("shared", size)
        except SharedUnavailable as reason:
            taken = None if name == "auto" and wire == "float32" else "ring"
            why, note = "", f"sync {taken or 'ring or native'} instead of shared: {reason}"
        else:
            exchange.why = why
            return exchange
    if taken is None:
        from hpcmlp.comm.choice import fastest  # on one node nobody needs it
        names = ("shared",) if topology.size > topology.num_nodes and not note else ()
        names += ("ring",) if overlap else ("ring", "native")
        taken, why = ("ring", "one rank per node") if len(names) == 1 else \
            fastest(make, names, topology.comm, size, hides=overlap is not False)
    exchange = make(taken, size)
    exchange.why, exchange.note = why or exchange.why, note or exchange.note
    return exchange


def open_direct(topology: Topology, size: int, dtype: Any, sums: Any) -> Exchange:
    """Return the ring that sends straight from and into the memory of devices, whose `sums` add there.

    Collective over `topology.comm`. The vectors of `size` elements are the host's, for what is gathered between steps.
    """
    ring = make_ring(topology.comm, segment_bytes=DEVICE_SEGMENT_BYTES, device=sums,
                     small_bytes=small_limit(topology.size, topology.num_nodes == 1))
    return Exchange("direct", ring, *_vectors(ring, size, dtype, True))


def _open(name: str, topology: Topology, size: int, dtype: Any, own_params: bool, wire: str, servers: int,
          on_node: bool, by_layer: bool) -> Exchange:
    """Open what is called `name` and nothing else; where node memory is not to be had nothing stays allocated."""
    note = why = ""
    if wire != "float32" and (topology.size == 1 or name == "shared" and topology.num_nodes == 1):
        note, wire = _idle(wire, "there is one rank" if topology.size == 1 else "all ranks share one node"), "float32"
    if name == "shared":
        collective: Collective = Shared(topology, partial(make_ring, wire=wire, segment_bytes=segment_bytes(False)))
    elif name == "server":
        collective, why = _open_served(topology, servers, on_node)
    else:
        collective = _ring_of_all(topology, wire, by_layer) if name == "ring" else make_collective(name, topology)
    try:
        return Exchange(name, collective, *_vectors(collective, size, dtype, own_params), wire, note, why)
    except SharedUnavailable:
        collective.free()       # it may hold one of the two vectors
        raise


def _open_served(topology: Topology, servers: int, on_node: bool) -> tuple[Collective, str]:
    """Return push and pull, and how they go."""
    if on_node:
        from hpcmlp.comm.served_node import ServedOnNode  # few runs want either
        return ServedOnNode(topology, servers), "in node memory"
    from hpcmlp.comm.served import Served
    return Served(topology.comm, servers), "by messages"


def _idle(wire: str, why: str) -> str:
    return f"wire {wire} has nothing to act on: {why}, so no gradient crosses a network"


def _vectors(collective: Collective, size: int, dtype: Any, own_params: bool) -> tuple[np.ndarray, np.ndarray]:
    params = collective.empty(size, dtype) if own_params else collective.common(size, dtype)
    return params, collective.empty(size, dtype)
