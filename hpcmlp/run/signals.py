"""Signals and the wall clock as a flag that the training loop reads between steps."""

import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

_ANSWER_S = 20.0  # for which SLURM is waited for


class StopFlag:
    """Turns USR1, TERM and INT, and a time limit, into a reason to stop after the current step.

    Local. A second INT ends this process at once with code 130. `reason` is None or a text such as "SIGUSR1".
    Use it as a context manager: the previous handlers come back at the end. `whose`: what has `seconds_left`, in words.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self, seconds_left: float | None = None, whose: str = "the time limit"):
        self.reason: str | None = None
        self._deadline = None if seconds_left is None else time.monotonic() + seconds_left
        self._whose = whose
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.reason == name:
            # Not sys.exit: the main thread may sit inside MPI, and every checkpoint on disk is whole anyway.
            sys.stderr.write("hpcmlp: second SIGINT, ending at once.\n")
            sys.stderr.flush()
            os._exit(130)
        self.reason = name

    def poll(self, lead_s: float = 0.0) -> bool:
        """Return whether this rank wants to stop: a signal came, or less than `lead_s` seconds are left. Local."""
        if self.reason is None and self._deadline is not None and time.monotonic() + lead_s >= self._deadline:
            self.reason = self._whose
        return self.reason is not None


def slurm_seconds_left(environ: Mapping[str, str]) -> float | None:
    """Return the seconds until the SLURM job ends; None outside a job, without a limit, or when SLURM does not tell.

    Local. SLURM_JOB_END_TIME (newer versions set it) or `scontrol show job`. Only one rank asks: it starts a process,
    which Python does by vfork, so that no page of memory that MPI has registered is copied.
    """
    job, end = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_JOB_END_TIME", "")
    if not re.fullmatch(r"\d+", job):
        return None
    if re.fullmatch(r"\d+", end):
        return max(0.0, int(end) - time.time())
    import subprocess  # in jobs only, on one rank
    try:
        told = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True,
                              timeout=_ANSWER_S, stdin=subprocess.DEVNULL, check=True).stdout
        match = re.search(r"\bEndTime=(\d+-\d+-\d+T\d+:\d+:\d+)", told)  # "Unknown" without a limit
        return max(0.0, time.mktime(time.strptime(match[1], "%Y-%m-%dT%H:%M:%S")) - time.time()) if match else None
    except (OSError, ValueError, OverflowError, subprocess.SubprocessError):
        return None
