"""Saving beside the training: one daemon thread that writes a state which nobody changes meanwhile.

Training goes on as soon as the state has been copied (`run.session`). One state is under way at a time: whoever comes
too soon waits for the one before. What the thread meets is told when it is next asked, on the thread of the training.
The thread stays: to start one takes a handshake, and milliseconds where ranks that wait keep all cores busy.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Saved:
    """A state that is on disk for certain: its step, its checkpoint's name, seconds in which training was held up for
    the copy, and seconds that writing took."""

    step: int
    checkpoint: str
    copied_s: float
    written_s: float


class Writer:
    """Does one job at a time, such as writing a state; a job returns a `Saved`, or None when there is nothing to tell.

    Local. `waited_s` are the seconds for which jobs were waited for.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], Saved | None]] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._saved: list[Saved] = []
        self._error: BaseException | None = None
        self.waited_s = 0.0
        threading.Thread(target=self._run, name="checkpoint writer", daemon=True).start()

    def start(self, job: Callable[[], Saved | None]) -> None:
        """Begin `job` and return; the caller leaves what it works on alone until `wait` returns.

        Waits for the job before. Raises what that one has raised; then this one is not begun.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        self._idle.clear()
        self._jobs.put(job)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                saved = job()
            except BaseException as error:  # told by `saved`, on the thread that can do something about it
                self._error = error
            else:
                if saved is not None:
                    self._saved.append(saved)
            del job  # and with it the state
            self._idle.set()

    def wait(self) -> None:
        """Return when no job is under way; what came of it is told by `saved`."""
        if not self._idle.is_set():
            begin = time.monotonic()
            self._idle.wait()
            self.waited_s += time.monotonic() - begin

    @property
    def failed(self) -> bool:
        """Whether a job has failed; `saved` raises why."""
        return self._error is not None

    def saved(self) -> list[Saved]:
        """Return what has come to the disk since the last call; when that is nothing, raise what a job has raised."""
        done: list[Saved] = []
        while self._saved:
            done.append(self._saved.pop(0))
        if not done and self._error is not None:
            raise self._error
        return done
