"""Buckets under way while the ranks compute: reduced behind the backward pass, gathered behind the next forward pass.

A bucket's reduction starts when backward has made its gradients final; its parameters are gathered in the order in
which the next forward pass reads them, and waited for just before. In between somebody must drive the messages: the
computing thread whenever it comes by (`close`, `need`), and, where the MPI library grants it, a daemon thread that
looks every INTERVAL_S while something is under way, and sleeps else. A lock lets one of them into the collective at a
time.

The sums have the order of `SlicedUpdate`, so the results have its bits, given the same buckets and pieces of weights.
Control words travel with the last bucket: what is not finite is on its way by then, and all ranks skip the step.
"""

import math
import threading
import weakref
from collections import deque
from time import perf_counter, sleep
from typing import Any

import numpy as np

from hpcmlp.sync.buckets import Bucket
from hpcmlp.sync.strategy import SlicedUpdate

# Of a core's time 2 % go into looking; 4 MiB at 1 Gbit/s arrive in 60 such intervals.
INTERVAL_S = 5e-4
# One question moves no more than 64 KiB (MPICH over TCP), which 1 Gbit/s brings in an interval: with a single one, a
# message alone on its way took 13.5 ms where the wire needs 9, with three 9.4.
QUESTIONS = 3
# Share of a bucket's time that may go into latency. It is hidden like the rest, so that small buckets do little harm,
# where a large one may leave nothing to hide: of 4, 2, 1, 1/2 and 1/4 MiB the best was near this, and with what is four
# times as large steps took up to 19 % longer (2 and 4 hosts, 1 and 4 Gbit/s).
LATENCY_SHARE = 0.3


def find_bucket_mb(collective: Any) -> float:
    """Return the size of a bucket, MiB, a power of two from 1/16 to 32: the least that is not mostly latency.

    Collective: the links are measured. A hop waits for half of an interval, in the mean. The smaller a bucket, the less
    of the last one's way is left when backward ends.
    """
    least = collective.least_bytes(INTERVAL_S / 2, LATENCY_SHARE) / 2**20
    return 2.0 ** min(5, max(-4, round(math.log2(least))))


class Progress:
    """Drives what a collective has under way, from a thread of its own where that is allowed, and keeps the time.

    Local. Hold `lock` around every call into the collective; call `watch` when something was started; add to
    `exposed_s` the seconds in which the computing thread saw to communication.
    """

    def __init__(self, collective: Any):
        self.collective, self.lock = collective, threading.Lock()
        self.exposed_s = self._flight_s = 0.0
        self._last_end = 0
        self._busy = threading.Event()
        if collective.threads:
            threading.Thread(target=_drive, args=(weakref.ref(self), self._busy), daemon=True).start()
            weakref.finalize(self, self._busy.set)  # lets the thread see that there is nothing left to do

    def watch(self) -> None:
        """Let the thread look after what is under way. Local; the caller holds the lock."""
        self._busy.set()

    def advance(self) -> None:
        """Take what is under way as far as it goes. Local."""
        with self.lock:
            for _ in range(QUESTIONS):
                if self.collective.advance():
                    self._busy.clear()
                    break

    def wait(self, operation: Any) -> None:
        """Return when `operation` has ended, and count its time. Local; without `lock`, which is taken here."""
        with self.lock:
            operation.wait()
        began = max(operation.began, self._last_end)
        self._last_end = max(operation.ended, self._last_end)
        self._flight_s += max(0, self._last_end - began) * 1e-9

    def spent(self) -> tuple[float, float]:
        """Return the seconds since the last call: of the computing thread (`exposed_s`), and with messages under way.

        Local. The second counts from the start of a message to when its end was seen, overlapping ones once, when they
        are waited for.
        """
        spent = self.exposed_s, self._flight_s
        self.exposed_s = self._flight_s = 0.0
        return spent


def _drive(reference: Any, busy: threading.Event) -> None:
    with np.errstate(all="ignore"):     # whether numbers are finite is decided from the control words
        while busy.wait():
            progress = reference()
            if progress is None:
                return
            progress.advance()
            del progress
            sleep(INTERVAL_S)


class Overlapped(SlicedUpdate):
    """The sliced update whose messages travel while the ranks compute.

    Parameters are those of `SlicedUpdate`. A step calls `need` in its forward pass, `close` in its last backward pass,
    `reduce`, `update` and `share`. Between a `share` and the `need` or `finish` that follows the parameters are in
    motion, and nobody else may call MPI.
    """

    overlaps = True

    def __init__(self, collective: Any, buckets: list[Bucket], size: int, params: Any, grads: Any, ops: Any,
                 host: tuple[np.ndarray | None, np.ndarray | None] = (None, None)):
        super().__init__(collective, buckets, size, params, grads, ops, host)
        self.progress = Progress(collective)
        self._reductions: list[Any] = []
        self._gathers: deque[tuple[int, Bucket, Any]] = deque()

    def close(self, start: int, words: np.ndarray) -> None:
        """The gradient from `start` on is final: start to reduce the buckets there, `words` with the last one.

        Collective over the ranks of a node, which wait for each other here.
        """
        began = perf_counter()
        while len(self._reductions) < len(self.buckets) and self.buckets[len(self._reductions)].start >= start:
            bucket = self.buckets[len(self._reductions)]
            part = self._sent_grads[bucket.start:bucket.stop]
            self._grads.fetch(bucket.start, bucket.stop)()
            last = len(self._reductions) + 1 == len(self.buckets)
            with self.progress.lock:
                self._reductions.append(self.collective.start_reduce_scatter(part, bucket.bounds,
                                                                             words if last else None))
                self.progress.watch()
        self.progress.advance()
        self.progress.exposed_s += perf_counter() - began

    def reduce(self, words: np.ndarray) -> None:
        """Wait for the sums of the gradient and of the control words over the ranks.

        Collective. Afterwards `grads` holds the sum in this rank's ranges (elsewhere anything), `words` the sums.
        """
        self.close(0, words)    # counts its own time
        began = perf_counter()
        for own, operation in zip(self._owned, self._reductions, strict=True):
            self.progress.wait(operation)
            self._grads.put(*own)
        self._reductions.clear()
        self._grads.settle()
        self.progress.exposed_s += perf_counter() - began

    def share(self) -> None:
        """Start to give every rank the updated parameters of all owners, first layers first. Collective."""
        began = perf_counter()
        arrivals = [self._params.fetch(*own) for own in self._owned]
        for k in reversed(range(len(self.buckets))):
            arrivals[k]()
            with self.progress.lock:
                self._gathers.append((k, self.buckets[k], self._start_share(k, self.buckets[k])))
                self.progress.watch()
        self.progress.exposed_s += perf_counter() - began

    def need(self, start: int, stop: int) -> None:
        """Return when the parameters before `stop` stand. Collective over the ranks of a node."""
        began = perf_counter()
        while self._gathers and self._gathers[0][1].start < stop:
            _, bucket, operation = self._gathers.popleft()
            self.progress.wait(operation)
            self._params.put(bucket.start, bucket.stop)
            self._params.settle()
        if self._gathers:
            self.progress.advance()
        self.progress.exposed_s += perf_counter() - began

    def finish(self) -> None:
        """Return when all parameters stand and nothing is under way. Collective over the ranks of a node."""
        self.need(0, self._sent_params.size)

    def whole(self, owned: Any, keep: bool = True) -> np.ndarray | None:
        self.finish()
        return super().whole(owned, keep)

    def carried(self, keep: bool = True) -> dict[str, np.ndarray]:
        self.finish()
        return super().carried(keep)
