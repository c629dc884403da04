"""Narrow numbers for the wire: contiguous float32 values into preallocated bytes and back.

bf16: the upper half of a float32, rounded to nearest, ties to even: 8 significant bits, the range of float32. float16:
IEEE half precision, 11 significant bits; finite numbers beyond 65,504 become 65,504, below 2**-14 the steps are 2**-24.
int8: blocks of BLOCK values, each with a float32 scale = max|x| / 127, then one byte x / scale a value, rounded alike.
Largest rounding error of a value x: |x| 2**-8, |x| 2**-11 + 2**-25, max|x of its block| / 254.

NaN and infinities stay so in bf16 and float16; in int8 one of them makes its whole block NaN. Finite numbers stay
finite, but that bf16 rounds what lies beyond 3.39e38 to infinity, as IEEE rounding has it. Whoever may meet NaN or
infinities turns NumPy's warnings about invalid operations off.
Blocks with a scale each: T. Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016.
"""

from typing import Any

import numpy as np

BLOCK = 256  # values with one scale: 1.6 % on top of a byte a value
LARGEST_HALF = 65504.0
# Scales are kept where neither x / scale nor 127 * scale can leave float32.
SMALLEST_SCALE = np.finfo(np.float32).tiny
LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))


class Bf16:
    """The upper halves of float32 numbers, rounded to nearest, ties to even.

    Local. `most` is the largest number of values that one call gets.
    """

    def __init__(self, most: int):
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


class Float16:
    """IEEE half precision; numbers too large for it become its largest.

    Local. `most` as for `Bf16`.
    """

    def __init__(self, most: int):
        pass

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


class Int8:
    """One signed byte a value, and one float32 scale for BLOCK values.

    Local. `most` as for `Bf16`. The bytes are the scales of all blocks, then the values; the last block may be short.
    """

    def __init__(self, most: int):
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


FORMATS = {"bf16": Bf16, "float16": Float16, "int8": Int8}
WIRES = ("float32", *FORMATS)


def make_format(name: str, most: int) -> Any:
    """Return the encoder called `name` ("bf16", "float16" or "int8") for up to `most` values at once. Local."""
    return FORMATS[name](most)
