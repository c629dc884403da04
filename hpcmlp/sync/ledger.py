"""The book of server 0: which worker has which task at which version, whose push may be added, who is lost.

Words. A *task* is one of the `slots` equal slices of one global batch, numbered through the run: task n is slice
n % slots of batch n // slots. An *update* adds the pushes of any `slots` tasks, so that an update still stands for one
global batch's worth of samples, and steps, schedules, Adam's bias corrections and checkpoints mean what they mean
everywhere else (W. Zhang et al., "Staleness-aware Async-SGD for distributed deep learning", IJCAI 2016: 1-softsync;
`slots` is the number of workers at the start). The *version* counts updates. A push's *staleness* is the version it is
added to minus the version its worker had pulled.

The bound (Q. Ho et al., "More effective distributed ML via a stale synchronous parallel parameter server", NIPS 2013;
a worker's clock is the version it has pulled): staleness never exceeds S >= 1. A push pulled at version p must be in
update p + S at the latest. So the update under way, number v, keeps room for the *urgent* pushes still out, those with
p <= v - S; any other push is added only while more room is left, and is held back otherwise, and its worker waits.
Room is always enough: there are at most `slots` workers, each with one push out, and an update has `slots` places; a
push that is not urgent for v has all of update v + 1 before it. Hence no push comes too late, and held pushes wait
only for workers that compute: when the urgent pushes have come, or their workers are given up, the update is full.

Knows no MPI and no arrays; time is passed in.
"""

import math
from dataclasses import dataclass, field


@dataclass
class Out:
    """A task that a worker has: what it is, the version pulled for it, when it was given."""

    task: int
    version: int
    since: float


@dataclass
class Record:
    """What a worker did since the last report."""

    pushes: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0


@dataclass
class Statistics:
    """Since the last report: pushes by staleness, what each worker (by rank) did, answers with parameters."""

    gives: int = 0
    staleness: dict[int, int] = field(default_factory=dict)
    workers: dict[int, Record] = field(default_factory=dict)

    @property
    def pushes(self) -> int:
        """All pushes together."""
        return sum(self.staleness.values())


class Ledger:
    """Tasks, versions and losses of one run.

    Parameters
    ----------
    slots : tasks of an update, workers numbered 0 .. slots - 1.
    staleness : the bound S >= 1, or math.inf.
    timeout_s : a worker that has a task and gives no sign for so long is lost.
    """

    def __init__(self, slots: int, staleness: float, timeout_s: float):
        self.slots, self.staleness, self.timeout_s = slots, staleness, timeout_s
        self.version = self.added = 0
        self.out: dict[int, Out] = {}
        self.held: list[int] = []
        self.idle: list[int] = []
        self.alive = list(range(slots))
        self.statistics = Statistics()
        self._returned: list[int] = []
        self._next = self._limit = 0

    def begin(self, version: int, stop: int, now: float) -> None:
        """Open the tasks of updates `version` .. `stop` - 1. Local; every worker alive is expected to ask for one."""
        assert not self.out and not self.held and self.added == 0
        self.version, self._next, self._limit = version, version * self.slots, stop * self.slots
        self._returned, self.idle = [], []
        # Until a worker asks it has what cannot be given back: no task.
        self.out = {worker: Out(-1, version, now) for worker in self.alive}

    @property
    def done(self) -> bool:
        """Whether all tasks are in updates and every worker alive has asked for another."""
        return self.version * self.slots >= self._limit and not self.out

    def hello(self, worker: int) -> None:
        """Note that `worker` asks for its first task of this stretch. Local."""
        del self.out[worker]

    def may_add(self, worker: int) -> bool:
        """Return whether the push of `worker` may join the update under way. Local."""
        urgent = sum(out.task >= 0 and out.version <= self.version - self.staleness for out in self.out.values())
        own = self.out[worker].version <= self.version - self.staleness
        return own or self.slots - self.added > urgent

    def add(self, worker: int) -> int:
        """Count the push of `worker` into the update under way; return its staleness. Local."""
        staleness = self.version - self.out.pop(worker).version
        assert staleness <= self.staleness, f"staleness {staleness} of worker {worker} exceeds {self.staleness}"
        self.added += 1
        self.statistics.staleness[staleness] = self.statistics.staleness.get(staleness, 0) + 1
        return staleness

    @property
    def full(self) -> bool:
        """Whether the update under way has all its pushes."""
        return self.added == self.slots

    def close(self) -> None:
        """Count the update. Local."""
        self.version += 1
        self.added = 0

    def give(self, worker: int, now: float) -> int | None:
        """Return the next task for `worker`, None when there is none now; then it is idle. Local."""
        if self._returned:
            task = self._returned.pop(0)
        elif self._next < self._limit:
            task = self._next
            self._next += 1
        else:
            self.idle.append(worker)
            return None
        self.out[worker] = Out(task, self.version, now)
        self.statistics.gives += 1
        return task

    def waiting(self) -> list[int]:
        """Return the workers without a task, who may ask again. Local."""
        found, self.idle = self.idle, []
        return found

    def note(self, rank: int, compute_s: float, wait_s: float) -> None:
        """Count a push of `rank` with its seconds of work and of waiting for its answer. Local."""
        record = self.statistics.workers.setdefault(rank, Record())
        record.pushes += 1
        record.compute_s += compute_s
        record.wait_s += wait_s

    def late(self, now: float) -> list[int]:
        """Return the workers that have had a task for too long. Local."""
        return [worker for worker, out in self.out.items()
                if worker not in self.held and now - out.since > self.timeout_s]

    def drop(self, worker: int) -> int | None:
        """Give `worker` up; its open task, which is returned, goes to the next that asks. Local."""
        self.alive.remove(worker)
        out = self.out.pop(worker, None)
        for queue in (self.held, self.idle):
            if worker in queue:
                queue.remove(worker)
        if out is None or out.task < 0:
            return None
        self._returned.append(out.task)
        return out.task

    def stop(self) -> None:
        """Give out no more tasks than fill the update of the last one given. Local."""
        self._limit = min(self._limit, math.ceil(self._next / self.slots) * self.slots)

    def report(self) -> Statistics:
        """Return the statistics and begin anew. Local."""
        found, self.statistics = self.statistics, Statistics()
        return found
