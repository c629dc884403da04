"""Cut the flat gradient into buckets, and every bucket into one part per rank.

Buckets follow the backward pass: the first holds the last layers. A bucket closes when it has reached
`bucket_bytes`; it always ends where backward closes a range (at the start of a layer's tensors, or of a piece of its
weight), so that it is final as soon as backward has been there. Each rank owns one part of every bucket; together its parts are the rank's slice of the
flat vector. Part boundaries are multiples of 16 elements (64 bytes of float32), so that no two ranks ever write
one cache line.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

ALIGN = 16
BUCKET_MB = 32.0    # where nothing overlaps: most networks are one message


@dataclass(frozen=True)
class Bucket:
    """The elements [start, stop) of the flat vector, cut at `bounds` into one part per rank.

    `bounds` (size + 1,) int64 holds offsets into the bucket, from 0 to stop - start.
    """

    start: int
    stop: int
    bounds: np.ndarray


def part_bounds(length: int, size: int) -> np.ndarray:
    """Return (size + 1,) int64 offsets that cut `length` elements into `size` nearly equal aligned parts.

    Local. Parts may be empty when there are fewer than 16 elements per rank.
    """
    blocks = -(-length // ALIGN)
    bounds = np.arange(size + 1, dtype=np.int64) * blocks // size * ALIGN
    bounds[-1] = length
    return np.minimum(bounds, length)


def cut(size_total: int, starts: list[int], bucket_elements: int, size: int) -> list[Bucket]:
    """Cut a flat vector of `size_total` elements into buckets in the order in which backward closes them.

    Local.

    Parameters
    ----------
    starts : where layers begin, ascending from 0: backward makes the gradient final from the last of them on.
    bucket_elements : a bucket is closed as soon as it holds this many elements.
    size : ranks.
    """
    buckets, stop = [], size_total
    for start in reversed(starts):
        if stop - start >= bucket_elements or start == 0:
            if stop > start:
                buckets.append(Bucket(start, stop, part_bounds(stop - start, size)))
            stop = start
    return buckets


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
        from hpcmlp.sync.overlap import find_bucket_mb  # runs on several nodes
        found = bucket_mb or find_bucket_mb(collective)
        piece = _elements(found)
        buckets = cut(total, spec.closings(piece), piece, size)
        if overlap or len(buckets) > 1:
            return Plan(buckets, piece, True, found)
    bucket_mb = bucket_mb or BUCKET_MB
    return Plan(cut(total, spec.layer_starts(), _elements(bucket_mb), size), None, False, bucket_mb)


def _elements(bucket_mb: float) -> int:
    return max(1, int(bucket_mb * 2**20) // 4)


def owned_ranges(buckets: list[Bucket], part: int) -> list[tuple[int, int]]:
    """Return the (start, stop) ranges of the flat vector that belong to `part`, ascending and not empty. Local."""
    ranges = [(b.start + int(b.bounds[part]), b.start + int(b.bounds[part + 1])) for b in buckets]
    return sorted(r for r in ranges if r[1] > r[0])
