"""How far ranks are apart that do the same, out of their times; which ranks are measured at once."""

import os
from itertools import combinations

import numpy as np
import pytest

from hpcmlp.comm.topology import Topology
from hpcmlp.run.calibrate import SPREAD_WINDOWS, busy_ranks, node_cores, spread


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


@pytest.mark.mpi
def test_ranks_are_measured_at_once_as_far_as_each_has_its_cores(comm):
    topology, before = Topology(comm), os.sched_getaffinity(0)
    cores = sorted(before)
    apart = min(comm.size, len(cores))
    try:
        os.sched_setaffinity(0, {cores[comm.rank % len(cores)]})
        assert busy_ranks(topology, 1) == (node_cores() if apart == comm.size else apart, apart)
        os.sched_setaffinity(0, {cores[0]})
        assert busy_ranks(topology, 1) == (node_cores() if comm.size == 1 else 1, 1)
        assert busy_ranks(topology, 4)[1] == 1
    finally:
        os.sched_setaffinity(0, before)
        comm.Barrier()
        topology.free()
