"""Signals and the wall clock as a flag that the training loop reads between steps."""

import os
import signal
import sys
import time
from typing import Any


class StopFlag:
    """Turns USR1, TERM and INT, and a time limit, into a reason to stop after the current step.

    Local. A second INT ends this process at once with code 130. `reason` is None or a text such as "SIGUSR1".
    Use it as a context manager: the previous handlers come back at the end.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self, time_limit_s: float | None = None):
        self.reason: str | None = None
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._time_limit_s = time_limit_s
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
            self.reason = f"the time limit of {self._time_limit_s / 60:g} minutes"
        return self.reason is not None
