"""Planned steps with the samples on the device: a block of steps is laid out in tables, queued, then read back.

The host writes per step the learning rate, the corrections of the optimizer and where the rank's part of the batch
lies in each shard; the device finds the rows, trains, decides about the update and notes loss and norm, so that steps
need no word with the host. The first step is queued launch by launch; then the algorithms of the products are chosen by
timing, and the launches are captured: one graph of a step, and one of several steps where a step is short.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from hpcmlp.data.device_order import batch_parts, shard_records
from hpcmlp.ops.launches import CONTROL, RESULT, SHARD, STEP, Kernel

BLOCK_STEPS = 4096
BLOCK_BYTES = 64 << 20      # of the table of parts
TABLE_ROWS = 256            # of a shard that is ordered by a table, at most
GATHER_PIECE = 128          # columns of a row that one warp copies: PIECE of gpu_kernels.cu
GRAPH_STEPS, GRAPH_S = 16, 600e-6   # most steps of one graph, and about how long it takes


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


def _bring(device: Any, values: np.ndarray) -> Any:
    out = device.zeros(max(1, values.size), values.dtype)
    if values.size:
        device.upload(values.reshape(-1), out)
    return out


class PlannedSteps:
    """The steps of one rank that trains alone.

    Local.

    Parameters
    ----------
    network : `nn.planned.PlannedNetwork`.
    samples : DeviceSamples.
    order : `data.order.Order` without windows.
    learning_rate : of the step number, from 0.

    Attributes
    ----------
    graph_steps : steps of the larger graph, 1 before it is captured.
    algorithms : what tuning chose.
    """

    def __init__(self, network: Any, samples: DeviceSamples, order: Any, learning_rate: Callable[[int], float],
                 rank: int = 0, size: int = 1):
        self.network, self.device, self.samples, self.order = network, network.device, samples, order
        self.learning_rate, self._place = learning_rate, (rank, size)
        zeros, shards = self.device.zeros, max(1, len(samples.shards))
        self._lines = max(1, min(BLOCK_STEPS, order.steps_per_epoch, BLOCK_BYTES // (8 * shards)))
        self._steps = zeros(self._lines * STEP.itemsize, np.uint8)
        self._results = zeros(self._lines * RESULT.itemsize, np.uint8)
        self._parts = zeros(self._lines * 2 * shards, np.int32)
        self._records = zeros(shards * SHARD.itemsize, np.uint8)
        self._tables = zeros(shards * TABLE_ROWS + 1, np.int32)
        self._host_results = np.zeros(self._lines, RESULT)
        self._epoch, self._t0, self._t1 = -1, 0, 0      # the block of steps laid out
        self._queued = self._read = 0                   # steps of it that were queued, and read back
        self._launches = [self._gather(), *network.gradient(self._steps),
                          network.sums(self._steps, self._results), network.update()]
        self._replays: list[tuple[int, Callable[[], None]]] = []
        self._warm = False
        self.graph_steps = 1

    def _gather(self) -> Kernel:
        n, s = self.network, self.samples
        warps = n.capacity * -(-n.widths[0] // GATHER_PIECE)
        return Kernel(f"gather_{'bf16' if n.narrow else 'f32'}", -(-warps // 8), 256,
                      (n.control, self._steps, self._records, self._parts, self._tables,
                       np.int32(max(1, len(s.shards))), None, s.x, np.int32(s.is_bytes), s.shift, s.scale, s.y,
                       np.int32(s.target_width), s.weight, np.int32(n.capacity), np.int32(s.width),
                       np.int32(n.widths[0]), n.x[0], n.targets, n.weights))

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
        parts, lines["rows"], lines["first"] = batch_parts(order, t, self._t1, *self._place, self.samples.shards)
        if epoch != self._epoch:
            records, tables = shard_records(order, epoch, self.samples.shards)
            device.upload(records.view(np.uint8), self._records)
            device.upload(tables, self._tables[:len(tables)])
        device.upload(lines.view(np.uint8), self._steps[:lines.nbytes])
        device.upload(parts.reshape(-1), self._parts[:parts.size])
        device.upload(np.zeros(1, CONTROL).view(np.uint8), self.network.control)
        self._epoch, self._t0, self._queued, self._read = epoch, t, 0, 0

    def _launch(self, count: int) -> None:
        if not self._warm:
            self.device.run(self._launches)
            self._warm = True
            count -= 1
        if count and not self._replays:
            self._capture()
        for steps, replay in self._replays:
            while count >= steps:
                replay()
                count -= steps

    def _capture(self) -> None:
        """Choose algorithms, capture one step, and as many as take GRAPH_S together."""
        self.device.tune(self.network.products())
        self._replays = [(1, self.device.capture(self._launches))]
        self.graph_steps = max(1, min(GRAPH_STEPS, int(GRAPH_S / self.estimate_s())))
        if self.graph_steps > 1:
            self._replays.insert(0, (self.graph_steps, self.device.capture(self._launches, self.graph_steps)))

    def estimate_s(self) -> float:
        """Return about how long the products of a step take on the device, seconds. Local."""
        return self.device.seconds(self.device.capture(self.network.products()), 3)
