"""The order of samples: a true permutation, well mixed, proportional, once per epoch, the same at any rank count."""

from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from hpcmlp.data import order as order_module
from hpcmlp.data.order import Bijection, Order, ShardSequence, prefix_counts
from hpcmlp.errors import DataError

LENGTHS = [0, 1, 2, 3, 4, 5, 7, 64, 255, 256, 257, 258, 289, 290, 1000, 1024, 1025, 10007]


@pytest.mark.parametrize("n", LENGTHS)
def test_bijection_reaches_every_row_once(n):
    for key in (0, 1, 2**64 - 1, 987654321):
        images = Bijection(n, key)(np.arange(n))
        assert images.dtype == np.int64
        assert np.array_equal(np.sort(images), np.arange(n))


def test_bijection_of_large_ranges_stays_inside_and_never_repeats():
    for n in (10**6 + 3, 2**30 + 1, 2**31 - 1):
        positions = np.concatenate((np.arange(20000), np.arange(n - 20000, n)))
        images = Bijection(n, 5)(positions)
        assert images.min() >= 0 and images.max() < n
        assert len(np.unique(images)) == len(positions)


def test_bijection_does_not_depend_on_which_positions_are_asked_together():
    bijection = Bijection(10007, 3)
    whole = bijection(np.arange(10007))
    some = np.random.default_rng(0).integers(0, 10007, 500)
    assert np.array_equal(bijection(some), whole[some])
    assert [int(bijection(np.array([i]))[0]) for i in (0, 17, 10006)] == whole[[0, 17, 10006]].tolist()


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_permutation_of_few_rows_is_about_equally_frequent(n):
    all_of_them = {p: 0 for p in permutations(range(n))}
    trials = 60 * len(all_of_them)
    for key in range(trials):
        all_of_them[tuple(Bijection(n, key * 0x9E3779B97F4A7C15 % 2**64)(np.arange(n)).tolist())] += 1
    assert min(all_of_them.values()) > 20 and max(all_of_them.values()) < 120      # 60 +- 5 standard deviations


@pytest.mark.parametrize("n", [100, 257, 300, 1021])
def test_images_of_a_position_are_uniform_over_keys(n):
    keys, bins = 3000, 10
    positions = np.array([0, 1, n // 2, n - 1])
    images = np.array([Bijection(n, 7919 * key)(positions) for key in range(keys)])     # (keys, 4)
    expected = np.bincount(np.arange(n) * bins // n, minlength=bins) * keys / n
    for column in images.T:
        chi = ((np.bincount(column * bins // n, minlength=bins) - expected) ** 2 / expected).sum()
        assert chi < 33.7       # 9 degrees of freedom: p = 1e-4
    # Neighbours are as far apart as strangers: |i - j| has mean n / 3 when i, j are independent.
    distance = np.abs(images[:, 0] - images[:, 1]).mean() / n
    assert abs(distance - 1 / 3) < 5 * 0.2357 / np.sqrt(keys) + 1 / n


@pytest.mark.parametrize("n", [289, 5003, 60000])
def test_one_permutation_looks_random(n):
    images = Bijection(n, 42)(np.arange(n))
    # Runs up, fixed points, and the correlation with the position, against their values for uniform permutations.
    ascents = (np.diff(images) > 0).sum()
    assert abs(ascents - (n - 1) / 2) < 5 * np.sqrt((n + 1) / 12)
    assert (images == np.arange(n)).sum() < 12
    assert abs(np.corrcoef(images, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
    # The first tenth of the positions falls evenly on ten parts of the rows.
    part = np.bincount(images[:n // 10] * 10 // n, minlength=10)
    assert np.abs(part - n / 100).max() < 5 * np.sqrt(n / 100)


def plain_composition(shard_rows):
    """All samples sorted by virtual time, ties by shard, with exact fractions; the counts before each."""
    samples = sorted((Fraction(2 * k + 1, 2 * n), s) for s, n in enumerate(shard_rows) for k in range(n))
    counts = [[0] * len(shard_rows)]
    for _, shard in samples:
        counts.append([c + (s == shard) for s, c in enumerate(counts[-1])])
    return np.array(counts)


def test_composition_equals_the_sort_by_exact_fractions():
    rng = np.random.default_rng(1)
    cases = [[5], [3, 3], [1, 2, 3], [0, 4, 0, 2], [7, 7, 7, 8], [1, 100], [10] * 9, [3, 5, 7, 11, 13], [0], [0, 1]]
    cases += [rng.integers(0, 30, rng.integers(1, 9)).tolist() for _ in range(40)]
    for shard_rows in cases:
        lengths = np.arange(sum(shard_rows) + 1)
        got = prefix_counts(np.array(shard_rows, np.int64), lengths)
        assert np.array_equal(got, plain_composition(shard_rows)), shard_rows


def test_composition_is_exact_near_the_largest_shards():
    n = np.array([2**31 - 1, 2**31 - 2, 1, 2**31 - 1], np.int64)
    total = int(n.sum())
    lengths = np.array([0, 1, 2, 3, total // 3, total // 2, total - 2, total - 1, total])
    counts = prefix_counts(n, lengths)
    assert np.array_equal(counts.sum(axis=1), lengths)
    assert np.array_equal(counts[-1], n)
    for row, m in zip(counts.tolist(), lengths.tolist(), strict=True):
        # The last sample in of any shard comes before the first sample out of any other.
        inside = [(Fraction(2 * c - 1, 2 * int(k)), s) for s, (c, k) in enumerate(zip(row, n, strict=True)) if c > 0]
        outside = [(Fraction(2 * c + 1, 2 * int(k)), s) for s, (c, k) in enumerate(zip(row, n, strict=True)) if c < k]
        assert not inside or not outside or max(inside) < min(outside), m


def test_shards_shrink_together():
    order = Order([1000, 3000, 0, 500], 90)
    counts = order.counts(0, order.steps_per_epoch)
    exact = np.minimum(np.arange(order.steps_per_epoch + 1) * 90, 4500)[:, None] * np.array([1000, 3000, 0, 500]) / 4500
    assert np.abs(counts - exact).max() <= 2


@pytest.mark.parametrize("shard_rows", [[0], [1], [5], [4, 3], [0, 7, 1], [13, 0, 8, 8, 9], [50, 51, 49], [3] * 11])
@pytest.mark.parametrize("batch", [1, 2, 5, 7, 64, 1000])
def test_every_sample_once_and_batches_full_at_any_rank_count(shard_rows, batch):
    lists = {}
    for window_rows in (None, 1, 6):
        order = Order(shard_rows, batch, seed=3, window_rows=window_rows)
        total = sum(shard_rows)
        assert order.steps_per_epoch == -(-total // batch)
        for size in (1, 2, 3, 5):
            seen = epoch_list(order, 4, size)
            assert [len(b) for b in seen] == [min(batch, total - t * batch) for t in range(order.steps_per_epoch)]
            assert sorted(sum(seen, [])) == [(s, i) for s, n in enumerate(shard_rows) for i in range(n)]
            assert seen == lists.setdefault(window_rows, seen)


def epoch_list(order, epoch, size):
    """Per global batch the list of (shard, row), put together from the slices of `size` ranks."""
    sequences = [order.sequence(epoch, s) for s in range(len(order.shard_rows))]
    steps = [[] for _ in range(order.steps_per_epoch)]
    for rank in range(size):
        start, stop = order.parts(0, order.steps_per_epoch, rank, size)
        touched = np.flatnonzero((stop > start).any(axis=0)).tolist()
        assert touched == order.touched(rank, size)
        for t, batch in enumerate(steps):
            rows = order.global_rows(t)
            assert (stop[t] - start[t]).sum() == (rank + 1) * rows // size - rank * rows // size
            for s in touched:
                positions = np.arange(start[t, s], stop[t, s])
                batch.extend((s, i) for i in sequences[s].rows(positions).tolist())
    return steps


def test_epochs_seeds_and_shards_differ_and_unshuffled_rows_do_not_move():
    def rows(seed=1, epoch=1, shard=0, window_rows=None, shuffle=True):
        return ShardSequence(997, seed, epoch, shard, window_rows, shuffle).rows(np.arange(997)).tolist()

    for window_rows in (None, 64):
        variants = [rows(window_rows=window_rows), rows(seed=2, window_rows=window_rows),
                    rows(epoch=2, window_rows=window_rows), rows(shard=1, window_rows=window_rows)]
        for i, one in enumerate(variants):
            assert one == [rows(window_rows=window_rows), rows(2, window_rows=window_rows),
                           rows(1, 2, window_rows=window_rows), rows(1, 1, 1, window_rows=window_rows)][i]
            for other in variants[i + 1:]:
                assert np.mean(np.array(one) == other) < 0.05
        assert rows(window_rows=window_rows, shuffle=False) == list(range(997))
    assert rows() != rows(window_rows=64)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 63, 64, 65, 100, 997])
@pytest.mark.parametrize("window_rows", [1, 3, 4, 10, 64, 2000])
def test_windows_hold_what_their_positions_name(rows, window_rows):
    for epoch in range(3):
        sequence = ShardSequence(rows, 5, epoch, 0, window_rows)
        whole = sequence.rows(np.arange(rows))
        end = 0
        for window in range(sequence.num_windows):
            start, stop = sequence.window_range(window)
            assert start == end and all(sequence.window_of(p) == window for p in (start, stop - 1))
            held = np.concatenate([np.arange(*piece) for piece in sequence.window_pieces(window)])
            assert len(held) == stop - start <= window_rows + 3
            assert np.array_equal(held[sequence.within(window, start, stop)], whole[start:stop])
            end = stop
        assert end == rows


def test_bounds_of_touched_shards_cover_the_exact_ones(monkeypatch):
    rng = np.random.default_rng(2)
    cases = [([100] * 16, 64), ([100] * 16, 1000), ([7, 90, 0, 13, 300], 41), ([1000] * 5, 3)]
    cases += [(rng.integers(0, 200, 12).tolist(), int(rng.integers(1, 400))) for _ in range(20)]
    exact = {(i, r): Order(n, b).touched(r, 4) for i, (n, b) in enumerate(cases) for r in range(4)}
    monkeypatch.setattr(order_module, "_TABLE_ENTRIES", 0)
    for i, (shard_rows, batch) in enumerate(cases):
        for rank in range(4):
            assert set(exact[i, rank]) <= set(Order(shard_rows, batch).touched(rank, 4))
    assert len(Order([100000] * 16, 4096).touched(0, 4)) <= 6       # and are of use: 4 or 5 in truth


def test_too_long_shards_are_refused():
    with pytest.raises(DataError, match="shard 1 has 2147483648 rows"):
        Order([5, 2**31], 10)
