"""Who is late, told from signs of life alone."""

import pytest

from hpcmlp.run.lateness import LONG, SILENT, STUCK, judge, sentence, with_age
from hpcmlp.run.signs import PHASES, Sign

INPUT, STEP, SAVE = (PHASES.index(word) for word in ("input", "step", "save"))


def sign(rank, still=2.0, waits=True, silent=0.0, step=40, phase=STEP, leaves=False, state="", line="a.py:1 in f"):
    return Sign(rank, f"node{rank // 2}", 100 + rank, step << 3 | phase, silent, still, waits, leaves,
                "all_gather" if waits else "f", line, state)


def late_ranks(signs, limit=1.0):
    verdict = judge(signs, limit)
    return None if verdict is None else [s.rank for s in verdict.late]


@pytest.mark.parametrize("signs, late", [
    # nobody has waited for the limit, however old a rank is
    ([sign(0, still=0.9), sign(1, still=50, waits=False)], None),
    ([sign(0, still=9, waits=False), sign(1, still=9, waits=False)], None),
    # one computes while the others wait, at the same place or before it
    ([sign(0), sign(1, waits=False)], [1]),
    ([sign(0), sign(1, waits=False, step=39), sign(2, waits=False)], [1]),
    # one that has not come to the place where the others wait, and waits itself
    ([sign(0), sign(1, step=39), sign(2)], [1]),
    # one that moves on is slow, but stands before the others: it is the one they wait for
    ([sign(0), sign(1, waits=False, still=0.1, phase=INPUT)], [1]),
    # one that is past the place where others wait is not late
    ([sign(0), sign(1, waits=False, step=41), sign(2, waits=False)], [2]),
    # no sign of life goes before everything else, also in a wait
    ([sign(0), sign(1, silent=1.0), sign(2, waits=False)], [1]),
    ([sign(0), sign(1, silent=0.4)], []),
    # who leaves is not missed, and does not wait
    ([sign(0), sign(1, silent=9.0, leaves=True)], []),
    ([sign(0, leaves=True), sign(1, waits=False)], None),
    # all wait for one another
    ([sign(0), sign(1), sign(2)], []),
    # a silent rank alone is no reason: somebody must wait
    ([sign(0, waits=False), sign(1, silent=9.0)], None),
])
def test_late_is_who_the_others_wait_for(signs, late):
    assert late_ranks(signs) == late
    assert late_ranks(signs[::-1]) == (late and late[::-1])


def test_patience_depends_on_signs_of_life_and_on_what_is_done():
    assert judge([sign(0), sign(1, silent=1.0)], 1.0).patience == SILENT
    assert judge([sign(0), sign(1, waits=False)], 1.0).patience == STUCK
    assert judge([sign(0, phase=SAVE), sign(1, waits=False, phase=SAVE)], 1.0).patience == LONG
    assert judge([sign(0), sign(1)], 1.0).patience == STUCK


def test_the_line_names_operation_step_and_ranks():
    verdict = judge([sign(0, still=1.25), sign(1, silent=1.5, state="stopped"), sign(2, still=0.8), sign(3, still=0.2)],
                    1.0)
    assert sentence(verdict, "stacks: X") == (
        "all_gather of step 40: ranks 0, 2 have waited for 1.2 s; late: rank 1 (host node0, pid 101) is stopped, in "
        "step 40, last sign of life 1.5 s ago at a.py:1 in f; stacks: X")
    alive = sentence(judge([sign(0), sign(1, waits=False, phase=SAVE, step=39)], 1.0), "X")
    assert "rank 0 has waited" in alive and "rank 1 (host node0, pid 101) is alive in step 39 (save) at a.py:1" in alive
    assert "none is late" in sentence(judge([sign(0), sign(1)], 1.0), "X")
    crowd = [sign(rank) for rank in range(20)] + [sign(rank, silent=3.0) for rank in range(20, 40)]
    text = sentence(judge(crowd, 1.0), "X")
    assert "and 12 more" in text and len(text) < 2000


def test_a_sign_from_afar_grows_old():
    fresh = sign(0, still=0.5, silent=0.1)
    aged = with_age(fresh, 2.0)
    assert (aged.still_s, aged.silent_s) == (2.5, 2.1)
