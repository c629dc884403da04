"""Signals and the wall clock only raise a flag; the second INT ends the process at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hpcmlp.run.signals import StopFlag, slurm_seconds_left


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
    flag = StopFlag(60.0, "the limit of 1 minutes")
    assert not flag.poll(10.0)
    now[0] = 151.0
    assert flag.poll(10.0) and "1 minutes" in flag.reason


def test_the_second_int_ends_at_once_with_130():
    code = ("import os, signal, time\nfrom hpcmlp.run.signals import StopFlag\n"
            "with StopFlag():\n os.kill(os.getpid(), signal.SIGINT)\n os.kill(os.getpid(), signal.SIGINT)\n"
            " time.sleep(5)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.returncode == 130 and "second SIGINT" in done.stderr


def test_the_end_of_a_slurm_job_is_read_from_the_environment_or_asked_for(monkeypatch, tmp_path):
    assert slurm_seconds_left({}) is None
    assert slurm_seconds_left({"SLURM_JOB_END_TIME": "1"}) is None  # of no job
    end = str(int(time.time()) + 100)
    assert 95 < slurm_seconds_left({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": end}) <= 100
    assert slurm_seconds_left({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1"}) == 0.0
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_seconds_left({"SLURM_JOB_ID": "7"}) is None  # no scontrol
    tool = tmp_path / "scontrol"
    for text, seconds in ((time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 200)), 200),
                          ("Unknown", None), ("2026-99-99T99:99:99", None)):
        tool.write_text(f"#!/bin/sh\n[ \"$*\" = '-o show job 7' ] && echo 'JobId=7 StartTime=2020-01-01T00:00:00 "
                        f"EndTime={text} Deadline=N/A'\n")
        tool.chmod(0o755)
        left = slurm_seconds_left({"SLURM_JOB_ID": "7"})
        assert left is None if seconds is None else seconds - 5 < left <= seconds
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert slurm_seconds_left({"SLURM_JOB_ID": "7"}) is None
