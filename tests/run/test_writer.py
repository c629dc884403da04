"""The writer works beside its caller, one job at a time, and tells what came of it when it is asked."""

import threading

import pytest

from hpcmlp.errors import CannotWrite
from hpcmlp.run.writer import Saved, Writer


def test_a_job_runs_beside_and_the_next_waits_for_it():
    writer, gate, order = Writer(), threading.Event(), []

    def slow():
        gate.wait()
        order.append(1)
        return Saved(1, "one", 0.0, 0.0)

    def quick():
        order.append(2)
        return Saved(2, "two", 0.0, 0.0)

    writer.start(slow)
    assert order == [] and writer.saved() == [] and not writer.failed
    threading.Timer(0.2, gate.set).start()
    writer.start(quick)  # too soon: it returns once the first has ended
    assert order[0] == 1 and writer.waited_s > 0.05
    writer.wait()
    writer.wait()
    assert [s.checkpoint for s in writer.saved()] == ["one", "two"] and writer.saved() == []


def test_a_failure_is_told_to_every_caller_and_nothing_more_is_begun():
    writer, ran = Writer(), []

    def fail():
        raise CannotWrite("the disk is full")

    writer.start(fail)
    writer.wait()
    assert writer.failed
    for _ in range(2):
        with pytest.raises(CannotWrite, match="full"):
            writer.saved()
        with pytest.raises(CannotWrite, match="full"):
            writer.start(lambda: ran.append(1))
    assert not ran


def test_what_came_to_the_disk_before_a_failure_is_told_first():
    writer = Writer()
    writer.start(lambda: Saved(1, "one", 0.0, 0.0))
    writer.wait()

    def fail():
        raise CannotWrite("no")

    writer.start(fail)
    writer.wait()
    assert [s.step for s in writer.saved()] == [1]
    with pytest.raises(CannotWrite):
        writer.saved()
