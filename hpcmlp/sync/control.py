"""The control words: a few float64 numbers that ride in the gradient message and are summed over the ranks.

All ranks see the same sums at the same step, so whatever is decided from them is decided alike everywhere.
Counts and flags are small integers and therefore exact. Equality of the replicas is checked without a further
message: each rank adds two pieces of its parameters' checksum and their squares; by the inequality of Cauchy and
Schwarz size * sum(h^2) = (sum h)^2 holds only when all pieces are equal. A piece has so few bits that all sums
stay below 2^53 and are exact.
"""

import numpy as np

ROWS, WEIGHT, LOSS, NOT_FINITE, STOP, HASH_LOW, HASH_LOW_SQUARED, HASH_HIGH, HASH_HIGH_SQUARED = range(9)


class ControlWords:
    """This rank's words before the sum, and the sums after it, in one float64 array.

    Parameters
    ----------
    size : number of ranks; it limits the bits of a checksum's pieces.
    more : number of words behind the common ones.
    """

    def __init__(self, size: int, more: int = 0):
        self.size = size
        self.array = np.zeros(9 + more, dtype=np.float64)
        self._bits = min(26, (53 - (size - 1).bit_length()) // 2)

    def clear(self) -> None:
        """Set all words to zero for the next step. Local."""
        self.array[:] = 0.0

    def add_loss(self, rows: int, weight: float, loss: float) -> None:
        """Add `rows` samples of total `weight` with the weighted loss sum `loss`. Local."""
        self.array[ROWS] += rows
        self.array[WEIGHT] += weight
        self.array[LOSS] += loss

    def mark_not_finite(self) -> None:
        """Say that this rank's loss or gradient is not finite; its sums become zero instead. Local."""
        self.array[NOT_FINITE] = 1.0
        self.array[WEIGHT] = self.array[LOSS] = 0.0

    def ask_to_stop(self) -> None:
        """Say that this rank has got a signal, or that its time is over. Local."""
        self.array[STOP] = 1.0

    def put_checksum(self, checksum: int) -> None:
        """Put pieces of `checksum` (an integer) of this rank's parameters into the words. Local."""
        mask = (1 << self._bits) - 1
        low, high = checksum & mask, (checksum >> self._bits) & mask
        self.array[HASH_LOW:HASH_HIGH_SQUARED + 1] = (low, low * low, high, high * high)

    @property
    def rows(self) -> int:
        return int(self.array[ROWS])

    @property
    def weight(self) -> float:
        return float(self.array[WEIGHT])

    @property
    def loss(self) -> float:
        return float(self.array[LOSS])

    @property
    def not_finite(self) -> int:
        """How many ranks had a loss or gradient that is not finite."""
        return int(self.array[NOT_FINITE])

    @property
    def stop(self) -> bool:
        return self.array[STOP] > 0

    @property
    def replicas_agree(self) -> bool:
        """Whether all ranks put the same checksum (also True when none put one)."""
        low, low2, high, high2 = (int(w) for w in self.array[HASH_LOW:HASH_HIGH_SQUARED + 1])
        return self.size * low2 == low * low and self.size * high2 == high * high
