"""The session of a run whose parameters live in slices: nothing is whole on any rank, one layer or array excepted.

What the session of other runs hands out as flat vectors are here this rank's owned elements. Checkpoints are the same
files: rank 0 writes them array by array, one layer of one vector at a time, while all ranks gather it, and reads them
so for all. Such a checkpoint opens without slices, and the other way round.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from hpcmlp.comm import messages
from hpcmlp.comm.agreement import agreed
from hpcmlp.errors import ConfigError
from hpcmlp.run.session import Progress, Session

# What a checkpoint of another run may hold beside: roundings, which are dropped, and exact parameters.
MASTER = "sync/master"


class SlicedSession(Session):
    """The owned elements of parameters, optimizer state, averages and best state, and the progress of a run.

    Parameters are those of `Session`; `strategy` is `sync.sharded.ShardedUpdate`.
    """

    def usable(self) -> np.ndarray:
        """Return the owned elements to validate and to use: averaged where an average is kept. Local."""
        return self.strategy.params if self.average is None else self.average.array

    def keep_best(self, flat: np.ndarray) -> None:
        """Keep the owned elements `flat` as the best so far. Local."""
        self.best = flat.copy()

    def best_params(self) -> np.ndarray:
        """Return the owned elements that the run recommends. Local."""
        return self.usable() if self.best is None else self.best

    def parameters_sha256(self, params: np.ndarray) -> str:
        """Return the sha256 of the parameters whose owned elements are `params`, on all ranks. Collective."""
        digest = hashlib.sha256()
        for _, tensor in self._tensors(params):
            digest.update(np.ascontiguousarray(tensor, "<f4"))
        return digest.hexdigest()

    def make_room(self, best: bool) -> None:
        """Do nothing: there is no copy of the state. Local."""

    def save(self, run_dir: str, meta: dict[str, Any], keep: int) -> Any:
        """Save a checkpoint; return what `run.writer.Saved` tells of it, on rank 0, None elsewhere.

        Collective: rank 0 never holds more than one layer of one vector; all is gathered twice, for the digests and for
        the file. Raises CannotWrite on all ranks.
        """
        groups, saved = self._groups(), None
        turns = [self._arrays(groups) for _ in range(2)]
        # Collective calls inside: every rank makes them all, whatever becomes of the file.
        with agreed(self.comm):
            try:
                if self.comm.rank == 0:
                    from hpcmlp.run import checkpoint
                    from hpcmlp.run.state_file import Streamed
                    shapes = {f"{group}/{t.name}": t.shape for group in groups for t in self.network.layout.tensors}
                    ways = iter(turns)
                    state = Streamed(self._with_progress(meta, []), shapes, lambda: next(ways))
                    saved = checkpoint.save_timed(run_dir, state, keep, 0.0)
            finally:
                for turn in turns:
                    for _ in turn:
                        pass
        return saved

    def _groups(self) -> dict[str, np.ndarray]:
        """Return the vectors of a checkpoint, by name, as owned elements."""
        groups = {"params": self.strategy.params, **{name: array for name, (_, array) in self._vectors.items()}}
        return groups if self.best is None else {**groups, "best": self.best}

    def _arrays(self, groups: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        for group, owned in groups.items():
            for name, tensor in self._tensors(owned):
                yield f"{group}/{name}", tensor

    def _tensors(self, owned: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield name and values of every tensor, layer by layer. Collective: all ranks take all of them."""
        tensors = self.network.layout.tensors
        for start, values in self.strategy.whole_layers(owned):
            for t in tensors:
                if start <= t.start < start + values.size:
                    yield t.name, values[t.start - start:t.stop - start].reshape(t.shape)

    def restore(self, run_dir: str, check: Any, accept: Any = None) -> tuple[bool, list[str]]:
        """Take up the newest good checkpoint of `run_dir`, as `Session.restore`.

        Collective: one layer at a time; rank 0 maps the file.
        """
        state, notes, text = None, [], b""
        with agreed(self.comm):
            if self.comm.rank == 0:
                from hpcmlp.run import checkpoint
                path, state, notes = checkpoint.find_newest(run_dir, accept, mapped=True)
                if state is not None:
                    check(state.meta)
                    self._check_shapes(state)
                    text = json.dumps(state.meta).encode()
                    notes += [f"{run_dir}: kept as {name}." for name in checkpoint.set_aside(run_dir, path)]
        text = messages.broadcast_bytes(self.comm, text if self.comm.rank == 0 else None)
        if not text:
            return False, notes
        meta = json.loads(text)
        self.progress = Progress(**meta["progress"])
        self.strategy.finish()
        self.best = np.zeros_like(self.strategy.params) if meta["has_best"] else None
        for group, owned in self._groups().items():
            exact = group == "params" and "master" in meta.get("carried", ())
            self._give_layers(state, MASTER if exact else group, owned)
        return True, notes

    def _check_shapes(self, state: Any) -> None:
        """Raise ConfigError when what is in the checkpoint is not of this network."""
        wanted = {t.name: t.shape for t in self.network.layout.tensors}
        for group in ("params", *self._vectors, *["best"] * state.meta["has_best"]):
            if {name: array.shape for name, array in state.group(group).items()} != wanted:
                raise ConfigError(f"the checkpoint of step {state.meta['step']} does not fit this network: {group}: "
                                  "other tensors or shapes.")

    def _give_layers(self, state: Any, group: str, owned: np.ndarray) -> None:
        """Give out the layers of `group` from rank 0, one at a time; every rank keeps its part in `owned`."""
        for number, (start, stop) in enumerate(self.network.spec.layer_spans()):
            values = np.zeros(stop - start, owned.dtype)
            if state is not None:
                for t in self.network.layout.tensors:
                    if start <= t.start < stop:
                        values[t.start - start:t.stop - start] = state.arrays[f"{group}/{t.name}"].reshape(-1)
            messages.broadcast(self.comm, values)
            self.strategy.take_layer(number, values, owned)
