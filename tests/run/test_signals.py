"""Signals and the wall clock only raise a flag; the second INT ends the process at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hpcmlp.run.signals import StopFlag


@pytest.mark.parametrize("number", StopFlag.SIGNALS)
def test_a_signal_sets_the_reason_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopFlag() as flag:
        assert not flag.poll()
        os.kill(os.getpid(), number)
        assert flag.poll() and flag.reason == number.name
    assert signal.getsignal(number) == before


def test_the_time_limit_counts_with_its_lead(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    flag = StopFlag(60.0)
    assert not flag.poll(10.0)
    now[0] = 151.0
    assert flag.poll(10.0) and "1 minutes" in flag.reason


def test_the_second_int_ends_at_once_with_130():
    code = ("import os, signal, time\nfrom hpcmlp.run.signals import StopFlag\n"
            "with StopFlag():\n os.kill(os.getpid(), signal.SIGINT)\n os.kill(os.getpid(), signal.SIGINT)\n"
            " time.sleep(5)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.returncode == 130 and "second SIGINT" in done.stderr
