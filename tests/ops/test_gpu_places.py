"""Which GPU each rank takes: a table of what the ranks see, and every small case beside all possible choices."""

from collections import Counter
from itertools import product

import pytest

from hpcmlp.ops.gpu_places import sharing, take_places

A, B, C, D = "ABCD"


@pytest.mark.parametrize("seen, places, shared", [
    ([[A, B, C, D]] * 4, [0, 1, 2, 3], []),                                 # --gpus-per-node: all see all
    ([[A], [B], [C], [D]], [0, 0, 0, 0], []),                               # --gpus-per-task: each its 'device 0'
    ([[A, B, C, D], [B, C, D, A], [C, D, A, B], [D, A, B, C]], [0, 0, 0, 0], []),   # each begins at its own
    ([[B, A], [B]], [1, 0], []),                                            # the first must give way
    ([[A, B], [A, C], [A]], [1, 1, 0], []),
    ([[A, B], [B, C], [C, D], [A]], [1, 1, 1, 0], []),                      # one gives way to the next, thrice
    ([[A], [A], [A, B]], [0, 0, 1], [[0, 1]]),                              # there is one for two only
    ([[A]] * 3, [0, 0, 0], [[0, 1, 2]]),
    ([[A, B]] * 5, [0, 1, 0, 1, 0], [[0, 2, 4], [1, 3]]),                   # in turn
    ([[A, B], [A, B], [C, D], [C, D]], [0, 1, 0, 1], []),                   # two nodes
    ([[A, B], [C], [A, B], [C]], [0, 0, 1, 0], [[1, 3]]),                   # of ranks in turn, one node with one GPU
    ([[], [A], []], [None, 0, None], []),
    ([], [], []),
])
def test_ranks_have_gpus_of_their_own_where_that_can_be(seen, places, shared):
    assert take_places(seen) == places
    assert sharing(seen) == shared


def test_no_choice_serves_more_ranks():
    lists = [list(text) for text in ("A", "B", "AB", "BA", "BC", "CAB")]
    for seen in product(lists, repeat=4):
        taken = Counter(seen[rank][place] for rank, place in enumerate(take_places(list(seen))))
        best = max(len(set(choice)) for choice in product(*seen))
        assert len(taken) == best, seen
