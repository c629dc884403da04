"""How fast every rank gets its samples: shards opened, read cold and warm, verified, gathered and streamed.

What is timed is what training does, by its own classes: `ShardReader` for the shards that a rank touches, `Loader` for
batches. All ranks begin each stage together. A stage is cold when the kernel was asked to forget the shards before it
(posix_fadvise, POSIX_FADV_DONTNEED, on clean pages); what is left in the page cache all the same is probed and told, a
file server's own memory is nobody's to clear.
"""

import errno
import math
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcmlp.comm import messages
from hpcmlp.comm.agreement import agreed
from hpcmlp.comm.topology import Topology
from hpcmlp.data.loader import Loader
from hpcmlp.data.manifest import Manifest, read_manifest
from hpcmlp.data.samples import Samples, allocate, open_shard, row_bytes
from hpcmlp.errors import ConfigError

PROBES = 64     # places of a file that are looked for in the page cache
SPLIT = "train"


class IoRates:
    """The stages of one rank's input, to be timed in the order of `run`.

    Collective over the ranks of `topology`.

    Parameters
    ----------
    directory : data set directory; its training split is read.
    global_batch_size : samples of a batch over all ranks.
    steps : batches gathered in a stage.
    memory_limit : bytes for the samples of one rank in the streamed stages; None: half of what the rank that holds the
        least would hold.

    Raises what `Loader` raises, on all ranks alike.
    """

    def __init__(self, directory: str, ops: Any, topology: Topology, global_batch_size: int, steps: int,
                 memory_limit: float | None = None):
        self.directory, self.ops, self.topology, self.steps = directory, ops, topology, steps
        self.batch_size = global_batch_size
        with agreed(topology.comm):
            self.manifest: Manifest = read_manifest(directory)
            self._loader = self._open_loader(None)
        self._shards = self._loader.order.touched(topology.rank, topology.size)
        self._counts = [self.manifest.splits[SPLIT][s].rows for s in self._shards]
        self._row_bytes = row_bytes(self.manifest)
        held = np.array([sum(self._counts) * self._row_bytes], np.int64)
        messages.min_in_place(topology.comm, held)
        self.memory_limit = held[0] / 2 if memory_limit is None else memory_limit
        self._x = np.empty((max(1, self._loader.local_rows_max), self.manifest.num_features), np.float32)
        self._affine = [None if v is None else np.array(v, np.float32)
                        for v in (self.manifest.load_shift, self.manifest.load_scale)]

    def run(self) -> list[dict[str, Any]]:
        """Return one row per stage, on every rank; times are the ranks' own, rates as said in `_row`. Collective."""
        rows = [self._timed("gather", lambda: self._gather(self._loader))]
        self._loader.close()
        self._loader = None     # gives its memory back before the shards are read again
        arrays = [allocate(count, self.manifest) for count in self._counts]
        rows += [self._timed("open", lambda: self._read(None), cold=True),
                 self._timed("read", lambda: self._read(arrays), cold=True),
                 self._timed("read", lambda: self._read(arrays)),
                 self._timed("verify sha256", lambda: self._read(None, verify=True))]
        arrays.clear()
        for cold in (True, False):
            with agreed(self.topology.comm):
                loader = self._open_loader(self.memory_limit)
                if loader.mode != "streamed":
                    raise ConfigError(f"--memory-limit {self.memory_limit / 2**20:.4g} MiB holds all samples of rank "
                                      f"{self.topology.rank}, so nothing would be streamed; give less.")
            rows.append(self._timed("stream", lambda loader=loader: self._gather(loader), cold))
            loader.close()
        return rows

    def _open_loader(self, memory_limit: float | None) -> Loader:
        return Loader(self.directory, self.manifest, SPLIT, self.topology.rank, self.topology.size, self.batch_size,
                      memory_limit=memory_limit, verify=False)

    # ---- stages: each returns the number of samples it has handled

    def _read(self, into: list[Samples] | None, verify: bool = False) -> int:
        """Open this rank's shards, with the guard and, if wanted, the checksum, and read all rows where asked."""
        for k, shard in enumerate(self._shards):
            with open_shard(self.directory, self.manifest, SPLIT, shard, verify) as reader:
                if into is not None:
                    reader.read_into(0, self._counts[k], into[k].x, into[k].y, into[k].weight)
        return sum(self._counts)

    def _gather(self, loader: Loader) -> int:
        """Take `steps` batches of this rank and bring their inputs into float32, as a training step begins."""
        done = 0
        for number in range(self.steps):
            batch = loader.batch(*divmod(number, loader.steps_per_epoch))
            self.ops.gather(batch.source, batch.index, self._x[:batch.rows], *self._affine)
            done += batch.rows
        return done

    # ---- the stopwatch

    def _timed(self, stage: str, action: Callable[[], int], cold: bool = False) -> dict[str, Any]:
        """Time `action` on all ranks at once."""
        comm, cached = self.topology.comm, None
        paths = [os.path.join(self.directory, self.manifest.splits[SPLIT][s].file) for s in self._shards]
        if cold:
            messages.barrier(comm)      # another rank may still be reading the same shard
            cached = [forget(path) for path in paths]
        messages.barrier(comm)
        samples, seconds = 0, 0.0
        with agreed(comm):
            begin = time.perf_counter()
            samples = action()
            seconds = time.perf_counter() - begin
        known = [share for share in cached or () if share is not None]
        own = np.array([samples, seconds, np.mean(known) if known else np.nan])
        table = np.array([np.frombuffer(data) for data in messages.all_gather_bytes(comm, own.tobytes())])
        return self._row(stage, cold, table)

    def _row(self, stage: str, cold: bool, table: np.ndarray) -> dict[str, Any]:
        """The figures of a stage; `table`: (ranks, 3) samples, seconds, share still cached.

        Rates of a rank are those of the slowest, of all ranks the sum of samples over the longest time. Samples are
        counted once per rank that handles them, and as wide as they are stored.
        """
        samples, seconds, cached = table.T
        rate, total = float((samples / seconds).min()), float(samples.sum() / seconds.max())
        if stage == "open":     # reads no samples
            rate = total = math.nan
        mb = self._row_bytes / 1e6
        rates = {"samples_per_s_rank": rate, "samples_per_s": total, "mb_per_s_rank": rate * mb, "mb_per_s": total * mb}
        return {"what": "io", "stage": stage, "cache": "cold" if cold else "warm", "ranks": self.topology.size,
                "samples": int(samples.sum()), "seconds": float(seconds.max()),
                **{name: None if math.isnan(value) else value for name, value in rates.items()},
                "still_cached": None if not cold or np.isnan(cached).all() else float(np.nanmean(cached))}


def forget(path: str) -> float | None:
    """Ask the kernel to drop a file from its page cache; return the share that is there still, None where unknown.

    Local. Dirty pages are written first: they cannot be dropped.
    """
    with open(path, "rb", buffering=0) as file:
        try:
            os.fsync(file.fileno())
        except OSError:     # a file system that will not for a reader: its pages are clean, or stay
            pass
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return cached_share(file.fileno())


def cached_share(descriptor: int) -> float | None:
    """Return the share of PROBES places of a file that are in the page cache; None where it is not told. Local."""
    size, byte = os.fstat(descriptor).st_size, bytearray(1)
    if not size or not hasattr(os, "RWF_NOWAIT"):
        return None
    found = 0
    for k in range(PROBES):
        try:
            found += os.preadv(descriptor, [byte], size * k // PROBES, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                return None
    return found / PROBES
