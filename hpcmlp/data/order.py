"""The order of samples: which rows stand in which global batch, at any rank count, without a stored permutation.

Composition: sample k of a shard with n rows has the virtual time (k + 1/2) / n. All samples, sorted by that time (ties
by shard), form one list; global batch t is its t-th run of `global_batch_size`. Shards are used up together, and each
prefix is as proportional as whole numbers allow. Sample k of a shard is its row p(k), p a keyed bijection of the rows.
p is a Feistel network on [0, a) x [0, b), a * b >= n barely, with cycle walking: the few images beyond n are mapped
again (J. Black, P. Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002).
Cost: 20 ns a row and 50 us a call for p; 0.1 us a (step, shard) for the composition, exact in 64-bit integers.
"""

from collections.abc import Sequence
from math import isqrt

import numpy as np

from hpcmlp.errors import DataError
from hpcmlp.ops.counter import MIX32_A, MIX32_B, mix64, mix64_array

ROUNDS = 6
PIECES = 4              # runs of consecutive rows that are mixed in one window
_TABLE_ROWS = 256       # below this a sorted table of random keys is cheaper than the network, and uniform
_BLOCK = 1 << 13        # positions worked on at once: temporaries stay in the cache
_MAX_SHARD_ROWS = 2**31 - 1
_TABLE_ENTRIES = 1 << 20    # 8 MiB
_M1, _M2 = np.uint32(MIX32_A), np.uint32(MIX32_B)
_S15, _S16 = np.uint32(15), np.uint32(16)
_PURPOSE = int.from_bytes(b"order")     # keeps these keys apart from those of dropout


class Bijection:
    """A permutation of 0..n-1 given by a 64-bit key; the same key gives the same permutation everywhere.

    Parameters
    ----------
    n : 0 to 2**31 - 1
    key : 64-bit integer

    Attributes
    ----------
    table : the images of all positions where n is small, else None; then a, b, keys : sides and round keys of the
        network.
    """

    def __init__(self, n: int, key: int):
        self.n = n
        self.table: np.ndarray | None = None
        if n <= _TABLE_ROWS:
            self.table = np.argsort(mix64_array(key, np.arange(n, dtype=np.uint64)), kind="stable")
            return
        # Two nearly equal factors whose product exceeds n as little as possible: then hardly any image lies outside.
        root = isqrt(n)
        self.a = min(range(root, root - min(64, root // 4), -1), key=lambda a: -n % a)
        self.b = -(-n // self.a)
        self.keys = [np.uint32(mix64(key, k) >> 32) for k in range(ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the images of 1-D int64 `positions`, all in 0..n-1, as int64. Local."""
        if self.table is not None:
            return self.table[positions]
        out = np.empty(len(positions), np.int64)
        for start in range(0, len(positions), _BLOCK):
            block = self._network(positions[start:start + _BLOCK].astype(np.uint32))
            # Few images lie outside, if any; each walk stays on its own cycle, so no two meet.
            while block.size and int(block.max()) >= self.n:
                outside = np.flatnonzero(block >= self.n)
                block[outside] = self._network(block[outside])
            out[start:start + _BLOCK] = block
        return out

    def _network(self, x: np.ndarray) -> np.ndarray:
        """Map uint32 values of [0, a * b) onto themselves, one half changed by a hash of the other in each round."""
        a, b = np.uint32(self.a), np.uint32(self.b)
        left = x // b
        right = x - left * b
        hashed, rest = np.empty_like(x), np.empty_like(x)
        for k in range(0, ROUNDS, 2):
            _round(left, right, a, self.keys[k], hashed, rest)
            _round(right, left, b, self.keys[k + 1], hashed, rest)
        left *= b
        left += right
        return left


def _round(half: np.ndarray, other: np.ndarray, modulus: np.uint32, key: np.uint32, hashed: np.ndarray,
           rest: np.ndarray) -> None:
    """Add a hash of `other` to `half` modulo `modulus` (< 2**16), in place; CPUs do 32-bit products in bulk."""
    np.add(other, key, out=hashed)
    hashed *= _M1
    np.right_shift(hashed, _S15, out=rest)
    hashed ^= rest
    hashed *= _M2
    hashed >>= _S16
    hashed *= modulus       # 16 random bits times the modulus: the upper half is uniform below the modulus, nearly
    hashed >>= _S16
    half += hashed
    np.subtract(half, modulus, out=rest)
    np.minimum(half, rest, out=half)        # where half < modulus the difference has wrapped to a huge number


def prefix_counts(shard_rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Count each shard's samples among the first m of all samples in virtual time, for each m of `lengths`.

    Local. A sample's time is compared by floor((2k + 1) * 2**62 / n): times of two shards below 2**31 rows differ by
    more than 2**-62 or not at all, so these 63-bit keys order them exactly. Bisection between bounds on the m-th key
    leaves one candidate a shard after a few rounds; these are sorted.

    Parameters
    ----------
    shard_rows : (S,) int64, each below 2**31
    lengths : (T,) int64 in 0..sum(shard_rows)

    Returns
    -------
    (T, S) int64; row i sums to lengths[i], and no column ever falls
    """
    shards, total = len(shard_rows), int(shard_rows.sum())
    if shards == 1:
        return lengths[:, None].copy()
    out = np.empty((len(lengths), shards), np.int64)
    block = max(1, _BLOCK // max(1, shards))
    for start in range(0, len(lengths), block):
        out[start:start + block] = _prefix_block(shard_rows, lengths[start:start + block], total)
    return out


def _prefix_block(n: np.ndarray, m: np.ndarray, total: int) -> np.ndarray:
    # At virtual time v the shards have given v * total samples, give or take half a sample each.
    top = 2.0**63 - 1024.0
    slack = len(n) + 2
    low = np.clip(((m - slack) / max(1, total) - 1e-14) * top, 0.0, top).astype(np.int64)
    high = np.clip(((m + slack) / max(1, total) + 1e-14) * top, 0.0, top).astype(np.int64)
    counts, ahead = _counts_below(n, low), _counts_below(n, high)       # (T, S)
    while (ahead - counts > 1).any():
        middle = low + (high - low) // 2
        between = _counts_below(n, middle)
        fits = between.sum(axis=1) <= m
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        counts = np.where(fits[:, None], between, counts)
        ahead = np.where(fits[:, None], ahead, between)
    # One sample a shard is left at most in low..high; the first of them, by key and shard, go in as far as m reaches.
    keys = np.where(ahead > counts, _key(n, counts), np.iinfo(np.int64).max)
    place = np.empty_like(keys)
    np.put_along_axis(place, np.argsort(keys, axis=1, kind="stable"), np.arange(len(n))[None, :], axis=1)
    return counts + (place < (m - counts.sum(axis=1))[:, None])


def _key(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return floor((2k + 1) * 2**62 / n), by long division in two steps of 31 bits."""
    n = np.maximum(n, 1)
    quotient, rest = np.divmod((2 * k + 1) << 31, n)
    return (quotient << 31) + (rest << 31) // n


def _counts_below(n: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return how many samples of each shard have a key below `key`: (T, S); no product leaves 63 bits."""
    mask = 2**31 - 1
    upper, lower = (key >> 31)[:, None], (key & mask)[:, None]
    bound = upper * n + ((lower * n + mask) >> 31)      # ceil(key * n / 2**31)
    return (bound + mask) >> 32                         # odd numbers below ceil(key * n / 2**62)


class ShardSequence:
    """The rows of one shard in the order in which one epoch uses them.

    With `window_rows` the shard is cut into pieces of window_rows / PIECES consecutive rows; the pieces are visited in
    keyed order, PIECES of them at a time form a window, and rows are keyed within their window. The last piece of the
    shard may be shorter. Without it the whole shard is one window of one piece.
    """

    def __init__(self, num_rows: int, seed: int, epoch: int, shard: int, window_rows: int | None = None,
                 shuffle: bool = True):
        self.num_rows = num_rows
        self.piece_rows = -(-window_rows // PIECES) if window_rows else max(1, num_rows)
        self.num_pieces = -(-num_rows // self.piece_rows)
        self.num_windows = -(-self.num_pieces // PIECES)
        self._key = (_PURPOSE, seed, epoch, shard)
        self._shuffle = shuffle
        self._windowed = bool(window_rows)
        self._pieces = np.arange(self.num_pieces)
        if shuffle and self._windowed:
            self._pieces = Bijection(self.num_pieces, mix64(*self._key, 0))(self._pieces)
        # Positions from `_gap` on lie behind the short piece; moved up by `_lack` they divide evenly.
        self._lack = self.num_pieces * self.piece_rows - num_rows
        last = int(np.flatnonzero(self._pieces == self.num_pieces - 1)[0]) if num_rows else 0
        self._gap = (last + 1) * self.piece_rows - self._lack
        self._bijections: dict[int, Bijection] = {}

    def window_of(self, position: int) -> int:
        """Return the number of the window that `position` of the sequence lies in. Local."""
        return (position + (self._lack if position >= self._gap else 0)) // (self.piece_rows * PIECES)

    def window_range(self, window: int) -> tuple[int, int]:
        """Return (start, stop): the positions of the sequence that `window` covers. Local."""
        ends = [min(w * PIECES, self.num_pieces) * self.piece_rows for w in (window, window + 1)]
        start, stop = (end - (self._lack if end > self._gap else 0) for end in ends)
        return start, stop

    def window_pieces(self, window: int) -> list[tuple[int, int]]:
        """Return the row ranges (start, stop) that make up `window`, in the order in which it holds them. Local."""
        pieces = self._pieces[window * PIECES:(window + 1) * PIECES].tolist()
        return [(p * self.piece_rows, min((p + 1) * self.piece_rows, self.num_rows)) for p in pieces]

    def within(self, window: int, start: int, stop: int) -> np.ndarray:
        """Return, for positions start..stop of the sequence in `window`, the places in the window's own rows. Local."""
        first, end = self.window_range(window)
        return self._within(window, np.arange(start - first, stop - first), end - first)

    def _within(self, window: int, offsets: np.ndarray, size: int) -> np.ndarray:
        if not self._shuffle:
            return offsets
        bijection = self._bijections.get(window)
        if bijection is None:
            key = mix64(*self._key, window + 1) if self._windowed else mix64(*self._key)
            # Positions come in ascending order, so older windows will not be asked for again.
            self._bijections = {window: Bijection(size, key)}
            bijection = self._bijections[window]
        return bijection(offsets)

    @property
    def bijection(self) -> Bijection | None:
        """What maps positions to rows, where one bijection does for the whole shard and epoch; else None."""
        if self._windowed or not self._shuffle:
            return None
        return Bijection(self.num_rows, mix64(*self._key))

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Return the row numbers at ascending int64 `positions` of the sequence, as int64. Local."""
        if not self._windowed:
            return self._within(0, positions, self.num_rows)
        out = np.empty(len(positions), np.int64)
        done = 0
        while done < len(positions):
            window = self.window_of(int(positions[done]))
            first, end = self.window_range(window)
            stop = int(np.searchsorted(positions, end))
            places = first + self._within(window, positions[done:stop] - first, end - first)
            places += self._lack * (places >= self._gap)
            piece, offset = np.divmod(places, self.piece_rows)
            out[done:stop] = self._pieces[piece] * self.piece_rows + offset
            done = stop
        return out


class Order:
    """The global batches of a split: what each holds, and which part is a rank's.

    A function of (shard_rows, global_batch_size, seed, shuffle, window_rows) alone: nothing here knows how many ranks
    there are before a method is given (rank, size).
    """

    def __init__(self, shard_rows: Sequence[int], global_batch_size: int, seed: int = 0, shuffle: bool = True,
                 window_rows: int | None = None):
        for shard, rows in enumerate(shard_rows):
            if rows > _MAX_SHARD_ROWS:
                raise DataError(f"shard {shard} has {rows} rows; a shard has at most {_MAX_SHARD_ROWS}: prepare the "
                                "data set with more shards.")
        self.shard_rows = np.array(shard_rows, np.int64).reshape(-1)
        self.num_rows = int(self.shard_rows.sum())
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.window_rows = window_rows
        self.steps_per_epoch = -(-self.num_rows // global_batch_size)
        self._table: np.ndarray | None = None

    def global_rows(self, t: int) -> int:
        """Return the number of samples of global batch `t` (the last of an epoch holds the rest). Local."""
        return max(0, min(self.global_batch_size, self.num_rows - t * self.global_batch_size))

    def counts(self, t0: int, t1: int) -> np.ndarray:
        """Return how many samples of each shard come before batches t0, t0 + 1, .., t1: (t1 - t0 + 1, S). Local."""
        if self._table is None and (self.steps_per_epoch + 1) * len(self.shard_rows) <= _TABLE_ENTRIES:
            self._table = self._counts(0, self.steps_per_epoch)
        return self._counts(t0, t1) if self._table is None else self._table[t0:t1 + 1]

    def _counts(self, t0: int, t1: int) -> np.ndarray:
        lengths = np.minimum(np.arange(t0, t1 + 1) * self.global_batch_size, self.num_rows)
        return prefix_counts(self.shard_rows, lengths)

    def parts(self, t0: int, t1: int, rank: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (start, stop), each (t1 - t0, S): the positions in each shard's sequence that fall to `rank`.

        Local. The list of a batch is grouped by shard, in shard order; rank r of P takes its places r*B_t//P up to
        (r+1)*B_t//P.
        """
        counts = self.counts(t0, t1)
        given = np.diff(counts, axis=0)                 # (T, S)
        end = np.cumsum(given, axis=1)
        begin = end - given
        rows = end[:, -1:]
        start = counts[:-1] + np.clip(rank * rows // size - begin, 0, given)
        stop = counts[:-1] + np.clip((rank + 1) * rows // size - begin, 0, given)
        return start, stop

    def touched(self, rank: int, size: int) -> list[int]:
        """Return the numbers of the shards that `rank` needs in an epoch, ascending. Local.

        Exact for up to a million (step, shard) pairs; beyond that from bounds that hold for every batch, so that a few
        shards more may be named.
        """
        if not self.num_rows:
            return []
        if (self.steps_per_epoch + 1) * len(self.shard_rows) <= _TABLE_ENTRIES:
            start, stop = self.parts(0, self.steps_per_epoch, rank, size)
            return np.flatnonzero((stop > start).any(axis=0)).tolist()
        named = np.zeros(len(self.shard_rows), bool)
        for rows in {self.global_rows(0), self.global_rows(self.steps_per_epoch - 1)}:
            first, end = rank * rows // size, (rank + 1) * rows // size
            least, most = self._bounds(rows)
            named |= (least[:-1] < end) & (most[1:] > first)
        return np.flatnonzero(named & (self.shard_rows > 0)).tolist()

    def _bounds(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Bounds, each (S + 1,), of where a shard's samples can begin in the list of any batch of `rows` samples."""
        # Virtual time passes by (rows +- S) / num_rows in a batch, and a shard's share of it is rounded at both ends.
        share = self.shard_rows / self.num_rows
        fewest = np.maximum(0, np.floor(share * (rows - len(share)) - 1)).astype(np.int64)
        most = np.ceil(share * (rows + len(share)) + 1).astype(np.int64)
        before_least, before_most = (np.concatenate(([0], np.cumsum(n))) for n in (fewest, most))
        # What the shards behind must at least take, or can at most take, bounds what lies before them.
        return (np.maximum(before_least, rows - (before_most[-1] - before_most)),
                np.minimum(before_most, rows - (before_least[-1] - before_least)))

    def sequence(self, epoch: int, shard: int) -> ShardSequence:
        """Return the order of the rows of `shard` in `epoch`. Local."""
        return ShardSequence(int(self.shard_rows[shard]), self.seed, epoch, shard, self.window_rows, self.shuffle)
