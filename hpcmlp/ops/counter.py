"""Random bits from counters: keys mixed from integers, and the bits of one (row, column) without any stream.

A key is a chain of SplitMix64 finalizers over the words it is made of, so that (seed, step, layer, row) names one
64-bit number on every machine, whoever computes it. The bits of a column are two rounds of a 32-bit multiply-xorshift
hash of (key, column). Nothing is kept between calls: the result does not know how rows are spread over ranks.
Sources: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (finalizer constants:
D. Stafford, variant 13); C. Wellons, "Prospecting for hash functions", 2018 (the multipliers of the 32-bit hash).
"""

from typing import Any

import numpy as np

Array = Any  # an array of the module `xp`
MASK64 = (1 << 64) - 1
GOLDEN64 = 0x9E3779B97F4A7C15
MIX64_A, MIX64_B = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
GOLDEN32, MIX32_A, MIX32_B = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


def mix64(*words: int | np.ndarray) -> int | np.ndarray:
    """Mix integers into one 64-bit key.

    Local.

    words : any number of Python integers (taken modulo 2**64) and uint64 arrays, which broadcast; the order matters.

    Returns a Python int below 2**64 when all words are integers, else a uint64 array.
    """
    key = 0
    for word in words:
        key = _finalize(key ^ (word & MASK64 if isinstance(word, int) else _as_uint64(word)))
    return key


def row_keys(seed: int, step: int, layer: int, first: int, n: int, xp: Any = np) -> Array:
    """Return the keys of the rows first .. first + n - 1 of one layer at one step.

    Local.

    Returns (n,) uint64 of the array module `xp`.
    """
    base = mix64(seed, step, layer)
    rows = xp.arange(n, dtype=xp.uint64) + xp.uint64(first)
    return mix64_array(base, rows)


def mix64_array(key: int, words: Array) -> Array:
    """Mix one more word, a uint64 array of any array module, into the integer key of the words before it.

    Local.
    """
    return _finalize(words ^ words.dtype.type(key))


def uniform_bits(keys: Array, columns: int, xp: Any = np) -> Array:
    """Return 32 uniform random bits for every (row, column).

    Local.

    keys : (n,) uint64, from `row_keys`.
    columns : number of columns d.

    Returns (n, d) uint32.
    """
    low = (keys & xp.uint64(0xFFFFFFFF)).astype(xp.uint32)[:, None]  # (n, 1)
    high = (keys >> xp.uint64(32)).astype(xp.uint32)[:, None]
    bits = xp.arange(columns, dtype=xp.uint32) * xp.uint32(GOLDEN32) + low  # (n, d)
    bits ^= bits >> xp.uint32(16)
    bits *= xp.uint32(MIX32_A)
    bits ^= high
    bits ^= bits >> xp.uint32(15)
    bits *= xp.uint32(MIX32_B)
    bits ^= bits >> xp.uint32(16)
    return bits


def threshold(rate: float) -> int:
    """Return the 32-bit threshold below which a share `rate` of the uniform bits falls.

    Local.
    """
    return min(int(rate * 4294967296.0 + 0.5), 4294967295)


def _finalize(key):
    """SplitMix64: add the golden ratio, then two xorshift-multiply rounds."""
    if isinstance(key, int):
        key = (key + GOLDEN64) & MASK64
        key = ((key ^ (key >> 30)) * MIX64_A) & MASK64
        key = ((key ^ (key >> 27)) * MIX64_B) & MASK64
        return key ^ (key >> 31)
    word = key.dtype.type
    key = key + word(GOLDEN64)
    key = (key ^ (key >> word(30))) * word(MIX64_A)
    key = (key ^ (key >> word(27))) * word(MIX64_B)
    return key ^ (key >> word(31))


def _as_uint64(word):
    """A word of `mix64` that is not a Python int: a NumPy integer becomes one, an array must be uint64."""
    if getattr(word, "ndim", 0) == 0:
        return int(word) & MASK64
    if word.dtype != np.uint64:
        raise TypeError(f"mix64 takes Python integers and uint64 arrays, not {word.dtype} arrays; convert it first")
    return word
