"""Splits hold every row once, keep a source's own test rows, and give each class its share."""

import numpy as np
import pytest

from hpcmlp.data.splits import SPLITS, assign, shard_bounds, shards_of


@pytest.mark.parametrize("n", [1, 2, 3, 10, 101, 5000])
@pytest.mark.parametrize("fractions", [(0.0, 0.0), (0.1, 0.2), (0.5, 0.5), (0.99, 0.99)])
def test_every_row_is_in_one_split_and_counts_are_rounded(n, fractions):
    val, test = fractions
    rows = assign(np.full(n, -1, np.int8), None, val, test, seed=3)
    assert sorted(np.concatenate([rows[s] for s in SPLITS]).tolist()) == list(range(n))
    assert rows["test"].size == int(n * test + 0.5)
    assert rows["val"].size == int((n - rows["test"].size) * val + 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_each_class_has_its_share_to_less_than_one_row(seed):
    strata = np.random.default_rng(seed).choice(6, 3001, p=[0.5, 0.3, 0.1, 0.07, 0.028, 0.002])
    rows = assign(np.full(3001, -1, np.int8), strata, 0.1, 0.2, seed)
    left = np.bincount(strata, minlength=6)
    for split, whole in (("test", 3001), ("val", 3001 - rows["test"].size)):
        got = np.bincount(strata[rows[split]], minlength=6)
        assert (np.abs(got - left * rows[split].size / whole) < 1 + 1e-9).all()
        left = left - got


def test_the_sources_own_splits_are_kept():
    given = np.array([0] * 50 + [2] * 20, np.int8)
    rows = assign(given, None, 0.1, 0.5, 0)
    assert sorted(rows["test"]) == list(range(50, 70)) and rows["val"].size == 5 and rows["train"].size == 45
    given[:7] = 1
    rows = assign(given, None, 0.3, 0.5, 0)
    assert sorted(rows["val"]) == list(range(7)) and rows["train"].size == 43


def test_the_seed_decides_and_nothing_else_does():
    given, strata = np.full(500, -1, np.int8), np.arange(500) % 3
    one, again, other = (assign(given, strata, 0.1, 0.2, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[s], again[s]) for s in SPLITS)
    assert not np.array_equal(one["train"], other["train"])
    assert np.corrcoef(one["train"], np.arange(one["train"].size))[0, 1] < 0.2     # shuffled


def test_shards_are_even_and_never_empty():
    for n in (1, 2, 7, 8, 9, 1000):
        for shards in (1, 3, 8, 50):
            sizes = np.diff(shard_bounds(n, shards))
            assert sizes.sum() == n and len(sizes) == min(n, shards) and sizes.max() - sizes.min() <= 1
    bounds = shards_of({"train": 80, "val": 10, "test": 0}, 8)
    assert [len(b) - 1 for b in bounds.values()] == [8, 1] and list(bounds) == ["train", "val"]
