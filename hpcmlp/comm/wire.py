"""Narrow numbers for the wire: contiguous float32 values into preallocated bytes and back.

Every format has five actions: encode, decode, add (decode and add), and two that round with nothing lost. `round`
keeps what the bytes leave of a number for the next call; `towards` moves a replica of a number by what the bytes hold
of its way to the number, so that the next call sends what is left of the way.

bf16: the upper half of a float32, rounded to nearest, ties to even: 8 significant bits, the range of float32. float16:
IEEE half precision, 11 significant bits; finite numbers beyond 65,504 become 65,504, below 2**-14 the steps are 2**-24.
int8: blocks of BLOCK values, each with a float32 scale = max|x| / 127, then one byte x / scale a value, rounded alike.
Largest rounding error of a value x: |x| 2**-8, |x| 2**-11 + 2**-25, max|x of its block| / 254.

NaN and infinities stay so in bf16 and float16; in int8 one of them makes its whole block NaN. Finite numbers stay
finite, but that bf16 rounds what lies beyond 3.39e38 to infinity, as IEEE rounding has it. Whoever may meet NaN or
infinities turns NumPy's warnings about invalid operations off.
Blocks with a scale each: T. Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016.
"""

import os
from typing import Any

import numpy as np

try:
    from hpcmlp.ops import _fused
except ImportError:  # not built: the NumPy form does everything
    _fused = None

BLOCK = 256  # values with one scale: 1.6 % on top of a byte a value
LARGEST_HALF = 65504.0
# Scales are kept where neither x / scale nor 127 * scale can leave float32.
SMALLEST_SCALE = np.finfo(np.float32).tiny
LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
# In the order of the enums in _fused.c.
ENCODE, DECODE, ROUND, ADD, TOWARDS = range(5)


class _Plain:
    """What the formats of this file share: the actions in NumPy, from their `encode` and `decode`.

    Local. `most` is the largest number of values that one call gets.
    """

    def __init__(self, most: int):
        self._decoded, self._small = np.empty(most, np.float32), np.empty(most, np.bool_)

    def add(self, data: np.ndarray, values: np.ndarray) -> None:
        """Add what `data` (num_bytes(n),) uint8 holds to `values` (n,) float32. Local."""
        decoded = self._decoded[:values.size]
        self.decode(data, decoded)
        np.add(values, decoded, values)

    def round(self, values: np.ndarray, rest: np.ndarray, out: np.ndarray) -> None:
        """Add `rest` to `values`, encode them into `out`, and keep in `rest` what `out` leaves of them. Local.

        `values`, `rest` (n,) float32. A rest that is not finite, or smaller than the normal numbers, becomes 0.
        """
        decoded, small = self._decoded[:values.size], self._small[:values.size]
        np.add(values, rest, values)
        self.encode(values, out)
        self.decode(out, decoded)
        np.subtract(values, decoded, rest)
        np.abs(rest, decoded)
        np.less(decoded, SMALLEST_SCALE, small)
        np.copyto(rest, 0, where=small)
        if not np.isfinite(rest.sum()):
            rest[~np.isfinite(rest)] = 0

    def towards(self, values: np.ndarray, replica: np.ndarray, out: np.ndarray) -> None:
        """Encode `values - replica` into `out`; `values` become the replica plus what `out` holds, and that `values`.

        Local. `values`, `replica` (n,) float32 change places, so that no further pass has to do it.
        """
        moved = self._decoded[:values.size]
        np.subtract(values, replica, moved)
        self.encode(moved, out)
        self.decode(out, moved)
        np.add(replica, moved, moved)
        np.copyto(replica, values)
        np.copyto(values, moved)


class Bf16(_Plain):
    """The upper halves of float32 numbers, rounded to nearest, ties to even.

    Local. `most` is the largest number of values that one call gets.
    """

    def __init__(self, most: int):
        super().__init__(most)
        self._bits, self._odd = np.empty(most, np.uint32), np.empty(most, np.uint32)

    def num_bytes(self, count: int) -> int:
        """Return how many bytes `count` values take. Local."""
        return 2 * count

    def encode(self, values: np.ndarray, out: np.ndarray) -> None:
        """Write `values` (n,) float32 into `out` (num_bytes(n),) uint8; `values` stay. Local."""
        halves, bits, odd = out.view(np.uint16), self._bits[:values.size], self._odd[:values.size]
        whole = values.view(np.uint32)
        np.right_shift(whole, 16, odd)
        np.bitwise_and(odd, 1, odd)
        np.add(whole, 0x7FFF, bits)
        np.add(bits, odd, bits)
        np.right_shift(bits, 16, bits)
        np.copyto(halves, bits, casting="unsafe")
        if values.size and np.isnan(values.max()):
            bad = np.isnan(values)  # the addition could carry a NaN over into an infinity or a zero
            halves[bad] = (whole[bad] >> 16 | 0x40).astype(np.uint16)

    def decode(self, data: np.ndarray, values: np.ndarray) -> None:
        """Write what `data` (num_bytes(n),) uint8 holds into `values` (n,) float32. Local."""
        bits = values.view(np.uint32)
        np.copyto(bits, data.view(np.uint16))
        np.left_shift(bits, 16, bits)


class Float16(_Plain):
    """IEEE half precision; numbers too large for it become its largest.

    Local. `most` as for `Bf16`.
    """

    def num_bytes(self, count: int) -> int:
        """Return how many bytes `count` values take. Local."""
        return 2 * count

    def encode(self, values: np.ndarray, out: np.ndarray) -> None:
        """Write `values` (n,) float32 into `out` (num_bytes(n),) uint8; `values` stay. Local."""
        halves = out.view(np.float16)
        if not values.size or (values.max() <= LARGEST_HALF and values.min() >= -LARGEST_HALF):
            np.copyto(halves, values, casting="same_kind")
        else:  # rare: large, or NaN, which compares as False
            finite = np.isfinite(values)
            np.copyto(halves, np.where(finite, np.clip(values, -LARGEST_HALF, LARGEST_HALF), values),
                      casting="same_kind")

    def decode(self, data: np.ndarray, values: np.ndarray) -> None:
        """Write what `data` (num_bytes(n),) uint8 holds into `values` (n,) float32. Local."""
        np.copyto(values, data.view(np.float16))


class Int8(_Plain):
    """One signed byte a value, and one float32 scale for BLOCK values.

    Local. `most` as for `Bf16`. The bytes are the scales of all blocks, then the values; the last block may be short.
    """

    def __init__(self, most: int):
        super().__init__(most)
        self._work = np.empty(most, np.float32)

    def num_bytes(self, count: int) -> int:
        """Return how many bytes `count` values take. Local."""
        return 4 * -(-count // BLOCK) + count

    def encode(self, values: np.ndarray, out: np.ndarray) -> None:
        """Write `values` (n,) float32 into `out` (num_bytes(n),) uint8; `values` stay. Local."""
        work, (scales, small) = self._work[:values.size], self._halves(out, values.size)
        np.abs(values, work)
        for block, scale in _blocks(work, scales):
            np.max(block, axis=1, out=scale)
        np.divide(scales, np.float32(127), scales)
        if scales.size and not np.isfinite(scales.max()):
            scales[~np.isfinite(scales)] = np.nan
        np.clip(scales, SMALLEST_SCALE, LARGEST_SCALE, scales)  # NaN stays
        for (block, scale), (from_block, _) in zip(_blocks(work, scales), _blocks(values, scales), strict=True):
            np.divide(from_block, scale[:, None], block)
        np.rint(work, work)
        if scales.size and np.isnan(scales.max()):
            work[np.isnan(work)] = 0  # no byte stands for NaN: the scale does
        np.copyto(small, work, casting="unsafe")

    def decode(self, data: np.ndarray, values: np.ndarray) -> None:
        """Write what `data` (num_bytes(n),) uint8 holds into `values` (n,) float32. Local."""
        scales, small = self._halves(data, values.size)
        np.copyto(values, small)
        for block, scale in _blocks(values, scales):
            np.multiply(block, scale[:, None], block)

    def _halves(self, data: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        cut = self.num_bytes(count) - count
        return data[:cut].view(np.float32), data[cut:].view(np.int8)


def _blocks(values: np.ndarray, scales: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the whole blocks as rows and the short one as a row, where there are any, with their scales."""
    whole = values.size // BLOCK
    cut = whole * BLOCK
    pairs = [(values[:cut].reshape(whole, BLOCK), scales[:whole]), (values[cut:].reshape(1, -1), scales[whole:])]
    return [pair for pair in pairs if pair[0].size]


class Fused:
    """A format by the C kernels, each action one pass: the bits of the NumPy form, but for which NaN stands for a NaN.

    Local. `kind` is the place of the format in FORMATS.
    """

    def __init__(self, kind: int, num_bytes: Any):
        self._kind, self.num_bytes = kind, num_bytes

    def encode(self, values: np.ndarray, out: np.ndarray) -> None:
        """Write `values` (n,) float32 into `out` (num_bytes(n),) uint8; `values` stay. Local."""
        _fused.wire(ENCODE, self._kind, out, values, None)

    def decode(self, data: np.ndarray, values: np.ndarray) -> None:
        """Write what `data` (num_bytes(n),) uint8 holds into `values` (n,) float32. Local."""
        _fused.wire(DECODE, self._kind, data, values, None)

    def add(self, data: np.ndarray, values: np.ndarray) -> None:
        """Add what `data` holds to `values`. Local."""
        _fused.wire(ADD, self._kind, data, values, None)

    def round(self, values: np.ndarray, rest: np.ndarray, out: np.ndarray) -> None:
        """Encode `values + rest`, which stays in `values`, into `out`, and keep in `rest` what is left. Local."""
        _fused.wire(ROUND, self._kind, out, values, rest)

    def towards(self, values: np.ndarray, replica: np.ndarray, out: np.ndarray) -> None:
        """Encode `values - replica` into `out`, move the replica by it, and let the two change places. Local."""
        _fused.wire(TOWARDS, self._kind, out, values, replica)


FORMATS = {"bf16": Bf16, "float16": Float16, "int8": Int8}  # in the order of the enum in _fused.c
WIRES = ("float32", *FORMATS)


def make_format(name: str, most: int, fused: bool | None = None) -> Any:
    """Return the format called `name` ("bf16", "float16" or "int8") for up to `most` values at once.

    Local. `fused` as for `ops.host.HostOps`: True asks for the C kernels, False for NumPy, None takes the kernels when
    they are built and the environment variable HPCMLP_FUSED is not 0.
    """
    if fused is None:
        fused = _fused is not None and os.environ.get("HPCMLP_FUSED", "1") != "0"
    if fused:
        return Fused(list(FORMATS).index(name), FORMATS[name](0).num_bytes)
    return FORMATS[name](most)
