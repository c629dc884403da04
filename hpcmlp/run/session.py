"""Everything a run carries from step to step, and its way into a checkpoint and back on any number of ranks."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcmlp.comm import messages
from hpcmlp.comm.agreement import agreed
from hpcmlp.comm.reach import Offered, reach
from hpcmlp.errors import ConfigError

if TYPE_CHECKING:
    from hpcmlp.run.state_file import State


@dataclass
class Progress:
    """Where a run stands; the same on all ranks.

    `step` counts finished steps. `loss_sum` and `weight_sum` are those of the running epoch. `best_value` is the
    monitored metric of the best state, `worse` the validations since then, `skipped` the steps without update,
    `rollbacks` how often it went back to a saved state, with `lr_factor` on its learning rates since; `spikes` the
    losses that jumped, judged by the running means of `losses_seen` losses and of their squares.
    """

    step: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    best_value: float | None = None
    best_step: int = 0
    best_val: dict[str, Any] | None = None
    worse: int = 0
    skipped: int = 0
    seconds: float = 0.0
    rollbacks: int = 0
    lr_factor: float = 1.0
    spikes: int = 0
    loss_mean: float = 0.0
    loss_square: float = 0.0
    losses_seen: int = 0


class Session:
    """The parameters, the optimizer's slice, the averaged weights, the best state and the progress of a run.

    Parameters
    ----------
    comm : communicator of all ranks.
    network : `nn.network.Network`; its flat parameters are the live ones.
    strategy : `sync.strategy.SlicedUpdate` or `WholeUpdate`.
    optimizer : from `nn.optimizers.make_optimizer`, for `strategy.ranges`.
    average : `nn.optimizers.Average` for the same ranges, or None.
    local : `sync.local.LocalStep` where ranks take steps by themselves, else None: it brings their state together
        before it is used or saved.
    """

    def __init__(self, comm: Any, network: Any, strategy: Any, optimizer: Any, average: Any, local: Any = None):
        self.comm, self.network, self.strategy = comm, network, strategy
        self.average, self.local = average, local
        self._exchange = strategy if local is None else local  # what knows of exchanges still to be made up for
        # Name in a checkpoint -> the strategy that makes it whole, and this rank's part.
        self._vectors = {f"optimizer/{name}": (strategy, array) for name, array in optimizer.state.items()}
        if average is not None:
            self._vectors["average"] = strategy, average.array
        if local is not None:
            self._vectors |= local.outer_state()
        self.progress = Progress()
        self.best: Any = None  # this rank's ranges of the best parameters
        self._copies: dict[str, Offered] = {}  # what `capture` copies into, on rank 0
        self._reached: dict[tuple[str, int], tuple[np.ndarray | None, list[bool]]] = {}  # on all ranks; see `_reach`
        self._ranges: dict[tuple[int, int], list[list[tuple[int, int]]]] = {}

    def usable(self) -> np.ndarray:
        """Return the parameters to validate and to use: averaged where an average is kept. Collective.

        (layout.size,) host array; the live parameters themselves when there is no average.
        """
        if self.average is None:
            return self.host_params()
        self._settle()
        return self.strategy.whole(self.average.array)

    def _settle(self) -> None:
        if self.local is not None:
            self.local.settle()

    def host_params(self) -> np.ndarray:
        """Return the live parameters on the host. Collective where messages overlap: what is under way ends first."""
        self.strategy.finish()
        params = self.network.params
        if isinstance(params, np.ndarray):
            return params
        out = np.empty(params.shape, params.dtype)
        self.strategy.ops.to_host(params, out)
        return out

    def vectors(self) -> list[np.ndarray]:
        """Return the parameters and this rank's part of every other vector, in a fixed order. Local."""
        return [self.network.params, *(array for _, array in self._vectors.values())]

    def keep_best(self, flat: np.ndarray) -> None:
        """Keep this rank's ranges of `flat` as the best parameters so far. Local."""
        self.best = self.strategy.owned(flat)

    def make_room(self, best: bool) -> None:
        """Make the memory that `capture` copies into, and touch it: fresh pages cost many times the copy.

        Local, on rank 0; any thread, while no capture is under way. `best`: there will be a best state.
        """
        for name in ("params", *self._vectors, *["best"] * best):
            self._copy_of(name).array.fill(0)

    @property
    def num_bytes(self) -> int:
        """Bytes of a captured state, without what narrow wires carry. Local."""
        return self.network.layout.size * self.network.dtype.itemsize * (2 + len(self._vectors))

    def _copy_of(self, name: str) -> Offered:
        if name not in self._copies:
            strategy = self._vectors[name][0] if name in self._vectors else self.strategy
            # Memory of its own takes huge pages, and so is faster.
            private = name == "params" or self._has_all(strategy.ranges)
            self._copies[name] = Offered(self.network.layout.size, self.network.dtype, private)
        return self._copies[name]

    def _has_all(self, ranges: list[tuple[int, int]]) -> bool:
        return sum(stop - start for start, stop in ranges) == self.network.layout.size

    def capture(self, meta: dict[str, Any]) -> "State | None":
        """Return the whole state with `meta` added on rank 0, None elsewhere: a node need not hold it often.

        Collective. The state is a copy in memory that is used again: it is the caller's until the next capture. Ranks
        of rank 0's node write what they own into it, all at once, others send it there: that takes less than the time
        of one copy.
        """
        layout, keep = self.network.layout, self.comm.rank == 0
        self._settle()
        self.strategy.finish()
        flats: dict[str, np.ndarray] = {}
        messages.barrier(self.comm)  # rank 0 has no more use for the state before
        if keep:
            flats["params"] = self._copy_of("params").array
            self.strategy.ops.to_host(self.network.params, flats["params"])
        vectors = dict(self._vectors)
        if self.best is not None:
            vectors["best"] = self.strategy, self.best
        for name, (strategy, array) in vectors.items():
            flats[name] = self._collect(name, strategy, array)
        messages.barrier(self.comm)  # what the others write is there
        carried = self._exchange.carried(keep)
        if not keep:
            return None
        flats |= {f"sync/{name}": flat for name, flat in carried.items()}
        arrays = {f"{group}/{name}": view for group, flat in flats.items()
                  for name, view in layout.views(flat).items()}
        from hpcmlp.run.state_file import State  # what the first step does not need is imported after it
        return State(self._with_progress(meta, sorted(carried)), arrays)

    def _with_progress(self, meta: dict[str, Any], carried: list[str]) -> dict[str, Any]:
        best = {"step": self.progress.best_step, "value": self.progress.best_value, "val": self.progress.best_val}
        return {**meta, "step": self.progress.step, "progress": asdict(self.progress), "best": best,
                "has_best": self.best is not None, "carried": carried}

    def parameters_sha256(self, params: np.ndarray) -> str:
        """Return the sha256 of `params`, as `usable` returns them, on rank 0, "" elsewhere.

        Collective where no rank has them all.
        """
        return self.network.layout.sha256(params) if self.comm.rank == 0 else ""

    def best_params(self) -> np.ndarray:
        """Return the parameters that the run recommends: the best ones by validation, else the usable ones. Collective.
        """
        return self.usable() if self.best is None else self.strategy.whole(self.best)

    def _collect(self, name: str, strategy: Any, array: Any) -> np.ndarray | None:
        """Bring the ranges that the ranks own of a vector into rank 0's copy of it; once all are here it is whole.

        Collective; waits for ranks of other nodes only.
        """
        rank, ranges, ops = self.comm.rank, self._owners(strategy), strategy.ops
        if self._has_all(ranges[0]):
            ranges = [ranges[0], *[[]] * (self.comm.size - 1)]
        flat, reaches = self._reach(name)
        if flat is not None:
            at = 0
            for start, stop in ranges[rank]:
                ops.to_host(array[at:at + stop - start], flat[start:stop])
                at += stop - start
            part = None
        elif isinstance(array, np.ndarray) or not ranges[rank]:
            part = array    # without ranges nothing of it is sent
        else:
            part = np.empty(array.shape, array.dtype)
            ops.to_host(array, part)
        sent = [[] if there else own for there, own in zip(reaches, ranges, strict=True)]
        messages.collect(self.comm, part, sent, flat)
        return flat

    def _reach(self, name: str) -> tuple[np.ndarray | None, list[bool]]:
        """Return rank 0's copy of a vector, None where it is out of reach, and who reaches it. Collective at first."""
        key = name, id(self.comm)
        if key not in self._reached:
            offered = self._copy_of(name) if self.comm.rank == 0 else None
            self._reached[key] = reach(self.comm, offered, self.network.layout.size, self.network.dtype)
        return self._reached[key]

    def _owners(self, strategy: Any) -> list[list[tuple[int, int]]]:
        """Return the ranges of the flat vector that each rank owns. Collective the first time."""
        key = id(strategy), id(self.comm)
        if key not in self._ranges:
            own = np.array(strategy.ranges, np.int64).reshape(-1, 2)
            told = messages.all_gather_bytes(self.comm, own.tobytes())
            self._ranges[key] = [[(int(a), int(b)) for a, b in np.frombuffer(t, np.int64).reshape(-1, 2)] for t in told]
        return self._ranges[key]

    def restore(self, run_dir: str, check: Any, accept: Any = None) -> tuple[bool, list[str]]:
        """Take up the newest good checkpoint of `run_dir`, and set those aside that are newer.

        Collective. Rank 0 reads and gives it out, so that a file system sees one reader.

        Parameters
        ----------
        check : called on rank 0 with the checkpoint's meta; raises ConfigError when it does not fit this run.
        accept : on rank 0 as `checkpoint.find_newest` takes it, or None.

        Returns
        -------
        found : whether there was a checkpoint.
        notes : a sentence for all that is not as it was saved (rank 0; empty elsewhere).
        """
        state, notes, meta = None, [], b""
        import json
        with agreed(self.comm):
            if self.comm.rank == 0:
                from hpcmlp.run import checkpoint
                path, state, notes = checkpoint.find_newest(run_dir, accept)
                if state is not None:
                    check(state.meta)
                    self._check_arrays(state)
                    meta = json.dumps(state.meta).encode()
                    notes += [f"{run_dir}: kept as {name}." for name in checkpoint.set_aside(run_dir, path)]
        meta = messages.broadcast_bytes(self.comm, meta if self.comm.rank == 0 else None)
        if not meta:
            return False, notes
        values = json.loads(meta)
        self.progress = Progress(**values["progress"])
        self.strategy.ops.from_host(self._give_out(state, "params"), self.network.params)
        for name, (strategy, array) in self._vectors.items():
            array[...] = strategy.owned(self._give_out(state, name))
        if values["has_best"]:
            self.keep_best(self._give_out(state, "best"))
        else:
            self.best = None
        self._exchange.take_up({name: self._give_out(state, f"sync/{name}") for name in values.get("carried", ())})
        return True, notes

    def _check_arrays(self, state: "State") -> None:
        groups = ["params", *self._vectors, *["best"] * state.meta["has_best"]]
        groups += [f"sync/{name}" for name in state.meta.get("carried", ())]
        for group in groups:
            try:
                self.network.layout.pack(state.group(group))
            except ValueError as error:
                raise ConfigError(f"the checkpoint of step {state.meta['step']} does not fit this network: {group}: "
                                  f"{error}.") from None

    def _give_out(self, state: "State | None", group: str) -> np.ndarray:
        """Return the flat vector `group` of rank 0's state on every rank."""
        layout, dtype = self.network.layout, self.network.dtype
        flat = np.empty(layout.size, dtype) if state is None else layout.pack(state.group(group), dtype)
        messages.broadcast(self.comm, flat)
        return flat
