"""One timeline of all ranks for a browser's trace viewer: what each did when in some steps, on rank 0's clock.

`Recorder` shadows methods of the objects that take the step (the loader, the network, the strategy, the collective) by
timed ones and takes the shadows away after the last traced step: a run without a trace, and the rest of a run with one,
execute the plain methods. Layers are told by the network's own callbacks, so the mathematics knows no clock. With a GPU
the times are those of the host's calls.

The clocks of the ranks are compared before and after the traced steps: rank 0 asks every rank for its time, keeps the
exchange with the shortest round trip, and takes the answer to stand in its middle, wrong by half the round trip at
most (F. Cristian, "Probabilistic clock synchronization", Distributed Computing 3 (1989)); between the two comparisons
the offset moves linearly. Cost: ROUNDS round trips per rank, one after the other, and 0.5 to 1 us per event.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcmlp.comm import messages

DEFAULT_STEPS = 200
WARMUP_STEPS = 5    # the first steps make buffers, plans and prepared messages
ROUNDS = 30         # exchanges per rank and comparison of clocks
CLOCK_TAG = 11
BEHIND = "~"        # begins the name of what goes on behind the thread that takes the steps


class Events:
    """Begin and end of named calls on one rank, in nanoseconds of its clock.

    Local. `put((code, begin, end))` records one event, in the order of their ends; a code below zero stands for step
    -1 - code. One flat list of integers: nothing for the garbage collector to visit, and bounded because the steps are.
    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns):
        self.clock = clock
        self.names: list[str] = []
        self._flat: list[int] = []
        self.put = self._flat.extend

    def code(self, name: str) -> int:
        """Return the number of `name`. Local."""
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def timed(self, name: str, function: Callable) -> Callable:
        """Return `function` so that each call is an event `name`. Local."""
        code, clock, put = self.code(name), self.clock, self.put

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = clock()
            result = function(*args, **kwargs)
            put((code, begin, clock()))
            return result
        return call

    def to_bytes(self) -> bytes:
        """Return the names and events of this rank, for `from_bytes`. Local."""
        head = {"names": self.names, "host": os.uname().nodename}
        return json.dumps(head).encode() + b"\n" + np.array(self._flat, np.int64).tobytes()


@dataclass
class RankEvents:
    """What one rank recorded, as rank 0 gets it; `begins` and `ends` in nanoseconds of that rank's clock."""

    names: list[str]
    host: str
    codes: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


def from_bytes(data: bytes) -> RankEvents:
    """Return what `Events.to_bytes` packed. Local."""
    head, _, body = data.partition(b"\n")
    codes, begins, ends = np.frombuffer(body, np.int64).reshape(-1, 3).T
    return RankEvents(**json.loads(head), codes=codes, begins=begins, ends=ends)


# ---- clocks

def compare_clocks(ask: Callable[[], int], clock: Callable[[], int], rounds: int = ROUNDS) -> tuple[int, int, int]:
    """Return (own time, what the other clock shows more than the own one then, the largest error of that), all ns.

    Local, but for what `ask` does: it returns the other clock's time.
    """
    shortest = None
    for _ in range(rounds):
        sent = clock()
        there = ask()
        took = clock() - sent
        if shortest is None or took < shortest[0]:
            shortest = took, sent + took // 2, there
    took, middle, there = shortest
    return middle, there - middle, (took + 1) // 2


def compare_all_clocks(comm: Any, clock: Callable[[], int] = time.perf_counter_ns) -> np.ndarray:
    """Return (size, 3) int64 of `compare_clocks` for every rank on rank 0, zeros elsewhere. Collective over `comm`."""
    found = np.zeros((comm.size, 3), np.int64)
    now, nothing = np.zeros(1, np.int64), np.zeros(0, np.int64)
    if comm.rank == 0:
        found[0, 0] = clock()
    for rank in range(1, comm.size):
        if comm.rank == 0:
            def ask(rank: int = rank) -> int:
                comm.Send(nothing, rank, CLOCK_TAG)
                comm.Recv(now, rank, CLOCK_TAG)
                return int(now[0])
            found[rank] = compare_clocks(ask, clock)
        elif comm.rank == rank:
            for _ in range(ROUNDS):
                comm.Recv(nothing, 0, CLOCK_TAG)
                now[0] = clock()
                comm.Send(now, 0, CLOCK_TAG)
    return found


def on_first_clock(times: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the ns `times` of a rank's clock as rank 0's, from its rows of `compare_all_clocks`. Local.

    The order of times is kept, so nested events stay nested.
    """
    start, offset, _ = (int(v) for v in before)
    stop, moved = int(after[0]), int(after[1]) - offset
    since = times - (start + offset)
    span = stop - start + moved
    drift = since * (moved / span) if span > 0 else np.zeros(len(times))
    return start + since - np.rint(drift).astype(np.int64)


# ---- the file

def timeline(ranks: list[RankEvents], before: np.ndarray, after: np.ndarray) -> Iterator[str]:
    """Yield the lines of the Chrome trace: JSON object format, one process per rank; thread 0 takes the steps. Local.

    Thread 1 has what goes on behind it: buckets under way, one after the other as they follow on the wire.
    """
    times = [(on_first_clock(r.begins, b, a), on_first_clock(r.ends, b, a))
             for r, b, a in zip(ranks, before, after, strict=True)]
    zero = min((int(begins.min()) for begins, _ in times if len(begins)), default=0)
    uncertainty = [max(int(b[2]), int(a[2])) / 1e3 for b, a in zip(before, after, strict=True)]
    other = {"clock": "rank 0; other ranks by the shortest of several round trips before and after the traced steps",
             "clock_uncertainty_us": uncertainty,
             "clock_offset_us": [int(b[1]) / 1e3 for b in before],
             "clock_drift_us": [int(a[1] - b[1]) / 1e3 for b, a in zip(before, after, strict=True)],
             "ranks": len(ranks)}
    yield '{"displayTimeUnit": "ms", "otherData": ' + json.dumps(other) + ', "traceEvents": ['
    lines = []
    for pid, r in enumerate(ranks):
        for kind, args in (("process_name", {"name": f"rank {pid} {r.host}"}), ("process_sort_index",
                                                                               {"sort_index": pid})):
            lines.append(json.dumps({"name": kind, "ph": "M", "pid": pid, "tid": 0, "args": args}))
        if any(name.startswith(BEHIND) for name in r.names):
            lines.append(json.dumps({"name": "thread_name", "ph": "M", "pid": pid, "tid": 1,
                                     "args": {"name": "messages under way"}}))
    for pid, (r, (begins, ends)) in enumerate(zip(ranks, times, strict=True)):
        names = [json.dumps(name.removeprefix(BEHIND)) for name in r.names]
        threads = [int(name.startswith(BEHIND)) for name in r.names]
        for code, begin, end, step in zip(r.codes.tolist(), (begins - zero).tolist(), (ends - zero).tolist(),
                                          steps_of(r.codes).tolist(), strict=True):
            name, thread = ('"step"', 0) if code < 0 else (names[code], threads[code])
            lines.append(f'{{"name": {name}, "ph": "X", "pid": {pid}, "tid": {thread}, "ts": {begin / 1e3:.3f}, '
                         f'"dur": {(end - begin) / 1e3:.3f}, "args": {{"step": {step}}}}}')
    yield ",\n".join(lines)
    yield "]}"


def steps_of(codes: np.ndarray) -> np.ndarray:
    """Return the number, from 1, of the step that each event belongs to: the one that ends next. Local."""
    marks = np.flatnonzero(codes < 0)
    if not len(marks):
        return np.zeros(len(codes), np.int64)
    following = np.minimum(np.searchsorted(marks, np.arange(len(codes))), len(marks) - 1)
    return -codes[marks[following]]


# ---- recording

class _Ops:
    """The arithmetic with some of its methods timed; the others are looked up once."""

    def __init__(self, ops: Any, **timed: Callable):
        self._ops = ops
        vars(self).update(timed)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._ops, name)
        setattr(self, name, value)
        return value


@dataclass
class Recorder:
    """Records the steps `first_step <= number < stop_step` of a run, then takes itself out of the way.

    Collective over `comm` where it says so. The caller reports the beginning of every step, alike on all ranks.

    step : `sync.step.Step`; loader : `data.loader.Loader`; others : [(owner, method, name of the event)].
    """

    comm: Any
    step: Any
    loader: Any
    first_step: int
    stop_step: int
    others: list[tuple[Any, str, str]] = field(default_factory=list)
    events: Events | None = field(default=None, init=False)
    _undo: list[tuple[Any, str, Any, bool]] = field(default_factory=list, init=False)
    _before: np.ndarray | None = field(default=None, init=False)
    _number: int = field(default=-1, init=False)
    _begin: int = field(default=0, init=False)
    _under_way: list[tuple[int, Any]] = field(default_factory=list, init=False)     # code and operation, as started
    _last_end: int = field(default=0, init=False)

    def begin_step(self, number: int) -> bool:
        """Note that step `number` begins; return whether all is recorded, so that `lines` is due. Collective."""
        if number >= self.stop_step:
            return True
        if self.events is None:
            if number < self.first_step:
                return False
            self.start()
        self._put_ended()
        now = self.events.clock()
        if self._number >= 0:
            self.events.put((-1 - self._number, self._begin, now))
        self._number, self._begin = number, now
        return False

    def start(self) -> None:
        """Compare the clocks and begin to record. Collective."""
        self.step.strategy.finish()
        self.events = Events()
        self._before = compare_all_clocks(self.comm)
        self._watch()

    def lines(self) -> Iterator[str] | None:
        """Stop recording, if it has begun; return the lines of the file on rank 0, None elsewhere. Collective."""
        if self.events is None:
            self.start()
        self.step.strategy.finish()
        self._put_ended()
        if self._number >= 0:
            self.events.put((-1 - self._number, self._begin, self.events.clock()))
        self._unwatch()
        after = compare_all_clocks(self.comm)
        gathered = messages.gather_bytes(self.comm, self.events.to_bytes())
        if gathered is None:
            return None
        return timeline([from_bytes(data) for data in gathered], self._before, after)

    def _shadow(self, owner: Any, name: str, value: Any) -> None:
        own = name in vars(owner)
        self._undo.append((owner, name, vars(owner).get(name), own))
        setattr(owner, name, value)

    def _unwatch(self) -> None:
        while self._undo:
            owner, name, value, own = self._undo.pop()
            if own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)

    def _watch(self) -> None:
        """Put timed methods before the plain ones."""
        step, timed = self.step, self.events.timed
        strategy, collective, network = step.strategy, step.strategy.collective, step.network
        self._shadow(step, "ops", _Ops(step.ops, gather=timed("gather rows", step.ops.gather),
                                       finite=timed("check finite", step.ops.finite),
                                       checksum=timed("checksum", step.ops.checksum)))
        self._shadow(step, "loss", timed("loss", step.loss))
        self._shadow(network, "forward", self._timed_forward(network.forward, network.spec.num_layers))
        self._shadow(network, "backward", self._timed_backward(network.backward, network.spec.num_layers))
        methods = [("reduce_scatter", "reduce"), ("all_gather", "all_gather")]
        for name, method in methods + [("gather_towards", "all_gather")] * collective.narrow:
            self._shadow(collective, name, self._timed_buckets(method, getattr(collective, name), strategy.buckets))
        if strategy.overlaps:
            methods = [("start_reduce_scatter", "reduce"), ("start_all_gather", "all_gather")]
            for name, method in methods + [("start_gather_towards", "all_gather")] * collective.narrow:
                self._shadow(collective, name, self._followed(method, getattr(collective, name), strategy.buckets))
            self.others += [(strategy, "close", "reduce: send"), (strategy, "need", "wait for parameters")]
        waits = [(collective, name, "wait") for name in getattr(collective, "WAITS", ())]
        for owner, method, name in [(self.loader, "batch", "input"), (strategy, "reduce", "reduce"),
                                    (strategy, "update", "update"), (strategy, "share", "share"),
                                    (strategy, "grad_norm", "norm"), *waits, *self.others]:
            self._shadow(owner, method, timed(name, getattr(owner, method)))

    def _timed_buckets(self, name: str, function: Callable, buckets: list) -> Callable:
        """Time a collective; a bucket is known by its bounds."""
        events = self.events
        codes = {id(bucket.bounds): events.code(f"{name} bucket {k}") for k, bucket in enumerate(buckets)}
        other, clock, put = events.code(f"{name} array"), events.clock, events.put

        def call(array: Any, bounds: Any, *rest: Any) -> None:
            begin = clock()
            function(array, bounds, *rest)
            put((codes.get(id(bounds), other), begin, clock()))
        return call

    def _followed(self, name: str, function: Callable, buckets: list) -> Callable:
        """Remember what a collective has started, for `_put_ended`; a bucket is known by its bounds."""
        codes = {id(bucket.bounds): self.events.code(f"{BEHIND}{name} bucket {k}") for k, bucket in enumerate(buckets)}

        def call(array: Any, bounds: Any, *rest: Any) -> Any:
            operation = function(array, bounds, *rest)
            self._under_way.append((codes[id(bounds)], operation))
            return operation
        return call

    def _put_ended(self) -> None:
        """Record what was started and has ended: each from its start, or the end of the one before it, to its end."""
        while self._under_way and self._under_way[0][1].ended:
            code, operation = self._under_way.pop(0)
            begin = max(operation.began, self._last_end)
            if operation.ended > begin:
                self.events.put((code, begin, operation.ended))
                self._last_end = operation.ended

    def _timed_forward(self, function: Callable, num_layers: int) -> Callable:
        """Time each layer of a forward in training; validation is one event, however many batches it has."""
        clock, put = self.events.clock, self.events.put
        codes = [self.events.code(f"forward layer {layer}") for layer in range(num_layers)]
        last = 0

        def on_layer(layer: int) -> None:
            nonlocal last
            now = clock()
            put((codes[layer], last, now))
            last = now

        def call(x: Any, training: bool = False, **kwargs: Any) -> Any:
            nonlocal last
            if not training:
                return function(x, **kwargs)
            last = clock()
            return function(x, training=True, on_layer=on_layer, **kwargs)
        return call

    def _timed_backward(self, function: Callable, num_layers: int) -> Callable:
        """Time each layer of a backward, last layer first."""
        clock, put = self.events.clock, self.events.put
        codes = [self.events.code(f"backward layer {layer}") for layer in range(num_layers)]
        last = 0

        def on_layer(layer: int) -> None:
            nonlocal last
            now = clock()
            put((codes[layer], last, now))
            last = now

        def call(*args: Any, **kwargs: Any) -> None:
            nonlocal last
            last = clock()
            function(*args, on_layer=on_layer, **kwargs)
        return call
