"""Which rows go to training, validation and test, and in which order: functions of the seed alone."""

import numpy as np

SPLITS = ("train", "val", "test")


def assign(given: np.ndarray, strata: np.ndarray | None, val_fraction: float, test_fraction: float,
           seed: int) -> dict[str, np.ndarray]:
    """Return for each split its rows, in shuffled order.

    Local: every rank computes the same. Rows are int64 positions in `given`. Memory: about 40 bytes a row.

    The test split is the source's own where it has one, else `test_fraction` of the rows; validation likewise, else
    `val_fraction` of the training rows that are left. Counts are rounded to the nearest, and with `strata` each class's
    share differs from its due by less than one row.

    Parameters
    ----------
    given : (n,) int8, 0 to 2 where the source says train, val, test; -1 where it leaves that open
    strata : (n,) class numbers, or None
    """
    random = np.random.Generator(np.random.Philox(key=[seed, 0x73706C69]))
    rows = {split: np.flatnonzero(given == k) for k, split in enumerate(SPLITS)}
    left = np.flatnonzero(given < 0)
    if left.size:
        left, test = _take(left, strata, test_fraction, random)
        rows["train"] = np.concatenate([rows["train"], left])
        rows["test"] = np.concatenate([rows["test"], test])
    if not rows["val"].size:
        rows["train"], rows["val"] = _take(rows["train"], strata, val_fraction, random)
    return {split: random.permutation(rows[split]) for split in SPLITS}


def _take(rows: np.ndarray, strata: np.ndarray | None, fraction: float,
          random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(rest, taken): every so-many-th row of a random order that is sorted by class."""
    count = int(rows.size * fraction + 0.5)
    rows = random.permutation(rows)
    if not count:
        return rows, rows[:0]
    if strata is not None:
        rows = rows[np.argsort(strata[rows], kind="stable")]
    due = (np.arange(rows.size + 1, dtype=np.int64) * count + int(random.integers(rows.size))) // rows.size
    taken = due[1:] > due[:-1]
    return rows[~taken], rows[taken]


def shard_bounds(num_rows: int, shards: int) -> list[int]:
    """Return where the shards of a split begin and end: even to one row, never more shards than rows. Local."""
    count = max(1, min(shards, num_rows))
    return [num_rows * k // count for k in range(count + 1)]


def shards_of(rows: dict[str, int], shards: int) -> dict[str, list[int]]:
    """Return the shard bounds of each split that has rows: `shards` for training, the others in proportion. Local."""
    out = {}
    for split, count in rows.items():
        if count:
            wanted = shards if split == "train" else max(1, round(shards * count / max(1, rows["train"])))
            out[split] = shard_bounds(count, min(wanted, shards))
    return out
