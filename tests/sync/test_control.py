"""Control words: exact counts, and drift that no rank count hides."""

import numpy as np
import pytest

from hpcmlp.sync.control import ControlWords


def summed(checksums, fill=lambda words, rank: None):
    """Return the words of the first rank after an exact sum over len(checksums) ranks."""
    ranks = []
    for rank, checksum in enumerate(checksums):
        words = ControlWords(len(checksums))
        words.put_checksum(checksum)
        fill(words, rank)
        ranks.append(words)
    total = sum(w.array for w in ranks)
    ranks[0].array[:] = total
    return ranks[0]


@pytest.mark.parametrize("size", [1, 2, 3, 64, 5000])
def test_equal_replicas_agree_and_one_different_one_is_seen(size):
    base = 0x1234567890AB
    assert summed([base] * size).replicas_agree
    if size > 1:
        for changed in (base ^ 1, base ^ (1 << 30), 0):
            assert not summed([base] * (size - 1) + [changed]).replicas_agree


def test_no_checksum_counts_as_agreement():
    words = ControlWords(4)
    words.clear()
    assert words.replicas_agree


def test_rows_flags_and_loss_are_sums_over_ranks():
    def fill(words, rank):
        words.add_loss(10 + rank, 2.0, 0.5)
        words.add_loss(1, 1.0, 0.25)
        if rank == 1:
            words.ask_to_stop()
    words = summed([7, 7, 7], fill)
    assert (words.rows, words.weight, words.loss, words.stop, words.not_finite) == (36, 9.0, 2.25, True, 0)


def test_a_rank_that_is_not_finite_adds_nothing_but_its_flag():
    def fill(words, rank):
        words.add_loss(5, 5.0, np.nan if rank else 1.0)
        if rank:
            words.mark_not_finite()
    words = summed([1, 1], fill)
    assert words.not_finite == 1 and words.weight == 5.0 and words.loss == 1.0
