"""The parts of a training run, planned once: loaders, network, collectives, strategy, optimizer, step and session."""

from typing import Any

import numpy as np

from hpcmlp.comm import messages, open_exchange, rule
from hpcmlp.comm.agreement import agreed, alike
from hpcmlp.comm.topology import Topology
from hpcmlp.data.loader import Loader
from hpcmlp.data.manifest import Manifest
from hpcmlp.data.samples import available_bytes
from hpcmlp.errors import ConfigError, Unavailable
from hpcmlp.nn.network import EVALUATION_ROWS, Network, NetworkSpec
from hpcmlp.nn.optimizers import HYPER, Average, make_optimizer
from hpcmlp.nn.schedules import DEFAULTS as SCHEDULES
from hpcmlp.nn.schedules import Schedule, num_steps
from hpcmlp.ops import open_ops
from hpcmlp.run.numbers import is_suspect
from hpcmlp.run.options import chosen, make_loss
from hpcmlp.run.session import Session
from hpcmlp.sync import Plan, make_strategy, plan
from hpcmlp.sync.buckets import Bucket
from hpcmlp.sync.control import ControlWords
from hpcmlp.sync.step import Step

LOST_TAG = 21    # of the communicator that survivors make


class Parts:
    """Everything that the loop over the steps uses.

    Collective over `topology.comm`. Raises HpcmlpError, on all ranks alike, when the options cannot work.

    Parameters
    ----------
    config : the options of `train`.
    topology : where the ranks are; replaced when ranks are lost, as `comm` is.
    manifest : of the data set.
    params : parameters to begin with, the same on all ranks; None: drawn from the seed.

    Attributes
    ----------
    loader, val : batches of the training rows, and of the validation rows (None without any).
    roles, apart : with --sync server who serves and who works, and out of step this rank's side of it; else None.
    on_device : `run.on_device.OnDevice` where the steps are planned for a GPU, else None; path : about it, for people.
    gpu_note : which ranks share a GPU, and the cure, or "".
    local : whether ranks take steps by themselves between meetings.
    sharded : whether every rank has its slice of the parameters only.
    """

    def __init__(self, config: Any, topology: Topology, manifest: Manifest, params: np.ndarray | None = None):
        self.config, self.topology, self.comm, self.manifest = config, topology, topology.comm, manifest
        self.roles: Any = None
        self.apart: Any = None
        self.constant_meta: dict[str, Any] | None = None    # of checkpoints; see `run.record`
        self.sharded = config.shard == "params" and topology.size > 1
        if config.sync == "server":
            from hpcmlp.comm.served import Roles
            self.roles = Roles(config.servers or 1, topology.size)
        self.ops, self.gpu_note = self._open_ops()
        with agreed(self.comm):
            self.loader = self.open_loader("train")
            self.val = self.open_loader("val") if manifest.rows("val") else None
            self.loss = make_loss(config, manifest)
            self.spec = NetworkSpec((manifest.num_features, *config.hidden,
                                     self.loss.num_outputs(manifest.task, manifest.num_outputs)),
                                    config.activation, config.dropout, config.layer_norm, config.residual)
            self.local = config.local_steps > 1 or config.outer_optimizer != "none"
            self.steps_per_epoch = self.loader.steps_per_epoch
            self.total_steps = num_steps(config.steps, config.epochs, self.steps_per_epoch)
            self.schedule = self._schedule()
            self.hyper = chosen(config, f"--optimizer {config.optimizer}", HYPER[config.optimizer], HYPER)
            make_optimizer(config.optimizer, self.ops, self.spec.layout(), [], np.float32, **self.hyper)   # checks
            self._require_memory()
        self.on_device: Any = None
        why = "--device cpu"
        if config.device == "gpu":
            from hpcmlp.run.on_device import plan_on_device, why_not  # brings the launches along
            why = why_not(config, self.spec)
        if not why:
            self.on_device = plan_on_device(self)
        else:
            if config.sync in ("nccl", "direct"):
                raise alike(ConfigError(f"--sync {config.sync} has no effect with {why}, which is summed on the hosts; "
                                        "leave one out."))
            if config.precision != "float32":
                raise alike(ConfigError(f"--precision {config.precision} has no effect with {why}, which computes in "
                                        "float32; leave one out."))
            if self.sharded:
                self._plan_sharded()
            else:
                self._plan_step(params)
        plain = f"fused kernels {'on' if self.ops.fused else 'off'}" if config.device == "cpu" else \
            f"plain operations of CuPy ({why})"
        self.path = self.on_device.describe() if self.on_device else plain

    def open_loader(self, split: str) -> Loader:
        """Return the loader of this rank's share of a split. Local; raises DataError or InputMissing."""
        c = self.config
        limit = None if c.memory_limit is None else int(c.memory_limit * 2**20)
        place = self.topology.rank, self.topology.size
        if self.roles is not None and split == "train":
            from hpcmlp.sync.server import read_staleness
            from hpcmlp.sync.tasks import Idle, Tasks
            place = self.roles.share(self.topology.rank)
            if place is None:
                return Idle(self.manifest, c.global_batch_size)
            if read_staleness(c.staleness):
                place, slots = (0, 1), place[1]
                return Tasks(Loader(c.data, self.manifest, split, 0, 1, c.global_batch_size, seed=c.seed,
                                    memory_limit=limit, verify=c.verify), slots)
        return Loader(c.data, self.manifest, split, *place, c.global_batch_size if split == "train" else None,
                      seed=c.seed, memory_limit=limit, verify=c.verify)

    def _schedule(self) -> Schedule:
        c = self.config
        options = chosen(c, f"--schedule {c.schedule}", SCHEDULES[c.schedule], SCHEDULES)
        if c.schedule == "exponential":
            options["interval"] = self.steps_per_epoch
        return Schedule(c.schedule, c.lr, self.total_steps, c.warmup_steps, **options)

    def _open_ops(self) -> tuple[Any, str]:
        if self.config.device == "cpu":
            return open_ops("cpu"), ""
        from hpcmlp.run.gpus import open_arithmetic  # the ranks of a run on cores have nothing to choose
        return open_arithmetic(self.config.device, self.comm)

    def workload(self, sync: str) -> Any:
        """Return this run as a `plan.workload.Workload`, with the collectives `sync`. Local."""
        from hpcmlp.plan.workload import from_options  # one rank of a node reckons
        return from_options(self.config, self.manifest, self.spec, self.loss.kind, self.hyper, self.topology.size,
                            self.topology.local_size, sync)

    def _require_memory(self) -> None:
        """Raise Unavailable when what this node's ranks are about to make cannot fit beside what they hold."""
        t, available = self.topology, available_bytes()
        if self.config.device != "cpu" or available is None or t.local_rank:
            return
        from hpcmlp.plan.fit import shortage  # as `workload`
        sync = self.config.sync if self.config.sync != "auto" else "shared" if t.local_size > 1 else "ring"
        missing = shortage(self.workload(sync), available, f"{t.host} now", already=("data", "process"))
        if missing:
            raise Unavailable(missing)

    def _plan_step(self, params: np.ndarray | None) -> None:
        """Make the network, the strategy, the optimizer and every buffer of the step."""
        c, ops, topology = self.config, self.ops, self.topology
        rows, layout = self._rows(), self.spec.layout()
        self.exchange = open_exchange(self.sync_name(), topology, layout.size, np.float32, own_params=c.full_update,
                                      wire=c.wire, servers=c.servers or 1, in_step=c.staleness in (None, "0"),
                                      overlap=self._may_overlap())
        on_host = c.device == "cpu"
        self.plan = self._plan_buckets(layout.size)
        self.network = Network(self.spec, ops, rows, self.exchange.params if on_host and not self.local else None,
                               self.exchange.grads if on_host else None, piece=self.plan.piece,
                               recompute=c.recompute)
        ops.from_host(self.initial_parameters() if params is None else params, self.network.params)

        def strategy(whole: bool, params: Any) -> Any:
            make = make_strategy(whole, self.exchange.collective.narrow, self.plan.overlap)
            # Copies of two vectors of parameters must not meet in one place.
            host = (None, None) if self.local else (self.exchange.params, self.exchange.grads)
            return make(self.exchange.collective, self.plan.buckets, topology.size, params, self.network.grads, ops,
                        host)

        self.strategy = strategy(c.full_update or self.local, self.network.params)
        optimizer = make_optimizer(c.optimizer, ops, layout, self.strategy.ranges, np.float32, **self.hyper)
        average = None if c.ema is None else Average(ops, self.strategy.ranges, c.ema, np.float32)
        if average is not None:
            average.start(self.network.params)
        parts = (self.network, self.loss, optimizer, self.strategy, ops)
        options = self._step_options(average)
        if self.local:
            from hpcmlp.sync.local import LocalStep  # few runs want it
            anchor = self.exchange.params if on_host else ops.zeros((layout.size,), np.float32)
            self.step = LocalStep(*parts, **options, meets=self._meets, outer=strategy(c.full_update, anchor),
                                  outer_optimizer=c.outer_optimizer, outer_lr=c.outer_lr,
                                  outer_momentum=c.outer_momentum)
        else:
            self.step = Step(*parts, **options)
            if c.device == "cpu":   # on a GPU, sums may come out otherwise by themselves
                self.step.suspects = lambda result: is_suspect(self.session.progress, result)
        self.session = Session(self.comm, self.network, self.strategy, optimizer, average,
                               self.step if self.local else None)
        self._plan_apart()

    def _rows(self) -> int:
        """Return the most samples that go through the network at once."""
        return max(-(-self.loader.local_rows_max // self.config.accumulate),
                   min(EVALUATION_ROWS, self.manifest.rows("val")))

    def _step_options(self, average: Any) -> dict[str, Any]:
        c, m = self.config, self.manifest
        return dict(rows=self.loader.local_rows_max, micro_batches=c.accumulate, clip_norm=c.clip_norm, seed=c.seed,
                    shift=self._on_device(m.load_shift), scale=self._on_device(m.load_scale), average=average)

    def _plan_sharded(self) -> None:
        """As `_plan_step`, with layers that come and go; nothing is as long as all parameters."""
        from hpcmlp.run.slices import SlicedSession  # runs with large networks
        from hpcmlp.sync.memory import buffer_elements
        from hpcmlp.sync.sharded import ShardedStep, open_sharded
        c, ops, size = self.config, self.ops, sum(buffer_elements(self.spec))
        self.exchange = open_exchange(self.sync_name(), self.topology, size, np.float32, by_layer=True)
        rows = np.array([self._rows()])     # evaluation cuts them alike on all ranks
        messages.max_in_place(self.comm, rows)
        self.network, self.strategy = open_sharded(self.exchange, self.spec, self.topology.size, ops, int(rows[0]),
                                                   c.recompute)
        on_the_way = self.exchange.collective.starts and (self.topology.num_nodes > 1 or self.exchange.name == "ring")
        self.plan = Plan(self.strategy.buckets, None, on_the_way, 4 * size / 2**20)
        for number, span in enumerate(self.spec.layer_spans()):
            self.strategy.take_layer(number, self.initial_parameters(span), self.strategy.params)
        optimizer = make_optimizer(c.optimizer, ops, self.spec.layout(), self.strategy.ranges, np.float32,
                                   **self.hyper)
        average = None if c.ema is None else Average(ops, self.strategy.ranges, c.ema, np.float32)
        if average is not None:
            average.start(self.strategy.params)
        self.step = ShardedStep(self.network, self.loss, optimizer, self.strategy, ops, **self._step_options(average))
        self.session = SlicedSession(self.comm, self.network, self.strategy, optimizer, average)

    def _meets(self, number: int) -> bool:
        """Whether local steps end a round with step `number`: decided from facts that all ranks hold."""
        c, t = self.config, number % self.steps_per_epoch
        return ((t + 1) % c.local_steps == 0 or t == self.steps_per_epoch - 1 or number + 1 == self.total_steps
                or (number + 1) % (c.checkpoint_every or self.steps_per_epoch) == 0)

    def _plan_buckets(self, size: int) -> Plan:
        c, t = self.config, self.topology
        if self.roles is None:
            return plan(self.spec, self.exchange.collective, t.size, t.num_nodes, c.bucket_mb, self._may_overlap())
        return Plan(self._server_buckets(size), None, False, 4 * size / 2**20)

    def _may_overlap(self) -> bool | None:
        """What the user said; False where each step is computed alone; None where it depends on the nodes."""
        return False if self.config.full_update or self.local else self.config.overlap

    def _server_buckets(self, size: int) -> list[Bucket]:
        from hpcmlp.sync.storage import one_bucket
        return one_bucket(size, self.roles)

    def _plan_apart(self) -> None:
        """Prepare what workers and servers send each other out of step, where that is asked for."""
        c = self.config
        if self.roles is None:
            return
        from hpcmlp.sync.server import DEFAULT_TIMEOUT_S, Apart, read_staleness
        staleness = read_staleness(c.staleness)
        if staleness:
            self.apart = Apart(self.comm, self.roles, self.step,
                               self.loader if self.topology.rank in self.roles.workers else None,
                               staleness=staleness, staleness_lr=c.staleness_lr, learning_rate=self.schedule.lr,
                               timeout_s=c.worker_timeout or DEFAULT_TIMEOUT_S)

    def sync_name(self) -> str:
        """Return the collectives to open: where "auto" would try, a resumed run keeps those that it had.

        Sums over ranks differ in rounding between collectives, and a trial need not end twice alike. Ranks on other
        nodes, or in other numbers, change the order of sums anyway: then it tries again.
        """
        c, t = self.config, self.topology
        if not (c.resume and c.sync == "auto" and rule(t, c.wire)[0] is None):
            return c.sync
        name = b"auto"
        with agreed(self.comm):
            if t.rank == 0:
                from hpcmlp.run import checkpoint
                state, _ = checkpoint.newest_good(c.out)
                had = {} if state is None else state.meta.get("sync", {})
                if (had.get("ranks"), had.get("nodes")) == (t.size, t.num_nodes):
                    name = b"auto" if had["name"] in ("nccl", "direct") else had["name"].encode()
        return messages.broadcast_bytes(self.comm, name if self.comm.rank == 0 else None).decode()

    def _on_device(self, values: list[float] | None) -> Any:
        """Return float32 `values` where the arithmetic runs."""
        if values is None:
            return None
        array = self.ops.empty((len(values),), np.float32)
        self.ops.from_host(np.array(values, np.float32), array)
        return array

    def initial_parameters(self, span: tuple[int, int] | None = None) -> np.ndarray:
        """Rank 0 draws the initial parameters, all or those of a layer, and gives them out."""
        start, stop = span or (0, self.spec.layout().size)
        flat = np.empty(stop - start, np.float32)
        if self.topology.rank == 0:
            from hpcmlp.nn.initializers import initialize  # brings numpy.random along
            flat[...] = initialize(self.spec, self.config.seed, self.config.initializer, np.float32, (start, stop))
        messages.broadcast(self.comm, flat)
        return flat

    def go_on_without(self, lost: list[int]) -> None:
        """Make the survivors a world of their own. Collective over the survivors.

        lost : ranks that --sync server, out of step, has given up.
        """
        from hpcmlp.comm.served import Roles, Served
        group = self.comm.group.Incl(self.apart.survivors(lost))
        self.comm = self.session.comm = self.comm.Create_group(group, LOST_TAG)
        self.topology = Topology(self.comm)
        self.roles = Roles(self.roles.servers, self.comm.size)
        self.exchange.collective = Served(self.comm, self.roles.servers)
        self.strategy.go_on(self.exchange.collective, self._server_buckets(self.network.layout.size), self.comm.size)
        self.step.words = ControlWords(self.comm.size)
        if self.val is not None:
            self.val = self.open_loader("val")
