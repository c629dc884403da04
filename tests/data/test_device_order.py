"""The tables that a device reads name the same rows as the order on the host, on any rank."""

import numpy as np
import pytest

from hpcmlp.data.device_order import batch_parts, shard_records
from hpcmlp.data.order import Order
from hpcmlp.errors import Unavailable
from hpcmlp.ops.emulated import EmulatedDevice
from hpcmlp.ops.launches import CONTROL, STEP, Kernel

SHARDS = [700, 0, 90, 3, 1201]


def test_the_device_gathers_the_rows_of_the_order():
    try:
        device = EmulatedDevice()
    except Unavailable as reason:
        pytest.skip(str(reason))
    order = Order(SHARDS, 64, seed=9)
    number_of = np.arange(sum(SHARDS), dtype=np.int32)      # a row's target is its number
    source = number_of.astype(np.float32)
    seen = []
    for rank in range(3):
        shards = list(range(len(SHARDS)))
        records, tables = shard_records(order, 2, shards)
        parts, rows, _ = batch_parts(order, 0, order.steps_per_epoch, rank, 3, shards)
        lines, control = np.zeros(order.steps_per_epoch, STEP), np.zeros(1, CONTROL)
        lines["rows"] = rows
        x, targets, weights = np.zeros(22 * 16, np.float32), np.zeros(22, np.int32), np.zeros(22, np.float32)
        for t in range(order.steps_per_epoch):
            control["at"] = t
            device.run([Kernel("gather_f32", 3, 256, (
                control.view(np.uint8), lines.view(np.uint8), records.view(np.uint8), parts.reshape(-1), tables,
                np.int32(len(SHARDS)), None, source, np.int32(0), None, None, number_of, np.int32(0), None,
                np.int32(22), np.int32(1), np.int32(16), x, targets, weights))])
            start, stop = order.parts(t, t + 1, rank, 3)
            bases = np.cumsum([0, *SHARDS])
            wanted = np.concatenate([order.sequence(2, k).rows(np.arange(start[0, k], stop[0, k])) + bases[k]
                                     for k in range(len(SHARDS))])
            assert targets[:rows[t]].tolist() == wanted.tolist()
            assert x.reshape(22, 16)[:rows[t], 0].tolist() == wanted.tolist() and not x.reshape(22, 16)[:, 1:].any()
            assert weights.tolist() == [1.0] * rows[t] + [0.0] * (22 - rows[t])
            seen += wanted.tolist()
    assert sorted(seen) == list(range(sum(SHARDS)))


def test_windows_have_no_records():
    assert shard_records(Order([5000], 64, window_rows=256), 0, [0]) is None
