"""Sums of float64 words that have the same bits in whatever order the ranks add.

In a ring every part of an array travels another way round, and the control words travel with every part: plain
floating sums would differ in their last bits from rank to rank, and so would decisions taken on them. So each word is
cut into BINS pieces, multiples of 2**24, 2**-13, 2**-50 and 2**-87, of at most 37 bits each. Up to 2**15 such pieces
add without rounding in a float64, so their order does not matter; only `join` rounds, alike everywhere.
Two ranks need none of this: a + b == b + a. After J. Demmel, H. D. Nguyen, "Fast Reproducible Floating-Point
Summation", ARITH 2013, with bins fixed in advance.
"""

import numpy as np

QUANTA = (2.0**24, 2.0**-13, 2.0**-50, 2.0**-87)
# Adding and subtracting 1.5 * 2**52 quanta rounds to a multiple of the quantum.
ROUNDERS = tuple(1.5 * 2.0**52 * quantum for quantum in QUANTA)


def num_bins(size: int) -> int:
    """Return how many float64 one word takes on the wire between `size` ranks. Local."""
    return 1 if size <= 2 else len(QUANTA)


def split(words: np.ndarray, bins: np.ndarray) -> None:
    """Write the pieces of `words` (W,) float64 into `bins` (num_bins, W); sums of `bins` are exact.

    Local. Exact sums hold for magnitudes up to 2**61; what is smaller than 2**-88 is lost. Infinities and NaN come
    out of `join` as NaN.
    """
    if len(bins) == 1:
        bins[0] = words
        return
    rest = words
    for rounder, piece in zip(ROUNDERS, bins, strict=True):
        np.add(rest, rounder, piece)
        np.subtract(piece, rounder, piece)
        rest = rest - piece     # exact; not written into `bins`, whose next row is still to be made from it


def join(bins: np.ndarray, words: np.ndarray) -> None:
    """Write the rounded sums of `bins` (num_bins, W) into `words` (W,); largest pieces first on all ranks. Local."""
    words[:] = bins[0]
    for piece in bins[1:]:
        np.add(words, piece, words)
