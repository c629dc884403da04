"""What is to be planned, in plain values: a network, its batches and samples, and how ranks share the work."""

from dataclasses import dataclass, field, replace
from typing import Any

from hpcmlp.data.manifest import Manifest
from hpcmlp.data.samples import row_bytes
from hpcmlp.nn.network import EVALUATION_ROWS, NetworkSpec
from hpcmlp.nn.schedules import num_steps


@dataclass(frozen=True)
class Workload:
    """One training run.

    `rows` are those of the splits train, val and test; `row_bytes` what a sample takes in memory, `shard_rows` the
    training rows of every shard. `ranks_per_node` is the greatest number on a node. `sync` is "ring", "shared",
    "native" or "server", never "auto". `hyper` are the optimizer's constants.
    """

    spec: NetworkSpec
    ranks: int = 1
    ranks_per_node: int = 1
    global_batch_size: int = 256
    rows: tuple[int, int, int] = (0, 0, 0)
    row_bytes: int = 0
    shard_rows: tuple[int, ...] = ()
    x_dtype: str = "float32"
    loss: str = "softmax_cross_entropy"
    optimizer: str = "adamw"
    hyper: dict[str, Any] = field(default_factory=dict)
    clip_norm: float | None = None
    ema: bool = False
    accumulate: int = 1
    steps: int = 0
    sync: str = "shared"
    wire: str = "float32"
    overlap: bool | None = None
    bucket_mb: float | None = None
    full_update: bool = False
    local_steps: int = 1
    outer: bool = False         # an outer optimizer between rounds of local steps
    servers: int = 1
    staleness: bool = False     # a server whose workers are not in step
    validate_every: int = 1
    checkpoint_every: int | None = None
    keep: int = 2
    memory_limit: int | None = None
    device: str = "cpu"
    sharded: bool = False       # parameters in slices
    recompute: bool = False
    only_messages: bool = False     # a server without room in its node's memory

    @property
    def nodes(self) -> int:
        """Nodes that the ranks are on. Local."""
        return -(-self.ranks // self.ranks_per_node)

    @property
    def is_local(self) -> bool:
        """Whether ranks take steps by themselves between meetings. Local."""
        return self.local_steps > 1 or self.outer

    @property
    def served_on_node(self) -> bool:
        """Whether servers and workers share one node's memory. Local."""
        messages = self.staleness or self.only_messages
        return self.sync == "server" and self.nodes == 1 < self.ranks and not messages

    @property
    def whole(self) -> bool:
        """Whether every rank updates all parameters. Local."""
        return self.full_update or self.is_local

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the training rows, at least 1. Local."""
        return max(1, -(-self.rows[0] // self.global_batch_size))

    @property
    def batch_rows(self) -> int:
        """Samples of a full global batch: no more than there are. Local."""
        return min(self.global_batch_size, self.rows[0]) if self.rows[0] else self.global_batch_size

    @property
    def workers(self) -> int:
        """Ranks that train. Local."""
        dedicated = self.sync == "server" and self.servers < self.ranks
        return self.ranks - self.servers if dedicated else self.ranks

    @property
    def local_rows(self) -> int:
        """Samples of the largest local batch. Local."""
        return -(-self.batch_rows // self.workers)

    @property
    def network_rows(self) -> int:
        """Samples that the network's buffers hold: a micro-batch, or what validation takes at once. Local."""
        return max(-(-self.local_rows // self.accumulate), min(EVALUATION_ROWS, self.rows[1]))


def from_options(config: Any, manifest: Manifest, spec: NetworkSpec, loss: str, hyper: dict[str, Any], ranks: int,
                 ranks_per_node: int, sync: str) -> Workload:
    """Return the workload of `train` with the options `config` (by their names as attributes) on a data set. Local.

    sync : what "auto" has become.
    """
    c, m = config, manifest
    work = Workload(
        spec, ranks, min(ranks, ranks_per_node), c.global_batch_size,
        tuple(m.rows(s) for s in ("train", "val", "test")), row_bytes(m),
        tuple(entry.rows for entry in m.splits.get("train", ())), m.x_dtype, loss, c.optimizer, hyper,
        c.clip_norm, c.ema is not None, c.accumulate, 0, sync, c.wire if sync in ("ring", "shared") else "float32",
        c.overlap, c.bucket_mb, c.full_update, c.local_steps, c.outer_optimizer != "none", min(c.servers or 1, ranks),
        c.staleness not in (None, "0"), c.validate_every, c.checkpoint_every, c.keep,
        None if c.memory_limit is None else int(c.memory_limit * 2**20), c.device, c.shard == "params" and ranks > 1,
        c.recompute)
    return replace(work, steps=num_steps(c.steps, c.epochs, work.steps_per_epoch))
