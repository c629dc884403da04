"""Copies of a flat vector between a device and the host, range by range, beside whatever else goes on.

Messages are sent from `sent` and received there. `fetch` starts to bring a range there and returns what waits for it;
`put` starts to take one back; `settle` waits for all that was put. Until then nobody may read a range that is on its
way, nor change where it comes from. `host` is on the host, and free for other use where no messages are under way.
`InPlace` is for arithmetic on the host, where nothing moves, and `Direct` for a device whose memory MPI sends from;
`Staged` copies by streams of its own between the device and page-locked memory; `Late` stands in for it without a
device, and makes every copy at the last moment that its waits allow, with what is no number in its place before: a
wait that is missing shows.
"""

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

PORTABLE = 1            # page-locked for every context
DOWN, UP = 2, 1         # cudaMemcpyKind


def _nothing() -> None:
    """Wait for what has happened already."""


class InPlace:
    """The vector itself: it is on the host."""

    def __init__(self, array: np.ndarray):
        self.sent = self.host = array

    def fetch(self, start: int, stop: int) -> Callable[[], None]:
        """Return what waits for nothing. Local."""
        return _nothing

    def put(self, start: int, stop: int) -> None:
        """Do nothing. Local."""

    def settle(self) -> None:
        """Do nothing. Local."""


class Direct(InPlace):
    """The vector itself, on a device, beside a vector on the host (None: made here)."""

    def __init__(self, array: Any, host: np.ndarray | None = None):
        super().__init__(array)
        self.host = np.zeros(array.shape, array.dtype) if host is None else host


class Staged:
    """A vector of the device and its image in page-locked memory.

    Local. Copies follow what the current stream of CuPy holds when they start; other streams must be at rest.

    xp : CuPy. array : (n,) on the device. host : (n,) on the host, None: made here; its pages are locked at the first
    copy, as many runs make none.
    """

    def __init__(self, xp: Any, array: Any, host: np.ndarray | None = None):
        self._xp, self._runtime, self._array = xp, xp.cuda.runtime, array
        self.sent = self.host = np.zeros(array.shape, array.dtype) if host is None else host
        self._here, self._there, self._width = self.host.ctypes.data, int(array.data.ptr), self.host.itemsize
        self._down, self._up = (xp.cuda.Stream(non_blocking=True) for _ in range(2))
        self._now = xp.cuda.Event(disable_timing=True)
        self._arrivals: dict[tuple[int, int], Any] = {}
        self._tried = False     # to lock the pages

    def _lock(self) -> None:
        """Pages that cannot be locked are copied from all the same, only slower and not beside anything."""
        self._tried = True
        with suppress(self._runtime.CUDARuntimeError):
            self._runtime.hostRegister(self._here, self.host.nbytes, PORTABLE)
            # Before the memory goes: its addresses may come to mean other pages.
            weakref.finalize(self, _unlock, self._runtime, self._here).atexit = False

    def fetch(self, start: int, stop: int) -> Callable[[], None]:
        """Start to copy a range to the host, and return what waits for it. Local."""
        if start == stop:
            return _nothing
        if (start, stop) not in self._arrivals:
            self._arrivals[start, stop] = self._xp.cuda.Event(disable_timing=True)
        arrival = self._arrivals[start, stop]
        self._copy(self._here, self._there, start, stop, DOWN, self._down)
        arrival.record(self._down)
        return arrival.synchronize

    def put(self, start: int, stop: int) -> None:
        """Start to copy a range to the device. Local."""
        if start < stop:
            self._copy(self._there, self._here, start, stop, UP, self._up)

    def settle(self) -> None:
        """Wait for all that was put. Local."""
        self._up.synchronize()

    def _copy(self, to: int, source: int, start: int, stop: int, kind: int, stream: Any) -> None:
        if not self._tried:
            self._lock()
        self._now.record(self._xp.cuda.get_current_stream())
        stream.wait_event(self._now)
        at, count = start * self._width, (stop - start) * self._width
        self._runtime.memcpyAsync(to + at, source + at, count, kind, stream.ptr)


def _unlock(runtime: Any, address: int) -> None:
    with suppress(runtime.CUDARuntimeError):
        runtime.hostUnregister(address)


class Late:
    """As `Staged`, for arrays of NumPy that stand for those of a device.

    Local. A range is NaN, where it goes to, until it is waited for; the copy is made then, from what is there then.
    """

    def __init__(self, array: np.ndarray, host: np.ndarray | None = None):
        self._array = array
        self.sent = self.host = np.zeros(array.shape, array.dtype) if host is None else host
        self._puts: list[slice] = []

    def fetch(self, start: int, stop: int) -> Callable[[], None]:
        """As `Staged.fetch`. Local."""
        piece = slice(start, stop)
        self.host[piece] = np.nan

        def wait() -> None:
            self.host[piece] = self._array[piece]
        return wait

    def put(self, start: int, stop: int) -> None:
        """As `Staged.put`. Local."""
        self._array[start:stop] = np.nan
        self._puts.append(slice(start, stop))

    def settle(self) -> None:
        """As `Staged.settle`. Local."""
        for piece in self._puts:
            self._array[piece] = self.host[piece]
        self._puts.clear()
