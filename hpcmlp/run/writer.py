"""Saving beside the training: one daemon thread that writes a state which nobody changes meanwhile.

Training goes on as soon as the state has been copied (`run.session`). One state is under way at a time: whoever comes
too soon waits for the one before. What the thread meets is told when it is next asked, on the thread of the training.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Saved:
    """A state that is on disk for certain: the step, the name of its checkpoint, the seconds that writing took."""

    step: int
    name: str
    seconds: float


class Writer:
    """Writes states with `write`, which takes one and returns the name it has on disk.

    Local. `busy_s` are the seconds for which states were waited for.
    """

    def __init__(self, write: Callable[[Any], str]):
        self._write = write
        self._thread: threading.Thread | None = None
        self._saved: list[Saved] = []
        self._error: BaseException | None = None
        self.busy_s = 0.0

    def start(self, state: Any) -> None:
        """Begin to write `state` and return; the caller leaves its arrays alone until `wait` returns.

        Raises what writing the state before has raised; then this one is not written.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        self._thread = threading.Thread(target=self._run, args=(state,), name="checkpoint writer", daemon=True)
        self._thread.start()

    def _run(self, state: Any) -> None:
        begin = time.monotonic()
        try:
            name = self._write(state)
        except BaseException as error:  # told by `saved`, on the thread that can do something about it
            self._error = error
        else:
            self._saved.append(Saved(state.meta["step"], name, time.monotonic() - begin))

    def wait(self) -> None:
        """Return when nothing is being written; what came of it is told by `saved`."""
        if self._thread is not None:
            begin = time.monotonic()
            self._thread.join()
            self._thread = None
            self.busy_s += time.monotonic() - begin

    @property
    def failed(self) -> bool:
        """Whether a state could not be written; `saved` raises why."""
        return self._error is not None

    def saved(self) -> list[Saved]:
        """Return what has come to the disk since the last call. Raises what writing has raised."""
        done, self._saved = self._saved, []
        if not done and self._error is not None:
            raise self._error
        return done
