"""Evaluation where forward is collective: all ranks take equally many batches through layers gathered for all."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from hpcmlp.data.samples import Batch, allocate
from hpcmlp.errors import HpcmlpError


class InTurns:
    """A loader whose `sequential` yields as many batches on every rank: empty ones after its own.

    Local. An error of the loader is raised after the last turn, so that no rank waits for one that has left.

    loader : of the split. max_rows : of a batch, the same on all ranks. count : batches.
    """

    def __init__(self, loader: Any, max_rows: int):
        self._loader, self.num_rows = loader, loader.num_rows
        most = -(-loader.num_rows // loader.size)   # rows of one rank
        self.count = -(-most // max_rows)

    def sequential(self, max_rows: int) -> Iterator[Batch]:
        """Yield this rank's batches, then empty ones. Local."""
        left, error = self.count, None
        try:
            for batch in self._loader.sequential(max_rows):
                left -= 1
                yield batch
        except HpcmlpError as caught:
            error = caught
        for _ in range(left):
            yield self._nothing()
        if error is not None:
            raise error

    def _nothing(self) -> Batch:
        """An empty batch."""
        one = allocate(1, self._loader.manifest)
        weights = None if one.weight is None else one.weight[:0]
        return Batch(0, 0, self.num_rows, one.x, np.zeros(0, np.int64), one.y[:0], weights)


class Entered:
    """A network whose layers are gathered as forward enters them, for `passes` times forward.

    Collective: every rank calls `forward` so often.
    """

    def __init__(self, network: Any, strategy: Any, passes: int):
        self._network, self._strategy = network, strategy
        self.spec, self.dtype, self.max_rows = network.spec, network.dtype, network.max_rows
        strategy.begin(list(range(network.spec.num_layers)), passes)

    def forward(self, x: Any) -> Any:
        """Return the logits of `x`. Collective."""
        return self._network.forward(x, enter=self._strategy.enter)
