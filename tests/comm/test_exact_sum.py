"""Sums by bins do not depend on the order, and are right."""

import math

import numpy as np
import pytest

from hpcmlp.comm.exact_sum import join, num_bins, split


def summed(terms, order):
    bins = np.empty((4, terms.shape[1]))
    total = np.zeros_like(bins)
    for k in order:
        split(terms[k], bins)
        total += bins
    out = np.empty(terms.shape[1])
    join(total, out)
    return out


@pytest.mark.parametrize("ranks", [3, 64, 1000])
def test_any_order_gives_the_same_bits_and_the_true_sum(ranks):
    rng = np.random.default_rng(ranks)
    terms = rng.standard_normal((ranks, 50)) * 10.0 ** rng.integers(-9, 13, (ranks, 50))
    first = summed(terms, range(ranks))
    for _ in range(5):
        assert summed(terms, rng.permutation(ranks)).tobytes() == first.tobytes()
    true = np.array([math.fsum(column) for column in terms.T])
    np.testing.assert_allclose(first, true, rtol=4e-16, atol=1e-24)


def test_whole_numbers_are_exact_up_to_2_to_53():
    terms = np.array([[2.0**53 - 1, 2.0**52 + 1, 12345.0]] * 7)
    true = [float(7 * int(word)) for word in terms[0]]
    np.testing.assert_allclose(summed(terms, range(7)), true, rtol=2**-53)
    assert summed(terms, range(1)).tolist() == terms[0].tolist()


def test_not_finite_words_stay_not_finite():
    terms = np.array([[1.0, np.nan, np.inf, -np.inf], [1.0, 1.0, 1.0, 1.0]])
    with np.errstate(invalid="ignore"):
        out = summed(terms, range(2))
    assert out[0] == 2.0 and not np.isfinite(out[1:]).any()


def test_two_ranks_need_one_bin():
    assert [num_bins(size) for size in (1, 2, 3, 1000)] == [1, 1, 4, 4]
