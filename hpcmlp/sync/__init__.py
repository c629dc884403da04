"""Keep the replicas of all ranks equal: joins the mathematics and the communication."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpcmlp.nn.network import FIRST_LAYER
from hpcmlp.sync.buckets import Bucket, cut
from hpcmlp.sync.strategy import SlicedUpdate, WholeUpdate

BUCKET_MB = 32.0    # where nothing overlaps: most networks are one message
STAGED_MB = 8.0     # where buckets are copied between a device and the host beside each other's messages


def make_strategy(whole: bool, narrow: bool = False, overlap: bool = False) -> Callable[..., SlicedUpdate]:
    """Return the class of the strategy: WholeUpdate when `whole`, else NarrowUpdate when `narrow`, else SlicedUpdate.

    Local. `narrow` as the collective's attribute says. With `whole` the summed gradient is gathered in float32, and
    nothing overlaps. `overlap` makes messages travel while the ranks compute.
    """
    if whole:
        return WholeUpdate
    kind = SlicedUpdate
    if narrow:
        from hpcmlp.sync.narrow import NarrowUpdate  # few runs want it
        kind = NarrowUpdate
    if overlap:
        from hpcmlp.sync.overlap import Overlapped  # runs on several nodes
        return Overlapped if kind is SlicedUpdate else type("OverlappedNarrow", (Overlapped, kind), {})
    return kind


@dataclass(frozen=True)
class Plan:
    """How a step's gradient is cut, and whether messages travel while the ranks compute.

    `piece` is for `nn.network.Network`: elements of a piece of a weight, None for whole weights. `bucket_mb` is what
    was given or found.
    """

    buckets: list[Bucket]
    piece: int | None
    overlap: bool
    bucket_mb: float


def plan(spec: Any, collective: Any, size: int, num_nodes: int, bucket_mb: float | None = None,
         overlap: bool | None = None) -> Plan:
    """Return the plan of a step.

    Collective where it overlaps and `bucket_mb` is None: then the links between the nodes are measured.

    Parameters
    ----------
    spec : `nn.network.NetworkSpec`.
    collective : what the gradient goes through; one that cannot start something does not overlap.
    size, num_nodes : ranks, and nodes that they are on.
    bucket_mb : size of a bucket, MiB; None: `BUCKET_MB`, and with overlap as the links have it.
    overlap : None: between nodes, where there is more than one bucket.
    """
    total = spec.layout().size
    if size > 1 and collective.starts and (num_nodes > 1 if overlap is None else overlap):
        from hpcmlp.sync.overlap import find_bucket_mb
        found = bucket_mb or find_bucket_mb(collective)
        piece = _elements(found)
        first_stop = spec.layer_starts()[1] if spec.num_layers > 1 else 0
        buckets = cut(total, spec.closings(piece), piece, size, first_stop, -(-piece // FIRST_LAYER))
        if overlap or len(buckets) > 1:
            return Plan(buckets, piece, True, found)
    bucket_mb = bucket_mb or BUCKET_MB
    return Plan(cut(total, spec.layer_starts(), _elements(bucket_mb), size), None, False, bucket_mb)


def _elements(bucket_mb: float) -> int:
    return max(1, int(bucket_mb * 2**20) // 4)
