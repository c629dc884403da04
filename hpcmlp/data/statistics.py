"""Statistics of the training rows, the same bits at any rank count.

Rows are cut into fixed blocks of the raw table; each block's count, mean, squared deviations and range are taken in
float64 by two passes over the block, and blocks are merged in their order (T. F. Chan, G. H. Golub, R. J. LeVeque,
Updating formulae and a pairwise algorithm for computing sample variances, 1979). Which rank did which block does not
matter. Quantiles are exact: they come from all values of a column. 8-bit pixels are counted, so everything is exact.
"""

from dataclasses import dataclass

import numpy as np

BLOCK_ROWS = 4096
NORMALIZATIONS = ("standard", "min-max", "robust", "none")


@dataclass(frozen=True)
class Moments:
    """Per column: how many finite values, mean, sum of squared deviations, least and greatest. Each (d,) float64."""

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the values themselves (divided by n, not n - 1)."""
        return np.sqrt(self.squares / np.maximum(self.count, 1.0))


def rows_of_rank(num_rows: int, rank: int, size: int) -> tuple[int, int]:
    """Return the rows (start, stop) of a raw table that `rank` reads: whole blocks, as even as they go. Local."""
    blocks = -(-num_rows // BLOCK_ROWS)
    bounds = [min(num_rows, (blocks * r // size) * BLOCK_ROWS) for r in (rank, rank + 1)]
    return bounds[0], num_rows if rank == size - 1 else bounds[1]


def block_moments(values: np.ndarray | list[np.ndarray], rows: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Return the moments of each block that holds rows of this rank.

    Local. Values that are not finite are left out.

    Parameters
    ----------
    values : (n, d), or a list of d columns (n,)
    rows : (n,) their row numbers in the raw table, ascending; they say which block a row belongs to
    use : (n,) bool, which rows count (training rows)

    Returns
    -------
    (blocks, 5, d) float64, rows as the fields of `Moments`
    """
    width = len(values) if isinstance(values, list) else values.shape[1]
    of = rows // BLOCK_ROWS
    starts = np.flatnonzero(np.diff(of, prepend=-1)).tolist() + [len(rows)]
    out = np.empty((len(starts) - 1, 5, width))
    for k, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        used = use[start:stop]
        block = np.empty((int(used.sum()), width))
        if isinstance(values, list):
            for column, v in enumerate(values):
                block[:, column] = v[start:stop][used]
        else:
            block[:] = values[start:stop][used]
        with np.errstate(over="ignore", invalid="ignore"):             # numbers near the end of float64's range
            out[k] = _moments_of(block)
    return out


def _moments_of(block: np.ndarray) -> np.ndarray:
    """(5, d) moments of one contiguous (n, d) block; empty ones count 0 with an inside-out range."""
    out = np.zeros((5, block.shape[1]))
    out[3], out[4] = np.inf, -np.inf
    if not block.size:
        return out
    fine = np.isfinite(block)
    if fine.all():
        out[0] = block.shape[0]
        out[1] = block.sum(axis=0) / out[0]
        out[3], out[4] = block.min(axis=0), block.max(axis=0)
        block -= out[1]
    else:
        out[0] = fine.sum(axis=0)
        out[1] = np.where(fine, block, 0.0).sum(axis=0) / np.maximum(out[0], 1.0)
        out[3] = np.where(fine, block, np.inf).min(axis=0)
        out[4] = np.where(fine, block, -np.inf).max(axis=0)
        block = np.where(fine, block - out[1], 0.0)
    # what rounding left in the mean, and its share of the squares
    rest = block.sum(axis=0) / np.maximum(out[0], 1.0)
    out[1] += rest
    out[2] = np.maximum(np.square(block, out=block).sum(axis=0) - out[0] * rest * rest, 0.0)
    return out


def merge_moments(blocks: np.ndarray) -> Moments:
    """Return the moments of all blocks (blocks, 5, d), merged in their order. Local."""
    width = blocks.shape[2]
    count, mean, squares = np.zeros(width), np.zeros(width), np.zeros(width)
    for n, m, s, _, _ in blocks:
        total = count + n
        share = np.divide(n, total, out=np.zeros(width), where=total > 0)
        with np.errstate(over="ignore", invalid="ignore"):
            delta = m - mean
            mean = mean + delta * share
            squares = squares + s + delta * delta * count * share
        count = total
    low = blocks[:, 3].min(axis=0, initial=np.inf)
    high = blocks[:, 4].max(axis=0, initial=-np.inf)
    return Moments(count, mean, squares, low, high)


def quantiles(values: np.ndarray, which: tuple[float, ...] = (0.25, 0.5, 0.75)) -> list[float]:
    """Return exact quantiles of 1-D finite values, linear between neighbours; zeros when there are none.

    Local. The order of the values does not matter, not even to the last bit.
    """
    if not values.size:
        return [0.0] * len(which)
    ordered = np.sort(values.astype(np.float64))
    places = [q * (ordered.size - 1) for q in which]
    low = [int(p) for p in places]
    return [float(ordered[k] + (ordered[min(k + 1, ordered.size - 1)] - ordered[k]) * (p - k))
            for p, k in zip(places, low, strict=True)]


def histogram(values: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Return how often each pixel value stands in the rows that count: (256,) int64 of a (n, d) uint8. Local."""
    counts = np.zeros(256, np.int64)
    for start in range(0, values.shape[0], BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        block = values[rows] if use[rows].all() else values[rows][use[rows]]
        counts += np.bincount(block.reshape(-1), minlength=256)
    return counts


def histogram_moments(counts: np.ndarray) -> tuple[Moments, list[float]]:
    """Return moments and quartiles of counted pixels, as of one column; exact but for the last rounding. Local."""
    numbers = [int(n) for n in counts]
    total = sum(numbers)
    if not total:
        zero = np.zeros(1)
        return Moments(zero, zero, zero, zero, zero), [0.0, 0.0, 0.0]
    first = sum(k * n for k, n in enumerate(numbers))
    second = sum(k * k * n for k, n in enumerate(numbers))
    used = np.flatnonzero(counts)
    moments = Moments(*(np.array([float(v)]) for v in (total, first / total, (second * total - first**2) / total,
                                                         used[0], used[-1])))
    ends = np.cumsum(counts)
    quartiles = []
    for q in (0.25, 0.5, 0.75):
        place = q * (total - 1)
        below, above = (int(np.searchsorted(ends, int(place) + k, side="right")) for k in (0, 1))
        quartiles.append(below + (min(above, 255) - below) * (place - int(place)))
    return moments, quartiles


def scaling(kind: str, moments: Moments, quartiles: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (shift, scale), each (d,) float64, so that (x - shift) * scale is normalised.

    Local. Constant columns get scale 1. `robust` takes median and interquartile range (`quartiles` (3, d)); where the
    range is 0 though values differ, the standard deviation.
    """
    width = moments.mean.size
    constant = ~(moments.high > moments.low)
    if kind == "none":
        return np.zeros(width), np.ones(width)
    if kind == "standard":
        shift, spread = moments.mean, moments.std
    elif kind == "min-max":
        with np.errstate(over="ignore", invalid="ignore"):
            shift, spread = moments.low, moments.high - moments.low
    else:
        shift, spread = quartiles[1], quartiles[2] - quartiles[0]
        spread = np.where(spread > 0, spread, moments.std)
    shift = np.where(constant, moments.low, shift)
    shift = np.where(np.isfinite(shift), shift, 0.0)
    fine = ~constant & np.isfinite(spread) & (spread > 1e-300)
    return shift, np.divide(1.0, spread, out=np.ones(width), where=fine)
