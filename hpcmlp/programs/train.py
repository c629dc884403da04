"""Train a network on all ranks and keep everything needed to use or resume it."""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from mpi4py import MPI

import hpcmlp
from hpcmlp.comm import check_wire, messages, open_exchange, rule
from hpcmlp.comm.agreement import agreed
from hpcmlp.comm.topology import Topology
from hpcmlp.config import TrainConfig, flag, to_toml
from hpcmlp.data.loader import Loader
from hpcmlp.data.manifest import Manifest
from hpcmlp.data.samples import available_bytes
from hpcmlp.errors import ConfigError, DataError, HpcmlpError, RunFailed, StoppedAndSaved, Unavailable
from hpcmlp.launch import end_all
from hpcmlp.nn.losses import Loss, balanced_class_weights, default_loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.optimizers import HYPER, Average, make_optimizer
from hpcmlp.nn.schedules import DEFAULTS as SCHEDULES
from hpcmlp.nn.schedules import Schedule
from hpcmlp.ops import open_ops
from hpcmlp.run.coordinator import Console, check_alike, epoch_line, header, open_dataset, replica_error, versions
from hpcmlp.run.session import Session
from hpcmlp.run.signals import StopFlag
from hpcmlp.sync import Plan, make_strategy, plan
from hpcmlp.sync.buckets import Bucket
from hpcmlp.sync.control import ControlWords
from hpcmlp.sync.step import Step, StepResult, hidden_share

# Options that a resumed run may change: they alter how long or how fast it runs, not what a step computes
# (but for its rounding).
FREE_ON_RESUME = {"data", "out", "resume", "epochs", "steps", "early_stopping", "validate_every", "checkpoint_every",
                  "keep", "log_every", "print_every", "progress", "test", "device", "sync", "wire", "full_update",
                  "overlap", "bucket_mb", "replica_check_every", "verify", "time_limit", "trace", "trace_steps",
                  "servers", "staleness", "staleness_lr", "worker_timeout"}
SERVER_OPTIONS = ("servers", "staleness", "staleness_lr", "worker_timeout")
DEFAULT_EPOCHS = 10
EVALUATION_ROWS = 1024
LAST_STEPS = 10_000  # whose times give the median step of the summary
LOST_TAG = 21    # of the communicator that survivors make
MOST_SKIPS = 10  # consecutive updates skipped for numbers that are not finite
HIGHER_IS_BETTER = ("accuracy", "label_accuracy", "subset_accuracy", "top", "auc", "f1", "precision", "recall", "r2")


def main(config: TrainConfig, comm: Any) -> int:
    """Train as `config` says. Collective over `comm`; returns 0, or raises HpcmlpError."""
    topology = Topology(comm)
    manifest = open_dataset(comm, config.data)
    with agreed(comm):
        check_fits(config, manifest, comm.size)
    check_alike(comm, {**asdict(config), **versions()})
    directory = training = None
    with agreed(comm):
        if comm.rank == 0:
            from hpcmlp.run.directory import RunDirectory  # imports cost file-system calls: only where needed
            directory = RunDirectory(config.out, config.resume)
    try:
        # Whether numbers are finite is decided from the control words; NumPy's warnings would only add noise.
        with np.errstate(all="ignore"):
            training = Training(config, topology, manifest, directory)
            return training.run()
    finally:
        if directory is not None:
            directory.release()
        if training is not None:
            training.end_without_lost(comm)
        topology.free()


def check_fits(config: TrainConfig, manifest: Manifest, size: int) -> None:
    """Raise ConfigError or DataError when the options cannot work with the data set or on `size` ranks. Local."""
    if config.epochs is not None and config.steps is not None:
        raise ConfigError("both --epochs and --steps are given; give one of them.")
    check_wire(config.sync, config.wire)
    if config.sync == "server":
        from hpcmlp.sync.server import check_options  # few runs want it
        check_options(config, size)
    else:
        for name in SERVER_OPTIONS:
            if getattr(config, name) not in (None, False):
                raise ConfigError(f"{flag(name)} has no effect with --sync {config.sync}; it belongs to --sync server.")
    alone = {f"--sync {config.sync}": config.sync in ("native", "server"), "--full-update": config.full_update,
             "--local-steps": config.local_steps > 1, "--outer-optimizer": config.outer_optimizer != "none"}
    odd = [name for name, given in alone.items() if given]
    if config.overlap and odd:
        raise ConfigError(f"--overlap has no effect with {odd[0]}, which sends nothing while it computes; leave one "
                          "out.")
    if config.trace_steps is not None and not config.trace:
        raise ConfigError("--trace-steps has no effect without --trace; give both.")
    for name in ("outer_lr", "outer_momentum"):
        if getattr(config, name) is not None and config.outer_optimizer == "none":
            raise ConfigError(f"{flag(name)} has no effect with --outer-optimizer none; it belongs to nesterov.")
    if manifest.rows("train") == 0:
        raise DataError(f"{config.data}: the data set has no training rows; prepare it with more rows or smaller "
                        "--val-fraction and --test-fraction.")
    if config.early_stopping is not None and manifest.rows("val") == 0:
        raise ConfigError("--early-stopping needs validation rows; prepare the data set with --val-fraction above 0.")


def chosen(config: TrainConfig, owner: str, own: Iterable[str], table: dict[str, Iterable[str]]) -> dict[str, Any]:
    """Return the options named in `own` that were given; one given that only others of `table` have is an error.

    Local. Raises ConfigError: a setting that cannot take effect is never passed over in silence.
    """
    every = {name for names in table.values() for name in names if hasattr(config, name)}
    given = {name: getattr(config, name) for name in every if getattr(config, name) not in (None, False)}
    odd = sorted(set(given) - set(own))
    if odd:
        users = [key for key, names in table.items() if odd[0] in names]
        raise ConfigError(f"{flag(odd[0])} has no effect with {owner}; it belongs to {', '.join(users)}.")
    return given


def make_loss(config: TrainConfig, manifest: Manifest) -> Loss:
    """Return the loss that the options and the task ask for. Local; raises ConfigError when they do not go together."""
    kind = default_loss(manifest.task) if config.loss == "auto" else config.loss
    options: dict[str, Any] = {}
    if kind == "softmax_cross_entropy":
        options["label_smoothing"] = config.label_smoothing
        options["class_weights"] = class_weights(config.class_weights, manifest)
    elif config.label_smoothing or config.class_weights != "none":
        raise ConfigError(f"--label-smoothing and --class-weights act on softmax_cross_entropy only, not on {kind}.")
    if kind == "huber":
        options["delta"] = config.huber_delta
    if kind == "quantile":
        options["quantiles"] = tuple(config.quantiles)
    return Loss(kind, **options)


def class_weights(text: str, manifest: Manifest) -> tuple[float, ...] | None:
    """Return one weight per class for 'none', 'balanced' or a comma-separated list. Local; raises ConfigError."""
    if text == "none":
        return None
    if text == "balanced":
        return balanced_class_weights(manifest.class_counts["train"])
    try:
        weights = tuple(float(word) for word in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != len(manifest.classes or ()) or not all(0 <= w < float("inf") for w in weights):
        raise ConfigError(f"--class-weights {text!r}: give 'none', 'balanced' or {len(manifest.classes or ())} numbers "
                          "of at least 0, comma-separated.")
    return weights


class Training:
    """One run: its parts, planned once, and the loop over the steps.

    Collective over `topology.comm`. `directory` is None on all ranks but 0.
    """

    def __init__(self, config: TrainConfig, topology: Topology, manifest: Manifest, directory: Any):
        self.config, self.topology, self.comm, self.manifest = config, topology, topology.comm, manifest
        self.directory = directory
        self.console = Console(topology.rank == 0, config.progress)
        self.roles: Any = None          # --sync server: who serves, who works
        self.apart: Any = None          # and, out of step, this rank's side of it
        self.served: list[dict[str, Any]] = []  # what they did, epoch by epoch (rank 0)
        self.lost = False               # whether a rank was lost, which no call may wait for
        if config.sync == "server":
            from hpcmlp.comm.served import Roles
            self.roles = Roles(config.servers or 1, topology.size)
        with agreed(self.comm):
            self.loader = self._loader("train")
            self.val = self._loader("val") if manifest.rows("val") else None
            self.ops = open_ops(config.device, topology.local_rank)
            self.loss = make_loss(config, manifest)
            self.spec = NetworkSpec((manifest.num_features, *config.hidden,
                                     self.loss.num_outputs(manifest.task, manifest.num_outputs)),
                                    config.activation, config.dropout, config.layer_norm, config.residual)
            self.local = config.local_steps > 1 or config.outer_optimizer != "none"
            self.steps_per_epoch = self.loader.steps_per_epoch
            epochs = DEFAULT_EPOCHS if config.epochs is None else config.epochs
            self.total_steps = epochs * self.steps_per_epoch if config.steps is None else config.steps
            self.schedule = self._schedule()
            self.hyper = chosen(config, f"--optimizer {config.optimizer}", HYPER[config.optimizer], HYPER)
            empty = make_optimizer(config.optimizer, self.ops, self.spec.layout(), [], np.float32, **self.hyper)
            self._require_memory(len(empty.state))
        self._plan_step()
        self.monitor = config.monitor if config.monitor != "auto" else \
            ("accuracy" if manifest.task == "classification" else "loss")
        self._spent = {"compute": 0.0, "comm": 0.0, "input": 0.0}
        self._since = dict.fromkeys((*self._spent, "step"), 0.0)  # seconds since the ranks last met
        self._print_due = False
        self._comm_s, self._flight_s = np.zeros(2), np.zeros(2)   # of this epoch, of this run
        self._step_times: deque[float] = deque(maxlen=LAST_STEPS)
        self._epoch_rows = self._epoch_s = 0.0
        self._save_s = 0.0
        self._judge: Network | None = None  # evaluates parameters that are not the live ones
        self.trace: Any = None

    def _require_memory(self, moments: int) -> None:
        """Raise Unavailable when the network's vectors and activations cannot fit beside those of this node's ranks."""
        t, sizes = self.topology, self.spec.sizes
        flat = 4 * self.spec.layout().size
        owners = 1 if self.config.full_update or self.local else t.size
        # params, grads, moments, best; with local steps also where the ranks last met, and its momentum
        vectors = flat * (2 + moments / owners + (self.manifest.rows("val") > 0) + 2 * self.local)
        if self.roles is not None and t.rank < self.roles.servers:
            # Slices of moments, and of what every worker sends and gets out of step.
            vectors += flat * (moments / self.roles.servers - moments / owners)
            if self.config.staleness not in (None, "0"):
                vectors += 2 * flat * len(self.roles.workers) / self.roles.servers
        if self.config.wire != "float32" and (t.num_nodes > 1 or self.config.sync == "ring"):
            vectors += flat * (1 + 1 / t.size + 1)  # residuals, masters, messages of both halves
        rows = -(-self.loader.local_rows_max // self.config.accumulate)
        needed = int(vectors + 8 * rows * sum(sizes))
        available = available_bytes()
        if self.config.device == "cpu" and available is not None and needed * t.local_size > available:
            raise Unavailable(f"the network {'-'.join(map(str, sizes))} with local batches of {rows} rows needs about "
                              f"{needed / 2**30:,.1f} GiB on each of the node's {t.local_size} ranks, and "
                              f"{available / 2**30:,.1f} GiB are free on {t.host}; use smaller --hidden or "
                              "--global-batch-size, --accumulate, or fewer ranks per node.")

    def _loader(self, split: str) -> Loader:
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

    def _plan_step(self) -> None:
        """Make the network, the strategy, the optimizer and every buffer of the step."""
        c, m, ops, topology = self.config, self.manifest, self.ops, self.topology
        rows = max(-(-self.loader.local_rows_max // c.accumulate), min(EVALUATION_ROWS, m.rows("val")))
        layout = self.spec.layout()
        self.exchange = open_exchange(self._sync(), topology, layout.size, np.float32, own_params=c.full_update,
                                      wire=c.wire, servers=c.servers or 1, overlap=self._may_overlap())
        on_host = c.device == "cpu"
        self.plan = self._plan_buckets(layout.size)
        self.network = Network(self.spec, ops, rows, self.exchange.params if on_host and not self.local else None,
                               self.exchange.grads if on_host else None, piece=self.plan.piece)
        ops.from_host(self._initial_parameters(), self.network.params)

        def strategy(whole: bool, params: Any) -> Any:
            make = make_strategy(whole, self.exchange.collective.narrow, self.plan.overlap)
            return make(self.exchange.collective, self.plan.buckets, topology.size, params, self.network.grads, ops)

        self.strategy = strategy(c.full_update or self.local, self.network.params)
        optimizer = make_optimizer(c.optimizer, ops, layout, self.strategy.ranges, np.float32, **self.hyper)
        average = None if c.ema is None else Average(ops, self.strategy.ranges, c.ema, np.float32)
        if average is not None:
            average.start(self.network.params)
        parts = (self.network, self.loss, optimizer, self.strategy, ops)
        options = dict(rows=self.loader.local_rows_max, micro_batches=c.accumulate, clip_norm=c.clip_norm, seed=c.seed,
                       shift=self._on_device(m.load_shift), scale=self._on_device(m.load_scale), average=average)
        if self.local:
            from hpcmlp.sync.local import LocalStep  # few runs want it
            anchor = self.exchange.params if on_host else ops.zeros((layout.size,), np.float32)
            self.step = LocalStep(*parts, **options, meets=self._meets, outer=strategy(c.full_update, anchor),
                                  outer_optimizer=c.outer_optimizer, outer_lr=c.outer_lr,
                                  outer_momentum=c.outer_momentum)
        else:
            self.step = Step(*parts, **options)
        self.session = Session(self.comm, self.network, self.strategy, optimizer, average,
                               self.step if self.local else None)
        self._plan_apart()

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

    def _sync(self) -> str:
        """Return the collectives to open: where "auto" would try, a resumed run keeps those that it had.

        Sums over ranks differ in rounding between collectives, and a trial need not end twice alike. Ranks on other
        nodes, or in other numbers, change the order of sums anyway: then it tries again.
        """
        c, t = self.config, self.topology
        if not (c.resume and c.sync == "auto" and rule(t, c.wire)[0] is None):
            return c.sync
        name = b"auto"
        with agreed(self.comm):
            if self.directory is not None:
                from hpcmlp.run import checkpoint
                state, _ = checkpoint.newest_good(c.out)
                had = {} if state is None else state.meta.get("sync", {})
                if (had.get("ranks"), had.get("nodes")) == (t.size, t.num_nodes):
                    name = had["name"].encode()
        return messages.broadcast_bytes(self.comm, name if self.comm.rank == 0 else None).decode()

    def _on_device(self, values: list[float] | None) -> Any:
        """Return float32 `values` where the arithmetic runs."""
        if values is None:
            return None
        array = self.ops.empty((len(values),), np.float32)
        self.ops.from_host(np.array(values, np.float32), array)
        return array

    def _initial_parameters(self) -> np.ndarray:
        """Rank 0 draws the initial parameters and gives them out."""
        layout = self.spec.layout()
        flat = np.empty(layout.size, np.float32)
        if self.topology.rank == 0:
            from hpcmlp.nn.initializers import initialize  # brings numpy.random along
            flat[...] = initialize(self.spec, self.config.seed, self.config.initializer, np.float32)
        messages.broadcast(self.comm, flat)
        return flat

    # ---- the run

    def run(self) -> int:
        """Run from the start or the newest checkpoint to the end; return the exit code 0."""
        self._started = time.monotonic()
        self._reported = 0
        restored = self._restore() if self.config.resume else False
        self._open(restored)
        # Rank 0's clock alone counts; the control words tell the others.
        timed = self.config.time_limit is not None and self.topology.rank == 0
        limit = 60.0 * self.config.time_limit if timed else None
        with StopFlag(limit) as flag:
            try:
                self._loop(flag)
            finally:
                self.console.close()
        self._finish()
        return 0

    def _restore(self) -> bool:
        def check(meta: dict[str, Any]) -> None:
            if meta["dataset_digest"] != self.manifest.digest():
                raise ConfigError(f"--resume with other data: {self.config.data} is not the data set that the run "
                                  f"started with ({meta['data']}); give that one, or another --out.")
            from hpcmlp.run.directory import check_same_run
            check_same_run(meta["config"], _listed(asdict(self.config)), FREE_ON_RESUME)

        found, notes = self.session.restore(self.config.out, check)
        for note in notes:
            self.console.line(f"warning: {note} An older checkpoint is used.")
        return found

    def _open(self, restored: bool) -> None:
        step = self._reported = self.session.progress.step
        with agreed(self.comm):
            if self.directory is not None:
                self.directory.open_log(step if restored else None)
                self.directory.write("config.toml", to_toml(self.config))
                if restored:
                    self._log({"kind": "event", "event": "resume", "step": step, "ranks": self.topology.size})
        self.console.line(header(self._header()))
        if self.exchange.note:
            self.console.line(self.exchange.note)
        if self.config.overlap and not self.plan.overlap:
            why = "there is one rank" if self.topology.size == 1 else \
                f"sync {self.exchange.name} sends nothing while the ranks compute; give --sync ring or shared"
            self.console.line(f"overlap has nothing to act on: {why}")
        if restored:
            self.console.line(f"resumed at step {step} of {self.total_steps}")

    def _header(self) -> list[tuple[str, str]]:
        c, m, t = self.config, self.manifest, self.topology
        cores = len(os.sched_getaffinity(0))
        threads = os.environ.get("OPENBLAS_NUM_THREADS", "default")
        library = MPI.Get_library_version().split("\n")[0].strip(" \0").replace("MPICH Version:", "MPICH").split(",")[0]
        rows = ", ".join(f"{m.rows(s):,} {s}" for s in m.splits)
        width = " ".join(library.split())
        return [("hpcmlp", hpcmlp.__version__),
                ("ranks", f"{t.size} on {t.num_nodes} node{'s' * (t.num_nodes > 1)}; {cores} cores and {threads} BLAS "
                          f"thread(s) for rank 0"),
                ("MPI", f"{width}, sync {self.exchange.name}{self.exchange.why and f' ({self.exchange.why})'}"
                        f"{f', {self.exchange.wire} on the wire' if self.exchange.wire != 'float32' else ''}"
                        f"{', whole update' if c.full_update else ''}{self._overlap_text()}{self._about_servers()}"),
                ("device", c.device + (f", fused kernels {'on' if self.ops.fused else 'off'}"
                                       if c.device == "cpu" else "")),
                ("data", f"{m.name}: {rows} rows of {m.num_features} features, {m.task}, {self.loader.mode}"),
                ("network", f"{'-'.join(map(str, self.spec.sizes))} {c.activation}, "
                            f"{self.network.layout.num_params:,} parameters, {self.loss.kind}"),
                ("training", f"{c.optimizer} lr {c.lr:g} {c.schedule}, global batch {c.global_batch_size}, "
                             f"{self.total_steps:,} steps ({self.steps_per_epoch} an epoch)"),
                *([("rounds", f"of up to {c.local_steps} local steps, then {self.step.describe()}")] if self.local
                  else [])]

    def _about_servers(self) -> str:
        if self.roles is None:
            return ""
        what = "dedicated to" if self.roles.dedicated else "that also train, with"
        return (f", {self.roles.servers} server(s) {what} {len(self.roles.workers)} worker(s), staleness "
                f"{self.config.staleness or 0}{', learning rate by staleness' if self.config.staleness_lr else ''}")
    def _overlap_text(self) -> str:
        number = len(self.plan.buckets)
        if not self.plan.overlap:
            return ""
        return f", overlapped in {number} bucket{'s' * (number > 1)} of {self.plan.bucket_mb:g} MiB"

    def _loop(self, flag: StopFlag) -> None:
        """The steps of the run, each as the design's section 3 has it."""
        c, progress, skips = self.config, self.session.progress, 0
        log = check = False
        fault = None
        if "HPCMLP_FAULT" in os.environ:
            from hpcmlp.run.faults import planned_fault  # tests only
            fault = planned_fault(self.topology.rank)
        if c.trace:
            self._open_trace()
        if self.apart is not None:
            self._loop_apart(flag, fault)
            return
        for number in range(progress.step, self.total_steps):
            if self.trace is not None and self.trace.begin_step(number):
                self._write_trace()
            begin = time.perf_counter()
            epoch, t = divmod(number, self.steps_per_epoch)
            batch = self.loader.batch(epoch, t)
            loaded = time.perf_counter()
            if fault is not None and fault.strike(number, self.network.params):
                raise ConfigError("HPCMLP_FAULT act=leave is for workers of --sync server with --staleness above 0.")
            # What is due within a round of local steps waits for its end.
            log |= (number + 1) % c.log_every == 0
            check |= c.replica_check_every > 0 and number % c.replica_check_every == 0
            result = self.step.run(batch, number, self.schedule.lr(number), stop=flag.poll(self._lead_s()),
                                   check=check, want_norm=log)
            if not result.replicas_agree:
                raise replica_error(self.comm, self.step.checksum(), number)
            self._account(result, number, epoch, loaded - begin, time.perf_counter() - begin, log)
            if not result.steps:
                continue
            log = check = False
            skips = skips + 1 if result.skipped else 0
            if self._after_step(skips, result.stop, flag):
                break
        self._write_trace()

    def _after_step(self, skips: int, stop: bool, flag: StopFlag) -> bool:
        """Do what is due after the step just counted: end of epoch, save, stop; return whether the run ends early."""
        c, done = self.config, self.session.progress.step
        final = done == self.total_steps
        if skips >= (min(MOST_SKIPS, -(-self.steps_per_epoch // c.local_steps)) if final else MOST_SKIPS):
            raise _alike(RunFailed(f"{skips} {'rounds' if self.local else 'steps'} in a row, the last at step {done}, "
                                   "had a loss or gradient that is not finite; lower --lr, add --warmup-steps or "
                                   "--clip-norm, or check the data."))
        ended = self._end_epoch(done // self.steps_per_epoch - 1) if done % self.steps_per_epoch == 0 else False
        last = ended or final
        if last or stop or done % (c.checkpoint_every or self.steps_per_epoch) == 0:
            self._save()
        if stop and not last:
            self._write_trace()
            reason = flag.reason or "a signal on another rank"
            raise _alike(StoppedAndSaved(f"stopped by {reason} after step {done} of {self.total_steps}; all is saved "
                                         f"in {c.out}: run the same command with --resume to go on."))
        return ended

    def _loop_apart(self, flag: StopFlag, fault: Any) -> None:
        """The steps of the run in stretches between meetings; inside one every worker goes at its own pace."""
        c, progress = self.config, self.session.progress
        every, skips = c.checkpoint_every or self.steps_per_epoch, 0

        def account(number: int, result: StepResult, step_s: float) -> None:
            self._account(result, number, number // self.steps_per_epoch, 0.0, step_s, (number + 1) % c.log_every == 0)

        def strike(first: int, last: int) -> bool:
            if fault is None:
                return False
            due = fault.step if fault.step is not None and first <= fault.step <= last else last
            return fault.strike(due, self.network.params)

        def tell(number: int, sentence: str) -> None:
            self.console.line(f"warning: {sentence}")
            self._log({"kind": "event", "event": "lost", "step": number, "reason": sentence})

        while progress.step < self.total_steps:
            begin, start = time.perf_counter(), progress.step
            stop = min(self.total_steps, *(start // n * n + n for n in (every, self.steps_per_epoch)))
            came = self.apart.run(start, stop, wants_stop=lambda: flag.poll(self._lead_s()), strike=strike,
                                  on_step=account, on_loss=tell)
            if came is None:
                while True:     # This worker has left: the others go on, and one of them ends the job.
                    time.sleep(1.0)
            if self.directory is None:
                progress.step, progress.skipped = came.version, progress.skipped + came.skipped
                progress.loss_sum += came.loss
                progress.weight_sum += came.weight
                self._epoch_rows, self._epoch_s = self._epoch_rows + came.rows, time.perf_counter() - begin
            if came.lost:
                self._go_on_without(came.lost)
            self.strategy.share()
            self._check_replicas()
            skips = came.skips + (skips if came.skips == came.version - start else 0)
            if self._after_step(skips, came.stop, flag):
                break

    def _check_replicas(self) -> None:
        """Compare the parameters of all ranks at a meeting. Collective."""
        if not self.config.replica_check_every:
            return
        words, checksum = ControlWords(self.comm.size), self.ops.checksum(self.network.params)
        words.put_checksum(checksum)
        messages.sum_in_place(self.comm, words.array)
        if not words.replicas_agree:
            raise replica_error(self.comm, checksum, self.session.progress.step)

    def _go_on_without(self, lost: list[int]) -> None:
        """Make the survivors a world of their own. Collective over the survivors."""
        from hpcmlp.comm.served import Roles, Served
        self.lost = True
        group = self.comm.group.Incl(self.apart.survivors(lost))
        self.comm = self.session.comm = self.comm.Create_group(group, LOST_TAG)
        self.topology = Topology(self.comm)
        self.roles = Roles(self.roles.servers, self.comm.size)
        self.exchange.collective = Served(self.comm, self.roles.servers)
        self.strategy.go_on(self.exchange.collective, self._server_buckets(self.network.layout.size), self.comm.size)
        self.step.words = ControlWords(self.comm.size)
        if self.val is not None:
            self.val = self._loader("val")
        if not self.roles.dedicated or not len(self.roles.workers):
            self._save()
            raise _alike(StoppedAndSaved("every worker was lost; all is saved up to step "
                                         f"{self.session.progress.step} in {self.config.out}: run the same command "
                                         "with --resume to go on."))
        self.apart.go_on(self.comm, self.roles)

    def end_without_lost(self, world: Any) -> None:
        """End the job where a rank was lost: MPI_Finalize would wait for it for ever. Collective over the survivors.

        Returns only when no rank was lost. The exit code is the one of the exception under way, 0 without one.
        """
        if not self.lost:
            return
        error = sys.exc_info()[1]
        messages.barrier(self.comm)
        if self.topology.rank == 0:
            if isinstance(error, HpcmlpError):
                print(f"hpcmlp: {error}", file=sys.stderr)
            elif error is not None:
                raise error
            end_all(world, getattr(error, "code", 0))
        while True:
            time.sleep(1.0)

    def _lead_s(self) -> float:
        """Seconds before the time limit at which to stop: for the save, and for local steps until the ranks meet."""
        step_s = self._step_times[-1] if self._step_times else 0.0
        return 2 * self._save_s + (min(self.config.local_steps, self.steps_per_epoch) - 1) * step_s

    def _open_trace(self) -> None:
        """Plan to record steps of this run: after a warm-up, but half of a very short run."""
        from hpcmlp.run import trace  # only who asks for it pays for the import
        start = self.session.progress.step
        first = start + min(trace.WARMUP_STEPS, (self.total_steps - start) // 2)
        stop = min(first + (self.config.trace_steps or trace.DEFAULT_STEPS), self.total_steps)
        others = [(self, "_validate", "validation"), (self, "_save", "save")]
        if self.local:
            others += [(self.step, "meet", "meet"), *((self.step.outer, name, f"outer {name}")
                                                      for name in ("reduce", "update", "share", "grad_norm"))]
        self.trace = trace.Recorder(self.comm, self.step, self.loader, first, stop, others)

    def _write_trace(self) -> None:
        """Write what was recorded, if that is still to be done; a failure to write ends all ranks alike. Collective."""
        if self.trace is None:
            return
        lines, name = self.trace.lines(), "trace.json"
        self.trace = None
        with agreed(self.comm):
            if self.directory is not None:
                self.directory.write(name, "\n".join(lines) + "\n")
        self.console.line(f"timeline of all ranks: {os.path.join(self.config.out, name)} (ui.perfetto.dev, "
                          "chrome://tracing)")

    def _account(self, result: StepResult, number: int, epoch: int, input_s: float, step_s: float, log: bool) -> None:
        """Count a finished step, and log it where it is due."""
        progress = self.session.progress
        progress.step = number + 1
        since = self._since
        for name, seconds in (("compute", result.compute_s), ("comm", result.comm_s), ("input", input_s)):
            self._spent[name] += seconds
            since[name] += seconds
        since["step"] += step_s
        self._comm_s += result.comm_s
        self._flight_s += result.flight_s
        self._epoch_s += step_s
        self._print_due |= bool(self.config.print_every) and (number + 1) % self.config.print_every == 0
        if not result.steps:
            return
        mean = {name: seconds / result.steps for name, seconds in since.items()}
        self._since = dict.fromkeys(since, 0.0)
        self._step_times.append(mean["step"])
        self._epoch_rows += result.rows
        if result.skipped:
            progress.skipped += result.steps
            self._log({"kind": "event", "event": "skipped update", "step": number + 1,
                       "reason": "loss or gradient not finite"})
        else:
            progress.loss_sum += result.loss * result.weight
            progress.weight_sum += result.weight
        if result.round is not None and (result.round.lost_steps or result.round.left_out):
            self._log({"kind": "event", "event": "left out", "step": number + 1, "ranks": result.round.left_out,
                       "rank_steps": result.round.lost_steps, "reason": "loss, gradient or state not finite"})
        if log:
            self._log({"kind": "step", "step": number + 1, "epoch": epoch, "loss": result.loss,
                       "lr": self.schedule.lr(number), "grad_norm": result.grad_norm,
                       "samples_per_s": result.rows / result.steps / mean["step"], "compute_s": mean["compute"],
                       "comm_s": mean["comm"], "hidden": result.hidden, "input_s": mean["input"],
                       **({"round": {"steps": result.steps, **asdict(result.round)}} if self.local else {})})
        if self._print_due:
            self._print_due = False
            self.console.line(f"Step {number + 1}, loss = {result.loss:.2f}")
        self.console.progress(number + 1, self.total_steps, result.loss)

    def _end_epoch(self, epoch: int) -> bool:
        """Validate, print and log the epoch; return whether early stopping ends the run."""
        c, progress = self.config, self.session.progress
        train_loss = progress.loss_sum / progress.weight_sum if progress.weight_sum else float("nan")
        progress.loss_sum = progress.weight_sum = 0.0
        val: dict[str, Any] = {}
        if self.val is not None and ((epoch + 1) % c.validate_every == 0 or progress.step == self.total_steps):
            val = self._validate()
        rate = self._epoch_rows / self._epoch_s
        hidden = hidden_share(self._comm_s[0], self._flight_s[0])
        self._comm_s[0] = self._flight_s[0] = 0.0
        self._epoch_rows = self._epoch_s = 0.0
        self.console.line(epoch_line(epoch + 1, None if c.steps is not None else self.total_steps //
                                     self.steps_per_epoch, train_loss, val, rate, self._spent,
                                     hidden if self.plan.overlap else None))
        self._log({"kind": "epoch", "epoch": epoch + 1, "step": progress.step, "train_loss": train_loss, "val": val,
                   "samples_per_s": rate, "seconds": dict(self._spent), "hidden": hidden})
        self._spent = dict.fromkeys(self._spent, 0.0)
        if self.roles is not None:
            self._report_servers(epoch + 1)
        if c.early_stopping is not None and progress.worse >= c.early_stopping:
            self.console.line(f"stopped early: {self.monitor} has not improved in {progress.worse} validations")
            self._log({"kind": "event", "event": "early stop", "step": progress.step})
            return True
        return False

    def _report_servers(self, epoch: int) -> None:
        """Log what the servers did since the last report."""
        from hpcmlp.sync.storage import in_step_report, report_line
        if self.directory is None:
            return
        step = self.session.progress.step
        if self.apart is not None:
            report = self.apart.report()
        else:
            report = in_step_report(self.exchange.collective, step - self._reported)
        self._reported = step
        self.served.append(report)
        self._log({"kind": "server", "epoch": epoch, "step": step, **report})
        self.console.line(report_line(report))

    def _validate(self) -> dict[str, Any]:
        """Evaluate the validation rows with the usable parameters and keep them when they are the best so far."""
        usable, progress = self.session.usable(), self.session.progress
        val = self._evaluate(self.val, usable)
        if self.monitor not in val:
            raise _alike(ConfigError(f"--monitor {self.monitor!r} is not a validation metric of this run; legal: "
                                     f"{', '.join(sorted(val))}."))
        value = val[self.monitor]
        sign = -1.0 if self.monitor.startswith(HIGHER_IS_BETTER) else 1.0
        if math.isfinite(value) and (progress.best_value is None or sign * value < sign * progress.best_value):
            progress.best_value, progress.best_step, progress.best_val = value, progress.step, val
            progress.worse = 0
            self.session.keep_best(usable)
        else:
            progress.worse += 1
        return val

    def _evaluate(self, loader: Loader, flat: np.ndarray) -> dict[str, Any]:
        """Return the metrics of the host parameters `flat`; the live parameters stay as they are."""
        from hpcmlp.run.evaluation import evaluate_split  # after the first epoch, not before the first step
        network = self.network
        if flat is not network.params:
            if self._judge is None:
                rows = min(EVALUATION_ROWS, max(self.manifest.rows("val"), self.manifest.rows("test")))
                self._judge = Network(self.spec, self.ops, rows)
            network = self._judge
            self.ops.from_host(flat, network.params)
        return evaluate_split(network, self.ops, self.loss, loader, self.comm, self.manifest, full=False)

    def _save(self) -> None:
        """Save a checkpoint on rank 0; a failure to write ends all ranks alike."""
        begin = time.perf_counter()
        self.session.progress.seconds += time.monotonic() - self._started
        self._started = time.monotonic()
        state = self.session.capture(self._meta())
        with agreed(self.comm):
            if self.directory is not None:
                from hpcmlp.run import checkpoint
                path = checkpoint.save(self.config.out, state.meta["step"], state, self.config.keep)
                self._log({"kind": "event", "event": "saved", "step": state.meta["step"],
                           "checkpoint": path.name})
        self._save_s = time.perf_counter() - begin

    def _meta(self) -> dict[str, Any]:
        m = self.manifest
        model = {name: getattr(m, name) for name in ("task", "classes", "target_names", "feature_names", "x_dtype",
                                                     "preprocessing", "load_shift", "load_scale", "target_shift",
                                                     "target_scale")}
        return {"config": _listed(asdict(self.config)), "network": asdict(self.spec), "loss": self.loss.metadata(),
                "data": os.path.abspath(self.config.data), "dataset_digest": m.digest(),
                "versions": versions(), **self._storage(),
                "sync": {"name": self.exchange.name, "ranks": self.topology.size, "nodes": self.topology.num_nodes},
                "model": {**model, "preprocessing_digest": m.preprocessing_digest()}}

    def _storage(self) -> dict[str, Any]:
        """Who stores which slice, for `inspect`."""
        if self.roles is None:
            return {}
        from hpcmlp.sync.storage import describe_slices
        return {"server": describe_slices(self.network.layout.size, self.roles, len(self.step.optimizer.state),
                                          self.session.progress.step, self.config.staleness or "0")}

    def _log(self, record: dict[str, Any]) -> None:
        if self.directory is not None:
            self.directory.log(record)

    def _finish(self) -> None:
        """Evaluate the test split with the best parameters, write the summary and the curves."""
        c, progress = self.config, self.session.progress
        flat = self.session.usable() if self.session.best is None else self.strategy.whole(self.session.best)
        test: dict[str, Any] = {}
        if c.test and self.manifest.rows("test"):
            with agreed(self.comm):
                loader = self._loader("test")
            test = self._evaluate(loader, flat)
            self.console.line("test " + "  ".join(f"{k} {v:.4f}" for k, v in test.items() if isinstance(v, float)))
        with agreed(self.comm):
            if self.directory is not None:
                self._write_summary(flat, test)
        if self.local:
            self.console.line(self.step.report(self.exchange.wire))
        self.console.line(f"finished {progress.step} steps in {progress.seconds:.1f} s; run directory {c.out}")

    def _write_summary(self, flat: np.ndarray, test: dict[str, Any]) -> None:
        from hpcmlp.run.directory import to_json
        c, progress, layout = self.config, self.session.progress, self.network.layout
        median = float(np.median(list(self._step_times))) if self._step_times else 0.0
        from hpcmlp.run.curves import draw_curves  # rank 0 only, at the end
        note = draw_curves([c.out], os.path.join(c.out, "curves.png"))
        if note:
            self.console.line(note)
        self.directory.write("summary.json", to_json(
            {"status": "finished", "steps": progress.step, "epochs": progress.step / self.steps_per_epoch,
             "ranks": self.topology.size, "nodes": self.topology.num_nodes, "sync": self.exchange.name,
             "wire": self.exchange.wire, "overlap": self.plan.overlap, "buckets": len(self.plan.buckets),
             "bucket_mb": self.plan.bucket_mb, "hidden": hidden_share(self._comm_s[1], self._flight_s[1]),
             "device": c.device, **self._served_summary(),
             **({"local": self.step.statistics(self.exchange.wire)} if self.local else {}),
             "test": test, "val": progress.best_val or {}, "best_step": progress.best_step,
             "skipped_updates": progress.skipped,
             "parameters_sha256": layout.sha256(flat),
             "num_params": layout.num_params,
             "samples_per_s": min(c.global_batch_size, self.manifest.rows("train")) / median if median else None,
             "step_s": median, "wall_s": progress.seconds, "versions": versions()}) + "\n")


    def _served_summary(self) -> dict[str, Any]:
        if self.roles is None:
            return {}
        from hpcmlp.sync.storage import add_reports
        return {"server": {"servers": self.roles.servers, "staleness_bound": self.config.staleness or "0",
                           **add_reports(self.served)}}


def _listed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values as JSON would give them back: tuples as lists."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _alike(error: Exception) -> Exception:
    """Mark an error that all ranks raise from the same facts."""
    error.agreed = True
    return error


assert {f.name for f in fields(TrainConfig)} >= FREE_ON_RESUME, "FREE_ON_RESUME names options"
