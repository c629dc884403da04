"""Signs of life between the ranks of a node, and what a stack tells."""

import os
import sys
import time

import pytest

from hpcmlp.comm import messages
from hpcmlp.run.signs import PACKAGE, PHASES, Signs, line_of, where


def frame_in(file, name, inner=None):
    """Return the innermost frame of a call of a function `name` in `file`, made by `inner` where given."""
    scope = {"sys": sys, "inner": inner}
    code = f"def {name}():\n    return inner() if inner else sys._getframe()\n"
    exec(compile(code, file, "exec"), scope)
    return scope[name]


STEP, RING, AGREE = PACKAGE + "sync/step.py", PACKAGE + "comm/ring.py", PACKAGE + "comm/agreement.py"
OTHER = "/usr/lib/python3/contextlib.py"


@pytest.mark.parametrize("stack, waits, operation, line", [
    # outermost first
    ([(STEP, "run")], False, "run", "hpcmlp/sync/step.py:2 in run"),
    ([(STEP, "run"), (OTHER, "x")], False, "run", "hpcmlp/sync/step.py:2 in run"),
    ([(STEP, "run"), (RING, "all_gather"), (RING, "_run")], True, "all_gather", "hpcmlp/comm/ring.py:2 in _run"),
    ([(STEP, "run"), (AGREE, "agreed"), (OTHER, "x"), (AGREE, "agree")], True, "agreed",
     "hpcmlp/comm/agreement.py:2 in agree"),
    ([(RING, "all_gather"), (STEP, "need")], False, "need", "hpcmlp/sync/step.py:2 in need"),
    ([(OTHER, "x")], False, "", ""),
])
def test_the_stack_tells_whether_a_rank_waits_and_in_what(stack, waits, operation, line):
    call = None
    for file, name in reversed(stack):
        call = frame_in(file, name, call)
    seen = where(call())
    if stack[0][0] == OTHER:        # nothing of ours in it but this test's callers
        assert not seen[0]
        return
    assert seen[:3] == (waits, operation, line)


def test_the_line_of_a_dump_is_that_of_the_thread_that_took_the_signal():
    dump = (f'Thread 0x1 (most recent call first):\n  File "{PACKAGE}run/watchdog.py", line 3 in _run\n\n'
            f'Current thread 0x2 (most recent call first):\n  File "/x/numpy.py", line 9 in dot\n'
            f'  File "{STEP}", line 12 in run\n  File "{STEP}", line 99 in main\n')
    assert line_of(dump) == "hpcmlp/sync/step.py:12 in run"
    assert line_of("(no stacks from this process)") == ""


@pytest.mark.mpi
def test_every_rank_sees_what_the_others_marked(comm):
    signs = Signs(comm, list(range(comm.size)), "here")
    step = 10 + comm.rank
    signs.mark(PHASES.index("step"), step)
    signs.look()
    messages.barrier(comm)
    for rank in range(comm.size):
        seen = signs.read(rank)
        assert (seen.rank, seen.step, seen.phase, seen.host) == (rank, 10 + rank, "step", "here")
        assert not seen.waits and not seen.leaves and seen.silent_s < 60
        assert not signs.gone(rank) and signs.state(rank) == "busy"
    assert signs.read(comm.rank).pid == os.getpid()
    messages.barrier(comm)
    if comm.rank == comm.size - 1:
        signs.leave()
    messages.barrier(comm)
    assert signs.read(comm.size - 1).leaves
    messages.barrier(comm)


@pytest.mark.mpi
def test_age_counts_from_the_last_look_and_standing_still_from_the_last_move(comm):
    signs = Signs(comm, list(range(comm.size)), "here")
    signs.mark(1, 5)
    signs.look()
    first = signs.read(comm.rank)
    time.sleep(0.1)
    assert signs.read(comm.rank).silent_s >= first.silent_s + 0.1
    signs.look()
    again = signs.read(comm.rank)
    assert again.still_s >= 0.1 and again.silent_s < again.still_s
    signs.mark(2, 5)
    signs.look()
    assert signs.read(comm.rank).still_s < again.still_s
    messages.barrier(comm)
