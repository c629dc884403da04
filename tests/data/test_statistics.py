"""Statistics agree with a two-pass float64 computation, and to the bit at any rank count."""

import numpy as np
import pytest

from hpcmlp.data.statistics import (
    BLOCK_ROWS,
    block_moments,
    histogram,
    histogram_moments,
    merge_moments,
    quantiles,
    rows_of_rank,
    scaling,
)


def over_ranks(x, use, size):
    numbers = np.arange(len(x))
    parts = []
    for rank in range(size):
        rows = slice(*rows_of_rank(len(x), rank, size))
        parts.append(block_moments(x[rows], numbers[rows], use[rows]))
    return merge_moments(np.concatenate(parts))


@pytest.mark.parametrize("n", [1, 2, BLOCK_ROWS, BLOCK_ROWS + 1, 3 * BLOCK_ROWS + 17])
@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_moments_equal_two_passes_and_do_not_depend_on_ranks(n, offset):
    random = np.random.default_rng(n)
    x = random.normal(offset, 3.0, (n, 4))
    x[:, 3] = 0.1
    use = random.random(n) < 0.7
    use[0] = True
    moments = over_ranks(x, use, 1)
    wide = x[use].astype(np.longdouble)
    np.testing.assert_allclose(moments.mean, wide.mean(axis=0).astype(float), rtol=1e-14, atol=1e-15)
    expected = wide.std(axis=0).astype(float)
    np.testing.assert_allclose(moments.std[:3], expected[:3], rtol=1e-9, atol=1e-12)
    assert np.array_equal(moments.low, x[use].min(axis=0)) and np.array_equal(moments.high, x[use].max(axis=0))
    assert (moments.count == use.sum()).all()
    for size in (2, 3, 4, 7):
        again = over_ranks(x, use, size)
        assert [a.tobytes() for a in vars(moments).values()] == [a.tobytes() for a in vars(again).values()]


def test_columns_and_matrix_give_the_same_bits():
    x = np.random.default_rng(0).normal(size=(BLOCK_ROWS + 5, 3))
    numbers, use = np.arange(len(x)), np.ones(len(x), bool)
    assert block_moments(x, numbers, use).tobytes() == block_moments(list(x.T), numbers, use).tobytes()


def test_missing_values_are_left_out():
    x = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan], [np.nan, np.inf, np.nan]])
    moments = over_ranks(x, np.ones(3, bool), 1)
    assert moments.count.tolist() == [2, 1, 0] and moments.mean[:2].tolist() == [2, 5]
    shift, scale = scaling("standard", moments)
    assert shift.tolist() == [2, 5, 0] and scale.tolist() == [1, 1, 1]


def test_ranges_cover_all_rows_once_and_begin_at_blocks():
    for n in (0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, 5 * BLOCK_ROWS + 3):
        for size in (1, 2, 3, 8):
            ranges = [rows_of_rank(n, r, size) for r in range(size)]
            assert ranges[0][0] == 0 and ranges[-1][1] == n
            assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
            assert all(start % BLOCK_ROWS == 0 or start == n for start, _ in ranges)


def test_quantiles_are_exact_and_know_no_order():
    random = np.random.default_rng(3)
    for n in (1, 2, 3, 4, 5, 97, 1000):
        values = random.normal(size=n)
        got = quantiles(values)
        np.testing.assert_allclose(got, np.quantile(values, [0.25, 0.5, 0.75]), rtol=1e-12)
        assert got == quantiles(random.permutation(values))
    assert quantiles(np.empty(0)) == [0.0, 0.0, 0.0]


def test_counted_pixels_equal_the_plain_computation():
    random = np.random.default_rng(5)
    x = random.integers(0, 256, (BLOCK_ROWS + 100, 9)).astype(np.uint8)
    x[random.random(x.shape) < 0.6] = 0
    use = random.random(len(x)) < 0.5
    moments, quartiles = histogram_moments(histogram(x, use))
    plain = x[use].astype(np.float64).ravel()
    np.testing.assert_allclose([moments.mean[0], moments.std[0]], [plain.mean(), plain.std()], rtol=1e-12)
    np.testing.assert_allclose(quartiles, np.quantile(plain, [0.25, 0.5, 0.75]), rtol=1e-12)
    assert (moments.low[0], moments.high[0]) == (plain.min(), plain.max())
    empty, zeros = histogram_moments(np.zeros(256, np.int64))
    assert scaling("standard", empty)[1].tolist() == [1.0] and zeros == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["standard", "min-max", "robust", "none"])
def test_scaled_training_rows_have_the_promised_shape(kind):
    x = np.random.default_rng(1).gamma(2.0, 7.0, (5000, 3))
    x[:, 1] = 42.0
    x[:, 2] = (np.arange(5000) % 50 == 0) * 9.0        # interquartile range 0, not constant
    quartiles = np.array([quantiles(c) for c in x.T]).T
    shift, scale = scaling(kind, over_ranks(x, np.ones(5000, bool), 1), quartiles)
    z = (x - shift) * scale
    assert np.isfinite(scale).all() and (kind == "none" or (z[:, 1] == 0).all())
    if kind == "standard":
        np.testing.assert_allclose(z[:, [0, 2]].mean(axis=0), 0, atol=1e-12)
        np.testing.assert_allclose(z[:, [0, 2]].std(axis=0), 1, rtol=1e-12)
    if kind == "min-max":
        assert z[:, 0].min() == 0 and abs(z[:, 0].max() - 1) < 1e-12
    if kind == "robust":
        np.testing.assert_allclose(np.quantile(z[:, 0], 0.75) - np.quantile(z[:, 0], 0.25), 1, rtol=1e-12)
        assert abs(z[:, 2].std() - 1) < 1e-12
    if kind == "none":
        assert np.array_equal(z, x)


@pytest.mark.parametrize("value", [5e-324, 1e-310, 1e308])
def test_numbers_at_the_ends_of_the_range_give_a_finite_scale(value):
    x = np.array([[0.0], [value], [-value]])
    for kind in ("standard", "min-max", "robust"):
        shift, scale = scaling(kind, over_ranks(x, np.ones(3, bool), 1), np.array([quantiles(c) for c in x.T]).T)
        assert np.isfinite(shift).all() and np.isfinite(scale).all() and (scale > 0).all()
