"""An array of one rank that the other ranks of its node write to in place: a file without a name, which they map.

It takes no room in /dev/shm, and nothing is left of it when its processes end, however they do.
"""

import mmap
import os

import numpy as np
from mpi4py import MPI

from hpcmlp.comm.messages import aligned_zeros, all_gather_bytes, broadcast_bytes


class Offered:
    """A zeroed (size,) array that others can map while this object lives.

    Local. `private`, and where the system has no such memory: an array that nobody reaches. `array` outlives this
    object; its memory is aligned to 64 bytes. `address`: where the ranks of this node find it; b"" if they do not.
    """

    def __init__(self, size: int, dtype: np.dtype | type, private: bool = False):
        dtype, self.address = np.dtype(dtype), b""
        if not private:
            try:
                self.array = self._make(size * dtype.itemsize).view(dtype)
                return
            except (OSError, ValueError, AttributeError):   # ValueError: nothing to map; AttributeError: not Linux
                pass
        self.array = aligned_zeros(size, dtype)

    def _make(self, num_bytes: int) -> np.ndarray:
        # The name is unlike any other: on another node the same path is another file.
        name = f"hpcmlp-{os.urandom(16).hex()}"
        handle = os.memfd_create(name)
        try:
            os.ftruncate(handle, num_bytes)
            array = np.frombuffer(mmap.mmap(handle, num_bytes), np.uint8)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        self.address = f"/proc/{os.getpid()}/fd/{handle} /memfd:{name} (deleted)".encode()
        return array

    def __del__(self) -> None:
        if self.address:
            os.close(self._handle)


def reach(comm: MPI.Intracomm, offered: Offered | None, size: int, dtype: np.dtype | type,
          root: int = 0) -> tuple[np.ndarray | None, list[bool]]:
    """Map on every rank that can the array which `root` offers; the others pass None.

    Collective over `comm`.

    Returns
    -------
    array : (size,), the memory of `root`; None on a rank that does not reach it.
    who : for every rank whether it reaches the array; `root` does.
    """
    address = broadcast_bytes(comm, offered.address if comm.rank == root else None, root)
    array = offered.array if comm.rank == root else _mapped(address, size, np.dtype(dtype))
    return array, [bool(told) for told in all_gather_bytes(comm, b"" if array is None else b"yes")]


def _mapped(address: bytes, size: int, dtype: np.dtype) -> np.ndarray | None:
    """Return the array at `address`; None where it is on another node, in another container, or out of bounds."""
    path, _, name = address.decode().partition(" ")
    try:
        if not path or os.readlink(path) != name:
            return None
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return np.frombuffer(mmap.mmap(handle, size * dtype.itemsize), dtype)
    except (OSError, ValueError):
        return None
    finally:
        os.close(handle)
