"""The digest of a large file by pieces, so that several threads read and digest one file at a time.

It is the sha256 of the sha256s of all pieces of 1 MiB, in order: as good as one over the whole, which a core makes at
0.4 (without instructions for it) to 1.8 GB/s.
"""

import hashlib
import os
from typing import Any

import numpy as np

PIECE_BYTES = 1 << 20   # stays in the cache between reading and digesting
_MOST_THREADS = 8       # then memory is the limit


class PieceDigest:
    """Takes up bytes like an object of hashlib, in portions of any size; `hexdigest` gives the digest by pieces."""

    def __init__(self) -> None:
        self._whole, self._piece, self._held = hashlib.sha256(), hashlib.sha256(), 0

    def update(self, data: Any) -> None:
        """Take up the contiguous `data`. Local."""
        view = memoryview(data).cast("B")
        while len(view):
            part = view[:PIECE_BYTES - self._held]
            self._piece.update(part)
            self._held += len(part)
            view = view[len(part):]
            if self._held == PIECE_BYTES:
                self._close()

    def _close(self) -> None:
        self._whole.update(self._piece.digest())
        self._piece, self._held = hashlib.sha256(), 0

    def hexdigest(self) -> str:
        """Return the digest of what has been taken up; nothing can follow. Local."""
        if self._held:
            self._close()
        return self._whole.hexdigest()


def read(path: str | os.PathLike, mapped: bool = False) -> tuple[np.ndarray, str]:
    """Return the bytes of a file, (n,) uint8, and their digest by pieces.

    Local; as many threads as this process has cores. `mapped`: the bytes stay in the file. Raises OSError.
    """
    from concurrent.futures import ThreadPoolExecutor  # for the one rank that reads: it brings 20 modules along
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(handle).st_size
        image = np.memmap(path, np.uint8, "r") if mapped and size else np.empty(size, np.uint8)

        def digest(start: int) -> bytes:
            piece = memoryview(image)[start:start + PIECE_BYTES]
            if not mapped:
                _fill(handle, piece, start)
            return hashlib.sha256(piece).digest()

        threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
        with ThreadPoolExecutor(threads) as pool:
            digests = pool.map(digest, range(0, size, PIECE_BYTES))
            return image, hashlib.sha256(b"".join(digests)).hexdigest()
    finally:
        os.close(handle)


def _fill(handle: int, piece: memoryview, start: int) -> None:
    done = 0
    while done < len(piece) and (got := os.preadv(handle, [piece[done:]], start + done)):
        done += got
    if done < len(piece):
        raise OSError(0, "it was cut off while it was read")
