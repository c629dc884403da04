"""What an exchange costs is told apart from waiting for the rank that comes last."""

import time

import numpy as np
import pytest

from hpcmlp.comm import messages
from hpcmlp.run.waiting import kept_by_all, least_over_ranks

pytestmark = pytest.mark.mpi


def test_the_rank_that_came_last_tells_the_cost(comm):
    cost = np.array([0.5, 0.25, 1.0, 0.75])
    late = np.arange(len(cost)) % comm.size     # the rank that the others wait for in each step
    own = cost + np.where(late == comm.rank, 0.0, 3.0)
    assert least_over_ranks(comm, own).tolist() == cost.tolist()
    assert own.tolist() == (cost + np.where(late == comm.rank, 0.0, 3.0)).tolist()      # left alone


def test_a_rank_that_sleeps_makes_others_wait_and_communication_no_dearer(comm):
    sleeps_s, own = 0.05, []
    for step in range(4):
        messages.barrier(comm)
        if comm.rank == step % comm.size:
            time.sleep(sleeps_s)
        begin = time.perf_counter()
        messages.sum_in_place(comm, np.ones(10))
        own.append(time.perf_counter() - begin)
    least = least_over_ranks(comm, np.array(own))
    assert np.median(least) < 0.5 * sleeps_s
    waits = np.array(own) - least
    assert all(waits[step] > 0.5 * sleeps_s for step in range(4) if comm.rank != step % comm.size)


@pytest.mark.parametrize("lengths", [lambda rank: 0, lambda rank: rank, lambda rank: 5 - min(rank, 4)])
def test_ranks_that_have_kept_more_steps_use_the_newest(comm, lengths):
    own, least = lengths(comm.rank), min(map(lengths, range(comm.size)))
    kept = kept_by_all(comm, [(float(step), 1.0) for step in range(own)])
    assert kept.dtype == np.float64 and len(kept) == least
    assert kept.tolist() == [[float(step), 1.0] for step in range(own - least, own)]
