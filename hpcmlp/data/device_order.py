"""The order of samples as tables that a device reads: it then works out by itself which row stands where in a batch.

Per epoch one record a shard (the network that permutes its rows, or a small table), per step and shard the place where
a rank's part begins. The device does per row what `data.order` does in bulk: find the shard, then its row.
"""

import numpy as np

from hpcmlp.data.order import Order
from hpcmlp.ops.launches import SHARD


def shard_records(order: Order, epoch: int, shards: list[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the records of the shards in this epoch and the tables that they point into.

    Local. None where the order is one of windows, or none.

    Parameters
    ----------
    shards : those whose rows are in the device's memory, one after the other in this order.

    Returns
    -------
    records : (shards,) of `ops.launches.SHARD`.
    tables : int32, at least one element.
    """
    records, tables, filled, base = np.zeros(max(1, len(shards)), SHARD), [], 0, 0
    for record, shard in zip(records, shards, strict=False):
        bijection = order.sequence(epoch, shard).bijection
        if bijection is None:
            return None
        record["rows"], record["base"], record["table"] = bijection.n, base, -1
        base += bijection.n
        if bijection.table is not None:
            record["table"] = filled
            tables.append(bijection.table.astype(np.int32))
            filled += len(bijection.table)
        else:
            record["a"], record["b"], record["keys"] = bijection.a, bijection.b, bijection.keys
    return records, np.concatenate([*tables, np.zeros(1, np.int32)])


def batch_parts(order: Order, t0: int, t1: int, rank: int, size: int,
                shards: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where the parts of this rank begin in the batches t0 .. t1 - 1, their rows and their place in the batch.

    Local.

    Returns
    -------
    parts : (steps, 2, shards) int32: first position in the shard's sequence, and the local row it falls on.
    rows : (steps,) local rows.
    first : (steps,) place of the first local row in the global batch.
    """
    start, stop = (a[:, shards] for a in order.parts(t0, t1, rank, size))
    lengths = stop - start
    ends = np.cumsum(lengths, axis=1)
    rows = lengths.sum(axis=1)
    parts = np.stack([start, ends - lengths], axis=1).astype(np.int32)
    whole = np.array([order.global_rows(t) for t in range(t0, t1)], np.int64)
    return parts, rows, rank * whole // size
