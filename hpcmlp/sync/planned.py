"""Planned steps with the samples on the device: a block of steps is laid out in tables, queued, then read back.

The host writes per step the learning rate, the corrections of the optimizer and where the rank's part of the batch
lies in each shard; the device finds the rows, trains, decides about the update and notes loss and norm, so that steps
need no word with the host. The first step is queued launch by launch; then the ways to compute its products are chosen
by timing, and the launches are captured: one graph of a step, and one of several steps where a step is short, or where
it is faster to let updates run beside the step behind them.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from hpcmlp.data.device_order import batch_parts, shard_records
from hpcmlp.ops.launches import CONTROL, RESULT, SHARD, STEP, Kernel, on_one_stream
from hpcmlp.ops.small_products import together

BLOCK_STEPS = 4096
BLOCK_BYTES = 64 << 20      # of the table of parts
TABLE_ROWS = 256            # of a shard that is ordered by a table, at most
GATHER_PIECE = 128          # columns of a row that one warp copies: PIECE of gpu_kernels.cu
GRAPH_STEPS, GRAPH_S = 16, 600e-6   # most steps of one graph, and about how long it takes
BESIDE_ELEMENTS = 1 << 22           # fewest parameters whose update is tried beside the next step
BESIDE_STEPS, BESIDE_TRIAL = (8, 4, 2), 4           # steps of such graphs, and of the one that is timed
BESIDE = ((1, 16), (2, 16), (2, 32))                # ways to share the device: `PlannedNetwork.update_beside`


class DeviceSamples:
    """The samples of a rank in the device's memory.

    Local.

    Parameters
    ----------
    samples : `data.samples.Samples` of the shards `shards`, one after the other.
    shift, scale : (d,) lists, or None.
    """

    def __init__(self, device: Any, samples: Any, shards: list[int], shift: Any = None, scale: Any = None):
        self.shards, self.width = shards, samples.x.shape[1]
        self.is_bytes = samples.x.dtype == np.uint8
        self.target_width = 0 if samples.y.ndim == 1 else samples.y.shape[1]
        self.x, self.y = _bring(device, samples.x), _bring(device, samples.y)
        self.weight, self.shift, self.scale = (
            None if v is None else _bring(device, np.asarray(v, np.float32)) for v in (samples.weight, shift, scale))


class FedSamples:
    """The samples of one batch at a time, sent from the host: for data that do not fit in the device's memory.

    Local. Batch after batch takes one of two places in turn; a place looks to a step like samples that are resident.

    Parameters
    ----------
    capacity : the most rows of a batch.
    x_dtype, width, target_width, weighted : of the samples; `target_width` 0 for classes.
    """

    shards = (0,)

    def __init__(self, device: Any, capacity: int, x_dtype: Any, width: int, target_width: int, weighted: bool,
                 shift: Any = None, scale: Any = None):
        shapes = [(capacity, width), (capacity, target_width) if target_width else (capacity,), (capacity,)]
        kinds = [x_dtype, np.float32 if target_width else np.int32, np.float32]
        self._feed = device.make_feed([(int(np.prod(s)), k) for s, k in zip(shapes, kinds, strict=True)])
        self._host = [[array.reshape(s) for array, s in zip(place, shapes, strict=True)] for place in self._feed.host]
        self._weighted = weighted
        shift, scale = (None if v is None else _bring(device, np.asarray(v, np.float32)) for v in (shift, scale))
        self.places = [SimpleNamespace(shards=self.shards, x=x, y=y, weight=weight if weighted else None, shift=shift,
                                       scale=scale, width=width, is_bytes=np.dtype(x_dtype) == np.uint8,
                                       target_width=target_width) for x, y, weight in self._feed.device]

    def put(self, batch: Any, place: int) -> None:
        """Send `batch` (`data.samples.Batch`) to a place, once what has used it is over. Local."""
        self._feed.wait(place)
        x, y, weight = self._host[place]
        np.take(batch.source, batch.index, axis=0, out=x[:batch.rows])
        y[:batch.rows] = batch.targets
        if self._weighted:
            weight[:batch.rows] = batch.weights
        self._feed.send(place)

    def used(self, place: int) -> None:
        """Note that the step that reads this place is queued. Local."""
        self._feed.used(place)


def _bring(device: Any, values: np.ndarray) -> Any:
    out = device.zeros(max(1, values.size), values.dtype)
    if values.size:
        device.upload(values.reshape(-1), out)
    return out


class PlannedSteps:
    """The steps of one rank: whole ones where it trains alone or the ranks' GPUs speak with each other, else their
    gradients and, apart from these, the updates.

    Local.

    Parameters
    ----------
    network : `nn.planned.PlannedNetwork`.
    samples : DeviceSamples, or FedSamples: then every step is given its batch by `feed` before it is queued.
    order : `data.order.Order`, for DeviceSamples without windows.
    learning_rate : of the step number, from 0.
    alone : whether a step needs nothing from other ranks, or from their hosts.
    exchange : `comm.nccl.Nccl`, or None: then whole steps of several ranks are captured, collectives included.
    beside : the way, one of `BESIDE`, in which updates run beside the next step; (): in none; None: the fastest.

    Attributes
    ----------
    graph_steps : steps of the larger graph, 1 before it is captured.
    launches : those of one step.
    way_times : way of `BESIDE`, or () -> seconds of `BESIDE_TRIAL` steps, where that was timed.
    algorithms : product -> what was chosen for it; may be set before the first step, to go on with the same.
    """

    def __init__(self, network: Any, samples: DeviceSamples, order: Any, learning_rate: Callable[[int], float],
                 rank: int = 0, size: int = 1, alone: bool = True, exchange: Any = None,
                 beside: tuple[int, ...] | None = None):
        self.network, self.device, self.samples, self.order = network, network.device, samples, order
        self.learning_rate, self._rank_of = learning_rate, (rank, size)
        zeros, shards = self.device.zeros, max(1, len(samples.shards))
        self._lines = max(1, min(BLOCK_STEPS, order.steps_per_epoch,  # the same on all ranks
                                 BLOCK_BYTES // (8 * len(order.shard_rows))))
        self._steps = zeros((self._lines + 1) * STEP.itemsize, np.uint8)    # a line of no rows behind the last
        self._results = zeros(self._lines * RESULT.itemsize, np.uint8)
        self._parts = zeros(self._lines * 2 * shards, np.int32)
        self._records = zeros(shards * SHARD.itemsize, np.uint8)
        self.fed = isinstance(samples, FedSamples)
        self._place = 0     # of fed samples, in use next
        self._tables = zeros(max(network.capacity, shards * TABLE_ROWS + 1), np.int32)
        self._host_results, self._host_steps = np.zeros(self._lines, RESULT), np.zeros(0, STEP)
        self._host_control = np.zeros(1, CONTROL)
        self._epoch, self._t0, self._t1 = -1, 0, 0      # the block of steps laid out
        self._queued = self._read = 0                   # steps of it that were queued, and read back
        self._exchange, self.beside = exchange, beside
        places = samples.places if self.fed else [samples]
        self._lists = [self._list(alone, self._gather(place)) for place in places]
        self.launches = self._lists[0]
        self._replays: list[tuple[int, Callable[[], None]]] = []    # of fed samples one for each place
        self._warm, self._alone = False, alone
        self.algorithms: dict[str, str] = {}
        self.graph_steps = 1
        self.way_times: dict[Any, float] = {}

    def _list(self, alone: bool, gather: Kernel) -> list[Any]:
        """The launches of a step, or of its gradient where other ranks' hosts take part."""
        network, exchange, tables = self.network, self._exchange, (self._steps, self._results)
        gradient = [gather, *network.gradient(self._steps)]
        if exchange is not None:
            words, read = network.words, network.copy if network.narrow else network.params
            return [*gradient, lambda: exchange.sum_parts(network.grads),
                    network.sums(*tables, closes=False, part=network.ranges[0]), lambda: exchange.sum(words),
                    network.close(*tables), *network.update(), lambda: exchange.gather_parts(read)]
        if alone:
            return [*gradient, network.sums(*tables), *network.update()]
        return [*network.narrow_params(), *gradient, network.sums(*tables, closes=False)]

    def _gather(self, s: Any) -> Kernel:
        n = self.network
        warps = n.capacity * -(-n.widths[0] // GATHER_PIECE)
        return Kernel(f"gather_{'bf16' if n.narrow else 'f32'}", -(-warps // 8), 256,
                      (n.control, self._steps, self._records, self._parts, self._tables,
                       np.int32(max(1, len(s.shards))), None, s.x, np.int32(s.is_bytes), s.shift, s.scale, s.y,
                       np.int32(s.target_width), s.weight, np.int32(n.capacity), np.int32(s.width),
                       np.int32(n.widths[0]), n.x[0], n.targets, n.weights))

    def feed(self, batch: Any) -> None:
        """Send the batch of the step that is queued or taken next. Local."""
        self.samples.put(batch, self._place)

    def queue(self, number: int, count: int = 1) -> None:
        """Queue the steps number .. number + count - 1 of the run; they lie in one epoch. Local."""
        epoch, t = divmod(number, self.order.steps_per_epoch)
        while count:
            if (epoch, t) != (self._epoch, self._t0 + self._queued) or t >= self._t1:
                assert self._read == self._queued, "results of the block before must be read first"
                self._lay_out(epoch, t)
            now = min(count, self._t1 - t)
            self._launch(now)
            self._queued += now
            count, t = count - now, t + now
            assert not count or self._read == self._queued, "one block at a time"

    def room(self, number: int) -> int:
        """Return how many steps from `number` on can be queued before results must be read. Local."""
        epoch, t = divmod(number, self.order.steps_per_epoch)
        if epoch == self._epoch and self._t0 + self._queued == t < self._t1:
            return self._t1 - t
        return min(self._lines, self.order.steps_per_epoch - t) if self._read == self._queued else 0

    def take(self, number: int) -> np.ndarray:
        """Compute the gradient of step `number`, and wait for it. Local.

        Returns the control block, a record of `ops.launches.CONTROL`: loss, weight, square and bad are of this rank.
        """
        epoch, t = divmod(number, self.order.steps_per_epoch)
        if epoch != self._epoch or not self._t0 <= t < self._t1:
            self._lay_out(epoch, t)
        self._host_control[:] = 0
        self._host_control["at"] = t - self._t0
        self.device.upload(self._host_control.view(np.uint8), self.network.control)
        self._launch(1)
        self.device.download(self.network.control, self._host_control.view(np.uint8))
        return self._host_control[0]

    def line(self, number: int) -> np.ndarray:
        """Return the line of the table, a record of `ops.launches.STEP`, of the step that was taken last. Local."""
        return self._host_steps[number % self.order.steps_per_epoch - self._t0]

    def update(self, number: int, factor: float) -> None:
        """Update this rank's ranges with `factor` times the gradient, as step `number` has it. Local."""
        line, control = self.line(number), self._host_control
        control["skip"], control["factor"] = 0, factor
        for name in ("rate", "keep", "second", "starts"):
            control[name] = line[name]
        self.device.upload(control.view(np.uint8), self.network.control)
        self.device.run(self.network.update())
        self.device.synchronize()

    def complete(self) -> None:
        """Give every rank the parameters of all owners as they are, where steps gather only what products read: the
        bf16 copy, half the bytes. Collective with an exchange; it waits.
        """
        if self._exchange is not None and self.network.narrow:
            self._exchange.gather_parts(self.network.params)
            self.device.synchronize()

    def results(self) -> np.ndarray:
        """Wait for the queued steps and return those records not returned before, of `ops.launches.RESULT`. Local."""
        self.device.download(self._results, self._host_results.view(np.uint8))
        fresh = self._host_results[self._read:self._queued].copy()
        self._read = self._queued
        return fresh

    def _lay_out(self, epoch: int, t: int) -> None:
        """Write the tables of the steps from batch `t` on."""
        order, device, per_epoch = self.order, self.device, self.order.steps_per_epoch
        self._t1 = min(t + self._lines, per_epoch)
        lines = np.zeros(self._t1 - t, STEP)
        first = epoch * per_epoch + t
        self.network.step_lines(lines, first, [self.learning_rate(first + k) for k in range(len(lines))])
        parts, lines["rows"], lines["first"] = batch_parts(order, t, self._t1, *self._rank_of, self._all_shards())
        if self.fed:    # row i of the batch is row i of the place that it was sent to
            parts = np.zeros((len(lines), 2, 1), np.int32)
        if epoch != self._epoch:
            records, tables = self._order_tables(epoch)
            device.upload(records.view(np.uint8), self._records)
            device.upload(tables, self._tables[:len(tables)])
        self._host_steps = lines
        device.upload(lines.view(np.uint8), self._steps[:lines.nbytes])
        device.upload(parts.reshape(-1), self._parts[:parts.size])
        device.upload(np.zeros(1, CONTROL).view(np.uint8), self.network.control)
        self._epoch, self._t0, self._queued, self._read = epoch, t, 0, 0

    def _all_shards(self) -> list[int]:
        return list(range(len(self.order.shard_rows))) if self.fed else self.samples.shards

    def _order_tables(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if not self.fed:
            return shard_records(self.order, epoch, self.samples.shards)
        return np.zeros(1, SHARD), np.arange(self.network.capacity, dtype=np.int32)

    def _launch(self, count: int) -> None:
        if self.fed:
            self._launch_fed()
            return
        if not self._warm:
            if self.algorithms:
                self.device.tune(self.network.products(), self.algorithms)
            self.device.run(self.launches)
            self._warm = True
            count -= 1
        if count and not self._replays:
            self._capture()
        for steps, replay in self._replays:
            while count >= steps:
                replay()
                count -= steps

    def _launch_fed(self) -> None:
        """Queue the step that reads the place of the last batch that was sent."""
        place, self._place = self._place, 1 - self._place
        if self._warm and not self._replays:
            self.algorithms = self.device.tune(self.network.products(), self.algorithms)
            self._choose_streams()
            self._replays = [(1, self.device.capture(launches)) for launches in self._lists]
        if self._replays:
            self._replays[place][1]()
        else:
            if self.algorithms:
                self.device.tune(self.network.products(), self.algorithms)
            self.device.run(self._lists[place])
            self._warm = True
        self.samples.used(place)

    def _capture(self) -> None:
        """Choose algorithms, capture one step, and as many as take GRAPH_S together."""
        self.algorithms = self.device.tune(self.network.products(), self.algorithms)
        self._choose_streams()
        self._replays = [(1, self.device.capture(self.launches))]
        if not self._alone:
            return
        self.graph_steps = max(1, min(GRAPH_STEPS, int(GRAPH_S / self.estimate_s())))
        if self._exchange is not None:
            self.graph_steps = self._exchange.least(self.graph_steps)
        if self.graph_steps > 1:
            self._replays.insert(0, (self.graph_steps, self.device.capture(self.launches, self.graph_steps)))
        if self._exchange is None:
            self._overlap()

    def _overlap(self) -> None:
        """Capture graphs of several steps whose updates run beside the step behind them, where that is faster."""
        tried = self.network.layout.size >= BESIDE_ELEMENTS and self._t1 - self._t0 >= BESIDE_TRIAL
        if self.beside is None:
            self.beside = self._fastest_way() if tried else ()
        if not self.beside:
            return
        self._replays = [*((steps, self.device.capture(self._beside(steps, *self.beside))) for steps in BESIDE_STEPS),
                         self._replays[-1]]
        self.graph_steps = BESIDE_STEPS[0]

    def _beside(self, steps: int, whole: int, blocks: int) -> list[Any]:
        """The launches of several steps; the last update has no step beside it."""
        update = len(self.network.update())
        step = self.launches[:-update]
        return [*step, *self.network.update_beside(step, whole, blocks) * (steps - 1), *self.launches[-update:]]

    def _fastest_way(self) -> tuple[int, ...]:
        """Time whole steps with the updates behind and beside them; all that they change is put back."""
        network, device = self.network, self.device
        changed = [v for v in (network.params, network.copy, network.averaged, *network.state.values(), network.control,
                               self._results) if v is not None]
        saved = [np.empty(v.size, v.dtype) for v in changed]
        for array, host in zip(changed, saved, strict=True):
            device.download(array, host)
        replays: dict[Any, Any] = {(): device.capture(self.launches, BESIDE_TRIAL)} \
            | {way: device.capture(self._beside(BESIDE_TRIAL, *way)) for way in BESIDE}
        times: dict[Any, list[float]] = {way: [] for way in replays}
        for _ in range(3):      # in turn, as a device under load changes its clock
            for way, replay in replays.items():
                device.upload(np.zeros(1, CONTROL).view(np.uint8), network.control)
                times[way].append(device.seconds(replay, 1))
        for array, host in zip(changed, saved, strict=True):
            device.upload(host, array)
        self.way_times = {way: sorted(values)[1] for way, values in times.items()}
        return min(self.way_times, key=self.way_times.get)  # the first of equal ones

    def _choose_streams(self) -> None:
        """Take both streams, one, or one with several products in a launch, as a gradient is fastest.

        Its bits are the same in any way.
        """
        gradient, device = self.network.gradient(self._steps), self.device
        arrangements = [lambda launches: launches, on_one_stream]
        if len(together(gradient, device.address)) < len(on_one_stream(gradient)):
            arrangements.append(lambda launches: together(launches, device.address))
        times = [device.seconds(device.capture(arrange(gradient), 2), 3) for arrange in arrangements]
        fastest = arrangements[times.index(min(times))]
        self._lists = [fastest(launches) for launches in self._lists]
        self.launches = self._lists[0]

    def estimate_s(self) -> float:
        """Return about how long the products of a step take on the device, seconds. Local."""
        return self.device.seconds(self.device.capture(on_one_stream(self.network.products())), 3)
