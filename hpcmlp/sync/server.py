"""The parameter server as a strategy: slices on servers, workers that push gradients and pull parameters.

M. Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014. Ranks 0 .. K-1 serve, one
contiguous slice of the flat vector each, with the optimizer's state of that slice alone; rank 0 is the coordinator too.
With K = P every rank serves and trains, which is the sliced update of the ring seen from the other side.

`--staleness 0`: in step. `comm.served.Served` stands behind `SlicedUpdate` like any collective; dedicated servers take
part in every step with empty local batches. Checkpoints, clipping, averages, traces work as ever.

`--staleness S` and `async`: out of step, in *stretches* between meetings. A meeting is an end of an epoch, a
checkpoint, or a stop that was asked for: there all ranks are at one version and ordinary collective code runs. Inside
a stretch (`Apart`) every worker turns alone: task and parameters from the servers, gradient, push. `sync.ledger` says
what a task, an update, staleness and its bound are, `comm.post` how messages go. Every pull is one version of the whole
vector, because server 0 orders all additions, updates and answers, and the other servers follow its orders. Every
sample is used once an epoch, by whoever is free, so a slow worker takes fewer tasks. A worker keeps all training rows
(or streams them), since it may get any task. A skipped update (numbers not finite) counts as a step, as ever. What
needs a global view of one gradient in the update is done per push: `--clip-norm` limits each worker's own mean
gradient, and `--staleness-lr` divides a push by its staleness (Zhang et al., IJCAI 2016).

Servers are dedicated out of step. A rank that serves and trains would let every push wait for its own matrix products,
or need a thread inside MPI at all times, which not every library grants; `check_options` refuses it.

Losses. A worker that has a task and gives no sign for `--worker-timeout` seconds, or says that it leaves, is dropped:
its task goes to the next worker that asks, so that no sample is lost, the others go on at once, and at the next meeting
the survivors make a communicator of their own (MPI_Comm_create_group, which only they call). A push that comes after
all is not read. When no worker is left, the update under way is given up, the last whole version saved, and the run
ends with 75. A lost server ends the job as a lost rank does in any other strategy.

Who waits for whom. A worker computes, or it waits for its answer: for server 0's decision, then for slices. Server 0
never waits for one worker: it takes what has come, and holds an answer back only while a worker that computes has an
urgent push out, for at most the time limit. A message that is waited for by itself has already left: a server waits
for the slice of a push whose words it has, or has been told of by an order, and words leave after all slices have been
handed over. Other servers wait for server 0's orders, and server 0 waits for them only to take orders off, which they
do always. So all arrows lead from workers to servers, from servers to server 0, and from there to workers that compute:
no cycle. A worker that stops while it receives leaves copies in buffers that nobody else needs.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hpcmlp.comm.post import Post
from hpcmlp.comm.served import Roles
from hpcmlp.errors import ConfigError
from hpcmlp.sync.ledger import Ledger
from hpcmlp.sync.step import Step, StepResult
from hpcmlp.sync.storage import slice_bounds
from hpcmlp.sync.tasks import Tasks

DEFAULT_TIMEOUT_S = 60.0
HELLO, LEAVE = -1, -2                               # instead of a task in a worker's words
TASK, MEET, ADD, UPDATE, GIVE = 1.0, 2.0, 3.0, 4.0, 5.0     # kinds of grants and orders
GIVE_UP_S = 0.05                                    # between looks at signals and clocks
MOST_SKIPS = 10


def read_staleness(text: str | None) -> float:
    """Return the bound that `--staleness` gives: 0 when left out, math.inf for 'async'. Local; raises ConfigError."""
    if text in (None, "async"):
        return 0.0 if text is None else math.inf
    if not text.isdigit():
        raise ConfigError(f"--staleness {text!r}: give a number of steps from 0, or 'async'.")
    return float(text)


def check_options(options: Any, size: int) -> None:
    """Raise ConfigError when the options of a run (attributes named as on the command line) do not go together. Local.

    `size`: ranks of the launch.
    """
    staleness = read_staleness(options.staleness)
    servers = options.servers or 1
    if servers > size:
        raise ConfigError(f"--servers {servers} with {size} rank{'s' * (size > 1)}: give at most as many servers as "
                          "ranks, or start more ranks.")
    wrong = {"--full-update": options.full_update, "--bucket-mb": options.bucket_mb != type(options).bucket_mb,
             "--overlap": options.overlap, "--local-steps": options.local_steps > 1,
             "--outer-optimizer": options.outer_optimizer != "none"}
    for name, given in wrong.items():
        if given:
            raise ConfigError(f"{name} has no effect with --sync server, whose servers hold one slice each and update "
                              "it alone; leave it out, or use --sync ring.")
    if staleness == 0:
        for name, given in {"--staleness-lr": options.staleness_lr, "--worker-timeout": options.worker_timeout}.items():
            if given not in (False, None):
                raise ConfigError(f"{name} has no effect with --staleness 0, where all workers are in step; give "
                                  "--staleness above 0 or async.")
        return
    if servers == size:
        raise ConfigError(f"--staleness {options.staleness} needs dedicated servers, and all {size} ranks would serve "
                          "and train; give --servers below the number of ranks, or --staleness 0.")
    never = {"--trace": (options.trace, "one timeline of steps needs steps in common"),
             "--device gpu": (options.device == "gpu", "servers add and update on the host"),
             f"--optimizer {options.optimizer}": (options.optimizer in ("lamb", "lars"),
                                                  "its norms of whole tensors need all slices at one moment")}
    for name, (given, why) in never.items():
        if given:
            raise ConfigError(f"{name} does not go with --staleness {options.staleness}: {why}; use --staleness 0.")


@dataclass
class Stretch:
    """What a stretch came to, the same on all ranks that are left.

    `version` counts the steps of the run; `rows`, `weight`, `loss` (a sum) and `skipped` are those of the stretch;
    `skips` counts skipped steps in a row; `stop` says that someone asked for it; `lost` names lost ranks.
    """

    version: int = 0
    rows: int = 0
    weight: float = 0.0
    loss: float = 0.0
    skipped: int = 0
    skips: int = 0
    stop: bool = False
    lost: list[int] = field(default_factory=list)


# A grant or an order: kind, worker or task, value, a stretch's seven numbers, then per worker whether it is lost.
FACTS = 10
# A worker's words: the control words, then these.
TASK_WORD, SCALE_WORD, COMPUTE_WORD, WAIT_WORD = -4, -3, -2, -1


class Apart:
    """Workers at their own pace: the stretches of a run, seen from this rank.

    Collective over `comm`.

    Parameters
    ----------
    roles : dedicated servers and workers.
    step : the planned step; its strategy's one bucket holds the servers' slices.
    tasks : `Tasks` on workers, None on servers.
    staleness : the bound, at least 1, or math.inf.
    staleness_lr : divide a push by its staleness.
    timeout_s : see the module.
    learning_rate : function of the step.
    """

    def __init__(self, comm: Any, roles: Roles, step: Step, tasks: Tasks | None, *, staleness: float,
                 staleness_lr: bool, timeout_s: float, learning_rate: Callable[[int], float]):
        self.roles, self.step, self.tasks = roles, step, tasks
        self.staleness, self.staleness_lr, self.learning_rate = staleness, staleness_lr, learning_rate
        self.slots = len(roles.workers)
        self.ledger = Ledger(self.slots, staleness, timeout_s)
        self._ranks = list(roles.workers)
        self._old: list[Post] = []
        self._open(comm, roles)

    def _open(self, comm: Any, roles: Roles) -> None:
        self.rank, self.roles = comm.rank, roles
        self.bounds = slice_bounds(self.step.strategy.params.size, roles.servers)
        self.post = Post(comm, roles, self.bounds, self.step.strategy.params, self.step.strategy.grads,
                         self.step.words.array.size + 4, FACTS + len(roles.workers))

    def go_on(self, comm: Any, roles: Roles) -> None:
        """Go on among the survivors. Collective over `comm`, theirs; workers are numbered anew."""
        # A lost worker that wakes up may still write: what was prepared for it must stay where it is.
        self._old.append(self.post)
        self.ledger.alive = list(range(len(roles.workers)))
        self._open(comm, roles)

    def run(self, start: int, stop: int, *, wants_stop: Callable[[], bool], strike: Callable[[int, int], bool],
            on_step: Callable[[int, StepResult, float], None],
            on_loss: Callable[[int, str], None]) -> Stretch | None:
        """Do the steps `start` .. `stop` - 1, fewer when a stop is asked for or no worker is left.

        Collective, but for workers that are lost. Afterwards the servers' slices are at one version; `strategy.share`
        gives them to all.

        Parameters
        ----------
        wants_stop : whether this rank asks all to stop.
        strike : called with (first, last) on a worker that has a task of step `last` and had none of the steps before
            it from `first` on; True: this worker leaves.
        on_step : called on server 0 with (step, result, seconds since the one before); workers' seconds are means.
        on_loss : called on server 0 with (step, sentence) as soon as a worker is dropped.

        Returns
        -------
        What it came to; None on a worker that has left.
        """
        if self.tasks is not None:
            return self._work(wants_stop, strike)
        if self.rank == 0:
            self._on_step, self._on_loss = on_step, on_loss
            return self._lead(start, stop, wants_stop)
        return self._follow(start)

    # ---- workers

    def _work(self, wants_stop: Callable[[], bool], strike: Callable[[int, int], bool]) -> Stretch | None:
        """Take tasks until a meeting is called."""
        post, told, last = self.post, self.post.words, None
        told[:] = 0.0
        told[TASK_WORD] = HELLO
        post.push(gradient=False)
        while True:
            begin = time.perf_counter()
            grant = post.pull()
            given = time.perf_counter()
            if grant[0] == MEET:
                return self._read(grant)
            task = int(grant[1])
            number = task // self.slots
            # The steps between two tasks of this worker were others' business, but a fault is planned for a step.
            if strike(number if last is None else min(last + 1, number), number):
                told[TASK_WORD] = LEAVE
                post.push(gradient=False)
                return None
            last = number
            self._tell(task, number, wants_stop())
            told[COMPUTE_WORD], told[WAIT_WORD] = time.perf_counter() - given, given - begin
            post.push()

    def _tell(self, task: int, number: int, stop: bool) -> None:
        """Compute the gradient of a task and write the words that go with it."""
        step, told = self.step, self.post.words
        words = step.words
        words.clear()
        if stop:
            words.ask_to_stop()
        step._gradient(self.tasks.task(task), number)
        told[:words.array.size] = words.array
        told[TASK_WORD], told[SCALE_WORD] = task, 1.0
        if step.clip_norm is not None and words.weight:
            norm = math.sqrt(step.ops.sum_squares(step.strategy.grads)) / words.weight
            if norm > step.clip_norm:
                told[SCALE_WORD] = step.clip_norm / norm

    # ---- server 0

    def _lead(self, start: int, stop: int, wants_stop: Callable[[], bool]) -> Stretch:
        """Serve until every step is done, or all workers are lost."""
        ledger = self.ledger
        ledger.begin(start, stop, time.monotonic())
        found = self._found = Stretch(version=start)
        self._since = time.perf_counter()
        self._begin(start)
        while ledger.alive and not ledger.done:
            for worker in self.post.arrived(GIVE_UP_S):
                self._arrived(worker)
            if found.skips >= MOST_SKIPS:
                ledger.stop()
            elif found.stop or wants_stop():
                found.stop = True
                ledger.stop()
            for worker in ledger.late(time.monotonic()):
                self._drop(worker, f"gave no sign for {ledger.timeout_s:g} s")
        self._order(MEET)
        return found

    def _arrived(self, worker: int) -> None:
        task = int(self.post.words[worker, TASK_WORD])
        if task == LEAVE:
            self._drop(worker, "left")
        elif task == HELLO:
            self.ledger.hello(worker)
            self._give(worker)
        else:
            self.ledger.held.append(worker)
            self._add_what_may_be()

    def _add_what_may_be(self) -> None:
        """Add held pushes, first come first, as long as one of them may be added."""
        ledger, told = self.ledger, self.post.words
        while (worker := next((w for w in ledger.held if ledger.may_add(w)), None)) is not None:
            ledger.held.remove(worker)
            staleness = ledger.add(worker)
            scale = told[worker, SCALE_WORD] / (max(1, staleness) if self.staleness_lr else 1)
            ledger.note(self._ranks[worker], told[worker, COMPUTE_WORD], told[worker, WAIT_WORD])
            self._sums += told[worker]
            self._order(ADD, worker, scale)
            if ledger.full:
                self._close_update()
            self._give(worker)

    def _close_update(self) -> None:
        """Order the update, unless numbers are not finite, and tell of the step."""
        ledger, found = self.ledger, self._found
        words = self.step.words
        words.array[:] = self._sums[:words.array.size]
        seconds = self._sums[[COMPUTE_WORD, WAIT_WORD]] / self.slots
        self._sums[:] = 0.0
        skipped = bool(words.not_finite) or words.weight == 0.0
        self._order(UPDATE, 0, 0.0 if skipped else 1.0 / words.weight)
        ledger.close()
        found.version, found.stop = ledger.version, found.stop or words.stop
        found.rows += words.rows
        found.skipped += skipped
        found.skips = found.skips + 1 if skipped else 0
        if not skipped:
            found.loss, found.weight = found.loss + words.loss, found.weight + words.weight
        now = time.perf_counter()
        result = StepResult(rows=words.rows, weight=words.weight, skipped=skipped,
                            loss=words.loss / words.weight if words.weight else 0.0, compute_s=float(seconds[0]),
                            comm_s=float(seconds[1]))
        self._on_step(ledger.version - 1, result, now - self._since)
        self._since = now

    def _give(self, worker: int) -> None:
        """Answer a worker with the next task; without one it waits."""
        task = self.ledger.give(worker, time.monotonic())
        if task is not None:
            self._order(GIVE, worker, task)

    def _drop(self, worker: int, why: str) -> None:
        """Go on without a worker: its task to the next that asks, its place in the bound to nobody."""
        task = self.ledger.drop(worker)
        self.post.forget(worker)
        self._found.lost.append(self.roles.workers[worker])
        left = len(self.ledger.alive)
        passed_on = f"its task {task} goes to the next that asks" if task is not None else "it had no task"
        self._on_loss(self.ledger.version, f"rank {self._ranks[worker]} {why} and is lost; {passed_on}, {left} "
                                           f"worker{'s' * (left != 1)} left")
        self._add_what_may_be()
        for other in self.ledger.waiting():
            self._give(other)

    def _order(self, kind: float, worker: int = 0, value: float = 0.0) -> None:
        """Decide: tell the other servers and do it here."""
        facts, found = self._facts, self._found
        facts[:3] = kind, worker, value
        facts[3:FACTS] = (found.version, found.rows, found.weight, found.loss, found.skipped, found.skips, found.stop)
        facts[FACTS:] = [rank in found.lost for rank in self.roles.workers]
        self.post.order(facts)
        self._obey(facts)

    # ---- all servers

    def _begin(self, version: int) -> None:
        self._version, self._added, self._pulled = version, 0, {}
        self._facts = np.zeros(FACTS + len(self.roles.workers))
        self._sums = np.zeros(self.step.words.array.size + 4)

    def _follow(self, start: int) -> Stretch:
        """Carry out server 0's orders until it calls a meeting."""
        self._begin(start)
        while True:
            facts = self.post.next_order()
            self._obey(facts)
            if facts[0] == MEET:
                return self._read(facts)

    def _obey(self, facts: np.ndarray) -> None:
        """Add a push, update the slice, or send it out."""
        kind, worker, value = facts[0], int(facts[1]), float(facts[2])
        if kind == ADD:
            self._add(worker, value)
        elif kind == UPDATE:
            if value:
                self.step.strategy.update(self.step.optimizer, self.learning_rate(self._version), self._version + 1,
                                          value)
                if self.step.average is not None:
                    self.step.average.update(self.step.strategy.params)
            self._version += 1
            self._added = 0
        elif kind == GIVE:
            self._pulled[worker] = self._version
            self._send(worker, TASK, value, facts)
        else:
            for number in np.flatnonzero(facts[FACTS:] == 0.0).tolist():
                self._send(number, MEET, 0.0, facts)

    def _add(self, worker: int, scale: float) -> None:
        """Add the push of `worker` to this server's slice of the gradient."""
        staleness = self._version - self._pulled.pop(worker)
        assert staleness <= self.staleness, f"server {self.rank}: staleness {staleness} exceeds {self.staleness:g}"
        pushed = self.post.take(worker)
        total = self.step.strategy.grads[self.bounds[self.rank]:self.bounds[self.rank + 1]]
        if scale != 1.0:
            np.multiply(pushed, pushed.dtype.type(scale), out=pushed)
        if self._added == 0:
            total[:] = pushed
        else:
            np.add(total, pushed, out=total)
        self._added += 1

    def _send(self, worker: int, kind: float, task: float, facts: np.ndarray) -> None:
        """Send this server's slice to `worker`."""
        grant = facts.copy()
        grant[:3] = kind, task, self._version
        params = self.step.strategy.params
        self.post.give(worker, params[self.bounds[self.rank]:self.bounds[self.rank + 1]], grant)

    def _read(self, facts: np.ndarray) -> Stretch:
        """Return what server 0's facts say of the stretch."""
        version, rows, weight, loss, skipped, skips, stop = facts[3:FACTS]
        lost = [rank for rank, gone in zip(self.roles.workers, facts[FACTS:], strict=True) if gone]
        return Stretch(int(version), int(rows), float(weight), float(loss), int(skipped), int(skips), bool(stop), lost)

    def survivors(self, lost: list[int]) -> list[int]:
        """Return the ranks of the present communicator that are left. Local."""
        self._ranks = [name for rank, name in zip(self.roles.workers, self._ranks, strict=True) if rank not in lost]
        return [rank for rank in range(self.roles.size) if rank not in lost]

    def report(self) -> dict[str, Any]:
        """Return the statistics since the last report as JSON-able values, and begin anew. Server 0, local."""
        found = self.ledger.report()
        sent = 4 * int(self.bounds[-1])
        return {"staleness": {str(k): found.staleness[k] for k in sorted(found.staleness)},
                "workers": [{"rank": rank, **asdict(found.workers[rank])} for rank in sorted(found.workers)],
                "bytes_pushed": found.pushes * sent, "bytes_pulled": found.gives * sent}

    def free(self) -> None:
        """Give everything back. Collective, when no rank was lost."""
        if not self._old:
            self.post.free()
