"""How far ranks are apart that do the same, out of their times."""

from itertools import combinations

import numpy as np
import pytest

from hpcmlp.run.calibrate import SPREAD_WINDOWS, spread


@pytest.mark.parametrize("ranks, calls", [(2, 1024), (3, 1100), (8, 2048)])
def test_the_spread_is_the_mean_over_all_pairs_and_times(ranks, calls):
    times = np.random.default_rng(ranks).exponential(1e-3, (ranks, calls)) + 1e-3
    table = spread(times)
    assert len(table) == len(SPREAD_WINDOWS)
    for window, (seconds, apart) in zip(SPREAD_WINDOWS, table, strict=True):
        whole = calls // window * window
        sums = times[:, :whole].reshape(ranks, -1, window).sum(axis=2)
        pairs = [np.abs(sums[a] - sums[b]).mean() for a, b in combinations(range(ranks), 2)]
        assert seconds == pytest.approx(sums.mean()) and apart == pytest.approx(np.mean(pairs))


def test_chance_grows_with_the_root_and_a_slow_rank_with_the_time():
    random, calls = np.random.default_rng(0), 16 * SPREAD_WINDOWS[-1]
    chance = spread(1.0 + random.normal(0.0, 0.05, (2, calls)))
    assert chance[3][1] == pytest.approx(chance[0][1] * 64**0.5, rel=0.1)
    slow = spread(np.array([[1.0], [1.1]]) * np.ones((2, calls)))
    assert [apart / seconds for seconds, apart in slow] == pytest.approx([0.1 / 1.05] * len(SPREAD_WINDOWS))


def test_ranks_that_are_never_apart_still_make_a_table():
    assert all(apart > 0 for _, apart in spread(np.ones((2, SPREAD_WINDOWS[-1]))))
