"""The samples of a run with servers: nothing for a dedicated server, any slice of any global batch for a worker."""

from typing import Any

import numpy as np

from hpcmlp.data.samples import Batch


class Idle:
    """The loader of a dedicated server: it knows the steps of an epoch and has no samples. Local."""

    mode = "on the workers"
    local_rows_max = 0

    def __init__(self, manifest: Any, global_batch_size: int):
        self.num_rows, self._size = manifest.rows("train"), global_batch_size
        self.steps_per_epoch = -(-self.num_rows // global_batch_size)
        outputs = () if manifest.task == "classification" else (manifest.num_outputs,)
        self._source = np.zeros((1, manifest.num_features), np.dtype(manifest.x_dtype))
        self._index = np.zeros(0, np.int64)
        self._targets = np.zeros((0, *outputs), np.int32 if manifest.task == "classification" else np.float32)
        self._weights = np.zeros(0, np.float32) if manifest.weighted else None

    def batch(self, epoch: int, t: int) -> Batch:
        """Return an empty share of batch `t`. Local."""
        rows = min(self._size, self.num_rows - t * self._size)
        return Batch(0, 0, rows, self._source, self._index, self._targets, self._weights)

    def close(self) -> None:
        """Do nothing. Local."""


class Tasks:
    """Any slice of any global batch, from a loader of whole global batches.

    Local. `loader` is that of rank 0 of 1; what else is asked for is its.
    """

    def __init__(self, loader: Any, slots: int):
        self._loader, self._slots = loader, slots
        self.steps_per_epoch, self.mode = loader.steps_per_epoch, loader.mode
        self.local_rows_max = -(-loader.local_rows_max // slots)

    def task(self, number: int) -> Batch:
        """Return the samples of task `number`. Local."""
        step, part = divmod(number, self._slots)
        whole = self._loader.batch(*divmod(step, self.steps_per_epoch))
        a, b = (k * whole.rows // self._slots for k in (part, part + 1))
        weights = None if whole.weights is None else whole.weights[a:b]
        return Batch(b - a, whole.first + a, whole.global_rows, whole.source, whole.index[a:b], whole.targets[a:b],
                     weights)

    def close(self) -> None:
        """Close the loader. Local."""
        self._loader.close()
