"""Batches from files that do not fit in memory: a thread reads windows ahead and assembles the next batches.

The windows of `data.order` bound what must be in memory: of each shard in use the window that batches are taken from,
and the one after it. That one is read piece by piece whenever no batch is due: the shards all come to the ends of their
windows at about the same step, and must not stall it. The thread has its own file handles. An error in it is kept, and
raised by `batch` when that batch is asked for which it prevented.
"""

import os
import threading
import weakref
from collections import deque

import numpy as np

from hpcmlp.data.manifest import Manifest
from hpcmlp.data.order import PIECES, Order, ShardSequence
from hpcmlp.data.samples import Batch, Samples, allocate, open_shard, read_rows
from hpcmlp.data.shards import ShardReader

_OPEN_FILES = 128       # more shards than these are opened anew for each read
_PLAN_STEPS = 64


class Streamed:
    """One rank's batches of a split, read as they are used.

    Parameters
    ----------
    order : the order of the split, with window_rows
    shards : numbers of the shards that (rank, size) touches
    depth : batches assembled ahead
    verify : compare each shard's sha256, once, before the first batch
    """

    def __init__(self, directory: str | os.PathLike, manifest: Manifest, split: str, order: Order, shards: list[int],
                 rank: int, size: int, depth: int = 2, verify: bool = True):
        self._order = order
        self._rank, self._size = rank, size
        self._readers: dict[int, ShardReader] = {}
        keep_open = len(shards) <= _OPEN_FILES
        self._ahead: _Ahead | None = None
        self._next: tuple[int, int] | None = None
        self._lent: Samples | None = None
        try:
            for shard in shards:
                self._readers[shard] = open_shard(directory, manifest, split, shard, verify)
                if not keep_open:
                    self._readers[shard].close()
        except BaseException:
            self.close()
            raise
        local_rows = -(-order.global_rows(0) // size)
        self._buffers = [allocate(local_rows, manifest) for _ in range(depth + 1)]
        self._windows = {shard: _ShardWindows(self._readers[shard], manifest, shard, order, keep_open)
                         for shard in shards}
        self._identity = np.arange(local_rows)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all buffers of samples; they are made once and stay."""
        return (sum(buffer.nbytes for buffer in self._buffers)
                + sum(windows.memory_bytes for windows in self._windows.values()))

    def prefetch(self, epoch: int, t: int) -> None:
        """Let the thread begin at batch `t` of `epoch`, unless that is what it is at. Local."""
        if self._next != (epoch, t):
            self.close_thread()
            buffers = [buffer for buffer in self._buffers if buffer is not self._lent]
            self._ahead = _Ahead(self._order, self._windows, buffers, self._rank, self._size, epoch, t)
            self._next = (epoch, t)
            # The thread keeps `_ahead` alive, not this object: when this one goes, the thread ends.
            self._finalizer = weakref.finalize(self, _Ahead.end, self._ahead)

    def batch(self, epoch: int, t: int) -> Batch:
        """Return this rank's share of batch `t` of `epoch`; its arrays hold until the next call.

        Local. Waits for the thread where it must; raises what the thread ran into.
        """
        self.prefetch(epoch, t)
        if self._lent is not None:
            self._ahead.give_back(self._lent)
            self._lent = None
        try:
            rows, samples = self._ahead.take()
        except BaseException:
            self.close_thread()
            raise
        self._lent = samples
        self._next = (epoch, t + 1) if t + 1 < self._order.steps_per_epoch else (epoch + 1, 0)
        weights = None if samples.weight is None else samples.weight[:rows]
        global_rows = self._order.global_rows(t)
        return Batch(rows, self._rank * global_rows // self._size, global_rows, samples.x, self._identity[:rows],
                     samples.y[:rows], weights)

    def close_thread(self) -> None:
        """End the thread, if one runs, and wait for its end. Local."""
        if self._ahead is not None:
            self._finalizer()
        self._ahead = self._next = None

    def close(self) -> None:
        """End the thread and close the files. Local."""
        self.close_thread()
        for reader in self._readers.values():
            reader.close()


class _Ahead:
    """The thread that assembles batches from (epoch, t) on, and the queue to the one that uses them."""

    def __init__(self, order: Order, windows: dict[int, "_ShardWindows"], buffers: list[Samples], rank: int, size: int,
                 epoch: int, t: int):
        self._order, self._windows = order, windows
        self._rank, self._size = rank, size
        self._free, self._ready = deque(buffers), deque()
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, args=(epoch, t), name="hpcmlp-prefetch", daemon=True)
        self.thread.start()

    def end(self) -> None:
        """End the thread and wait until it has, after the read it is in. Local.

        Also at the interpreter's exit: a thread that is stopped there inside h5py takes its lock along, and the exit,
        which closes files, would wait for ever.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.thread.join()

    def take(self) -> tuple[int, Samples]:
        """Return (rows, samples) of the next batch; raise the thread's error when there will be none. Local."""
        with self._changed:
            while not self._ready:
                if self._error is not None:
                    raise self._error
                self._changed.wait()
            return self._ready.popleft()

    def give_back(self, samples: Samples) -> None:
        """Let the thread fill `samples` again. Local."""
        with self._changed:
            self._free.append(samples)
            self._changed.notify_all()

    def _run(self, epoch: int, t: int) -> None:
        try:
            for share in self._shares(epoch, t):
                buffer = self._free_buffer()
                if buffer is None:
                    return
                rows = self._fill(buffer, *share)
                with self._changed:
                    self._ready.append((rows, buffer))
                    self._changed.notify_all()
        except BaseException as error:      # whatever it is, the thread that asks for batches must hear of it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _shares(self, epoch: int, t: int):
        """Yield (epoch, starts, stops) for one batch after another, without end."""
        while True:
            while t < self._order.steps_per_epoch:
                end = min(t + _PLAN_STEPS, self._order.steps_per_epoch)
                for start, stop in zip(*self._order.parts(t, end, self._rank, self._size), strict=True):
                    yield epoch, start.tolist(), stop.tolist()
                t = end
            epoch, t = epoch + 1, 0

    def _free_buffer(self) -> Samples | None:
        """Return a buffer as soon as one is free; until then read ahead. None when told to stop."""
        while True:
            with self._changed:
                if self._stopped:
                    return None
                if self._free:
                    return self._free.popleft()
            if not any(windows.read_ahead() for windows in self._windows.values()):
                with self._changed:
                    while not self._free and not self._stopped:
                        self._changed.wait()

    def _fill(self, out: Samples, epoch: int, starts: list[int], stops: list[int]) -> int:
        done = 0
        for shard, windows in self._windows.items():
            if stops[shard] > starts[shard]:
                windows.gather(epoch, starts[shard], stops[shard], out, done)
                done += stops[shard] - starts[shard]
        return done


class _Window:
    """Arrays for the rows of one window, in the order of its pieces, and how many pieces are in."""

    def __init__(self, samples: Samples):
        self.samples = samples
        self.place: tuple[int, int] | None = None       # (epoch, window)
        self.pieces: list[tuple[int, int]] = []         # still to read
        self.filled = 0                                 # rows
        self.start = self.stop = 0                      # positions in the shard's sequence
        self.index = np.empty(0, np.int64)              # position - start -> row of `samples`


class _ShardWindows:
    """The window of a shard that batches are taken from, and the one after it."""

    def __init__(self, reader: ShardReader, manifest: Manifest, shard: int, order: Order, keep_open: bool):
        self._reader, self._manifest = reader, manifest
        self._shard, self._order = shard, order
        self._keep_open = keep_open
        rows = min(order.sequence(0, shard).piece_rows * PIECES, int(order.shard_rows[shard]))
        self._now, self._then = (_Window(allocate(rows, manifest)) for _ in range(2))
        self._sequences: dict[int, ShardSequence] = {}

    @property
    def memory_bytes(self) -> int:
        """Bytes of both windows."""
        return self._now.samples.nbytes + self._then.samples.nbytes

    def gather(self, epoch: int, start: int, stop: int, out: Samples, at: int) -> None:
        """Copy the samples at positions start..stop of the shard's sequence to out[at:]. Local."""
        sequence = self._sequence(epoch)
        while start < stop:
            window = self._require(epoch, sequence.window_of(start))
            end = min(stop, window.stop)
            index = window.index[start - window.start:end - window.start]
            rows = slice(at, at + end - start)
            # mode: with "raise", take would copy to a buffer of its own first
            np.take(window.samples.x, index, axis=0, out=out.x[rows], mode="clip")
            np.take(window.samples.y, index, axis=0, out=out.y[rows], mode="clip")
            if out.weight is not None:
                np.take(window.samples.weight, index, out=out.weight[rows], mode="clip")
            at += end - start
            start = end

    def read_ahead(self) -> bool:
        """Read one piece of the window after the one in use; False when it is whole. Local."""
        if self._now.place is None:
            return False
        epoch, number = self._now.place
        following = (epoch, number + 1)
        if number + 1 == self._sequence(epoch).num_windows:
            following = (epoch + 1, 0)
        if self._then.place != following:
            self._begin(self._then, *following)
        return self._read_piece(self._then)

    def _require(self, epoch: int, number: int) -> _Window:
        """Return the window, whole, as the one in use."""
        if self._now.place != (epoch, number):
            self._now, self._then = self._then, self._now
        if self._now.place != (epoch, number):
            self._begin(self._now, epoch, number)
        while self._read_piece(self._now):
            pass
        return self._now

    def _begin(self, window: _Window, epoch: int, number: int) -> None:
        sequence = self._sequence(epoch)
        window.pieces = sequence.window_pieces(number)
        window.filled = 0
        window.start, window.stop = sequence.window_range(number)
        window.index = sequence.within(number, window.start, window.stop)
        window.place = (epoch, number)

    def _read_piece(self, window: _Window) -> bool:
        if not window.pieces:
            return False
        start, stop = window.pieces[0]
        read_rows(self._reader, self._manifest, start, stop, window.samples, window.filled)
        del window.pieces[0]
        window.filled += stop - start
        if not self._keep_open:
            self._reader.close()
        return True

    def _sequence(self, epoch: int) -> ShardSequence:
        """The sequence of this epoch; only this and the next one are in use at a time."""
        if epoch not in self._sequences:
            self._sequences = {e: s for e, s in self._sequences.items() if abs(e - epoch) <= 1}
            self._sequences[epoch] = self._order.sequence(epoch, self._shard)
        return self._sequences[epoch]
