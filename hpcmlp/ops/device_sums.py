"""The additions of a ring whose messages go straight from and into a device's memory, and what they wait for.

MPI knows no streams: it may send what was queued, and receive over what a queued sum still reads, only after a `wait`.
`DeviceSums` adds CuPy arrays; `LateSums` stands in for it without a device, and makes every sum at the last moment that
its waits allow, with what is no number in its place before: a wait that is missing shows.
"""

from typing import Any

import numpy as np


class DeviceSums:
    """Sums of CuPy arrays, in its current stream.

    Local. Other streams must be at rest when messages begin.
    """

    def __init__(self, xp: Any):
        self._xp = xp

    def holds(self, array: Any) -> bool:
        """Whether an array lies in the device's memory. Local."""
        return isinstance(array, self._xp.ndarray)

    def empty(self, num_bytes: int) -> Any:
        """Return (num_bytes,) uint8 of the device. Local."""
        return self._xp.empty(num_bytes, np.uint8)

    def add(self, a: Any, b: Any, out: Any) -> None:
        """Queue out = a + b; `out` may be `a`. Local."""
        self._xp.add(a, b, out)

    def wait(self) -> None:
        """Return when all that was queued is done. Local."""
        self._xp.cuda.get_current_stream().synchronize()


class LateSums:
    """As `DeviceSums`, for arrays of NumPy that stand for those of a device.

    Local. A sum is NaN until it is waited for; it is made then, of what `b` holds then.
    """

    def __init__(self) -> None:
        self._queue: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def holds(self, array: Any) -> bool:
        """As `DeviceSums.holds`: all arrays stand for a device's. Local."""
        return True

    def empty(self, num_bytes: int) -> np.ndarray:
        """As `DeviceSums.empty`. Local."""
        return np.empty(num_bytes, np.uint8)

    def add(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        """As `DeviceSums.add`. Local."""
        self._queue.append((a.copy(), b, out))
        out[...] = np.nan

    def wait(self) -> None:
        """As `DeviceSums.wait`. Local."""
        for a, b, out in self._queue:
            np.add(a, b, out)
        self._queue.clear()
