"""Cut the flat gradient into buckets, and every bucket into one part per rank.

Buckets follow the backward pass: the first holds the last layers. A bucket closes when it has reached
`bucket_bytes`; it always ends where backward closes a range (at the start of a layer's tensors, or of a piece of its
weight), so that it is final as soon as backward has been there. Each rank owns one part of every bucket; together its
parts are the rank's slice of the flat vector. Part boundaries are multiples of 16 elements (64 bytes of float32), so
that no two ranks ever write one cache line.
"""

from dataclasses import dataclass

import numpy as np

ALIGN = 16
PACK = 128


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


def cut(size_total: int, starts: list[int], bucket_elements: int, size: int, first_stop: int = 0,
        first_elements: int = 1) -> list[Bucket]:
    """Cut a flat vector of `size_total` elements into buckets in the order in which backward closes them.

    Local.

    Parameters
    ----------
    starts : where layers begin, ascending from 0: backward makes the gradient final from the last of them on.
    bucket_elements : a bucket is closed as soon as it holds this many elements.
    size : ranks.
    first_stop, first_elements : a bucket that ends at or before `first_stop` closes with `first_elements` already: what
        backward finishes last, and the next forward pass needs first, is not hidden behind anything.
    """
    buckets, stop = [], size_total
    for start in reversed(starts):
        least = first_elements if stop <= first_stop else bucket_elements
        if stop - start >= least or start == 0:
            if stop > start:
                buckets.append(Bucket(start, stop, part_bounds(stop - start, size)))
            stop = start
    return buckets


def cut_evenly(size_total: int, bucket_mb: float, size: int) -> list[Bucket]:
    """Cut a flat float32 vector into buckets of `bucket_mb` MiB, last elements first, wherever layers begin.

    Local. For gradients that are all final before the first bucket is sent; for devices a bucket has whole packs of
    `PACK` elements.
    """
    elements = max(PACK, int(bucket_mb * 2**20) // 4 // PACK * PACK)
    return cut(size_total, list(range(0, size_total, elements)), elements, size)


def owned_ranges(buckets: list[Bucket], part: int) -> list[tuple[int, int]]:
    """Return the (start, stop) ranges of the flat vector that belong to `part`, ascending and not empty. Local."""
    ranges = [(b.start + int(b.bounds[part]), b.start + int(b.bounds[part + 1])) for b in buckets]
    return sorted(r for r in ranges if r[1] > r[0])
