"""Rank 0's second job: equal starts on all ranks, checks of the replicas, log, console and checkpoints."""

import ast
import os
import sys
from typing import Any

import numpy as np

import hpcmlp
from hpcmlp.comm import messages
from hpcmlp.comm.agreement import agreed
from hpcmlp.data.manifest import Manifest, manifest_from_dict, read_manifest
from hpcmlp.data.shards import hdf5_versions
from hpcmlp.errors import ConfigError, RunFailed


def versions() -> dict[str, str]:
    """Return the versions that decide results: hpcmlp, Python, NumPy, h5py, HDF5, machine. Local."""
    return {"hpcmlp": hpcmlp.__version__, "python": sys.version.split()[0], "numpy": np.__version__,
            **hdf5_versions(), "machine": os.uname().machine}


def _literal(text: bytes) -> Any:
    """Plain values from their repr: no rank needs the JSON modules, 25 calls to the file system, to get started."""
    return ast.literal_eval(text.decode())


def open_dataset(comm: Any, directory: str) -> Manifest:
    """Return the manifest of a data set directory: rank 0 reads and checks it, and gives it out.

    Collective over `comm`. Raises what `data.manifest.read_manifest` raises, on all ranks.
    """
    text = None
    with agreed(comm):
        if comm.rank == 0:
            manifest = read_manifest(directory)
            text = "\n".join(repr(item) for item in manifest.to_dict().items()).encode()
    text = messages.broadcast_bytes(comm, text)
    # Item by item: syntax trees take 70 times the memory of the text.
    return manifest if comm.rank == 0 else manifest_from_dict(dict(map(_literal, text.split(b"\n"))))


def check_alike(comm: Any, facts: dict[str, Any]) -> None:
    """Raise the same ConfigError on all ranks when `facts` (plain values) differ between them.

    Collective over `comm`. The sentence names the first rank that differs from rank 0, and how.
    """
    gathered = [_literal(b) for b in messages.all_gather_bytes(comm, repr(facts).encode())]
    for rank, other in enumerate(gathered):
        odd = [f"{key} is {other.get(key)!r} there and {value!r} on rank 0" for key, value in gathered[0].items()
               if other.get(key) != value]
        if odd:
            error = ConfigError(f"rank {rank} differs from rank 0: {'; '.join(odd)}; start all ranks with the same "
                                "installation and options.")
            error.agreed = True
            raise error


def replica_error(comm: Any, checksum: int, step: int) -> RunFailed:
    """Return the error that names the rank whose parameters drifted. Collective over `comm`."""
    own = np.array([checksum], dtype=np.int64)
    all_sums = [int(np.frombuffer(b, np.int64)[0]) for b in messages.all_gather_bytes(comm, own.tobytes())]
    groups: dict[int, list[str]] = {}
    for rank, value in enumerate(all_sums):
        groups.setdefault(value, []).append(str(rank))
    largest = max(groups.values(), key=len)
    odd = [str(rank) for rank in range(comm.size) if str(rank) not in largest]
    if 2 * len(largest) > comm.size:
        what = f"the parameters of rank {', '.join(odd)} differ from the others'; suspect that rank's memory"
    else:  # no majority says who is right
        what = (f"ranks {' and '.join(', '.join(group) for group in groups.values())} hold different parameters; "
                "suspect the memory of one of them")
    error = RunFailed(f"replicas drifted: at step {step} {what}, and go on from the last checkpoint with --resume.")
    error.agreed = True
    return error


class Console:
    """What people see: one header, one line per epoch, a progress bar on a terminal only.

    Local. Only rank 0 has `speaks` True; the others' calls do nothing.
    """

    def __init__(self, speaks: bool, progress: bool):
        self.speaks = speaks
        self._bar = self._make_bar() if speaks and progress and sys.stdout.isatty() else None

    @staticmethod
    def _make_bar() -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(unit="step", leave=False, dynamic_ncols=True, file=sys.stdout)

    def line(self, text: str) -> None:
        """Print one line; standard output is flushed, since it is often a pipe. Local."""
        if not self.speaks:
            return
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)

    def progress(self, step: int, total: int, loss: float) -> None:
        """Move the progress bar. Local."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Take the progress bar away. Local."""
        if self._bar is not None:
            self._bar.close()


def header(rows: list[tuple[str, str]]) -> str:
    """Return the header of a run: aligned names and values. Local."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def epoch_line(epoch: int, epochs: int | None, train_loss: float, val: dict[str, Any], samples_per_s: float,
               seconds: dict[str, float], hidden: float | None = None) -> str:
    """Return the console line of one epoch.

    Local. `seconds`: compute, comm, wait (for late ranks) and input of this rank. `hidden`: the share of communication
    that was hidden behind computing, None where nothing overlaps.
    """
    total = sum(seconds.values()) or 1.0
    share = " ".join(f"{name} {100 * s / total:.0f} %" for name, s in seconds.items())
    if hidden is not None:
        share += f" ({100 * hidden:.0f} % of communication hidden)"
    metrics = "".join(f"  val {name} {value:.4f}" for name, value in val.items() if isinstance(value, float))
    of = f"/{epochs}" if epochs else ""
    return f"epoch {epoch:>3}{of}  train loss {train_loss:.4f}{metrics}  {samples_per_s:,.0f} samples/s  {share}"
