"""The watchdog: says which rank the others wait for, in which operation and at which line, and ends a wait without end.

A daemon thread on every rank writes its sign of life (`signs`), and the first rank of each node that gives any looks
at those of its node; rank 0 hears of the others past MPI (`beacon`). Beyond the limit it prints one line and has the
stacks of all ranks written into the run directory; beyond a multiple of it (`lateness`) the job ends with 75, or, in
an elastic run, the late rank alone. It works while a rank is stopped, in C code or gone, since nothing is asked of it.

Cost: one store into memory each time the main thread changes what it does, and some 0.1 ms of this thread a beat, an
eighth of the limit and at most a second.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hpcmlp.comm.messages import all_gather_bytes, gather_bytes
from hpcmlp.run.lateness import SILENT, STUCK, Verdict, judge, sentence, with_age
from hpcmlp.run.signs import PHASES, Sign, Signs, line_of

BEATS = 8               # beats within the limit
LONGEST_BEAT_S = 1.0
GRACE_S = 1.0           # in which the launcher may end a job whose rank has gone
SENDS = 16              # messages to rank 0 within the limit
STACKS_S = 0.3          # in which a rank writes its stacks
TOLD = 8                # ranks of a node in one message
CODE = 75
END_FILE = "watchdog.txt"   # in the run directory: why the watchdog has ended a job
START, INPUT, STEP, VALIDATION, SAVE, END = range(len(PHASES))


class Watchdog:
    """Watches all ranks of a topology, from its making to its `close`; also a context manager.

    Collective over `topology.comm`. Local afterwards: nothing here waits for another rank.

    Parameters
    ----------
    limit_s : seconds that a rank may wait for others before it is said; 0: nobody is watched.
    folder : directory for the stacks; None: they go to standard error.
    end : called with an exit code from the watchdog's thread; ends all ranks and never returns.
    removes : whether a late rank is killed for itself, because the others can go on without it.

    Example
    -------
    with Watchdog(topology, 60.0, "runs/mine", end) as watch:
        watch.mark(STEP, 17)    # 0.1 us
    """

    def __init__(self, topology: Any, limit_s: float, folder: str | None, end: Callable[[int], Any],
                 removes: bool = False):
        self.limit_s, self._folder, self._end, self._removes = limit_s, folder, end, removes
        self._thread: threading.Thread | None = None
        self.mark: Callable[[int, int], None] = _no_mark
        if limit_s <= 0 or topology.size == 1:
            return
        node = topology.node
        ranks = [int(text) for text in all_gather_bytes(node, str(topology.rank).encode())]
        self._signs = Signs(node, ranks, topology.host)
        self.mark = self._signs.mark
        self._beacon: Any = None
        if topology.num_nodes > 1:
            from hpcmlp.run.beacon import Beacon  # a node alone is spared its imports
            self._beacon = Beacon(topology, ranks, [self._signs.read(k).pid for k in range(len(ranks))])
            if self._beacon.note:
                self._say(self._beacon.note)
        self._local_rank, self._is_center = node.rank, topology.rank == 0
        self._judges = ranks[0] == 0            # rank 0's node judges for all
        self._far = self._expect(topology)      # what is known of other nodes' ranks
        self._heard: dict[int, float] = {}      # node -> when it last spoke
        self._parent = os.getppid() if node.size > 1 or topology.size > 1 else 0
        self._beat_s = min(limit_s / BEATS, LONGEST_BEAT_S)
        self._said: Any = None                  # the wait that was announced
        self._missed: dict[int, float] = {}     # local ranks that have gone, and when that was seen
        self._wanted = self._written = 0        # stacks asked for by rank 0, and written here
        self._sent = self._trusts = 0.0         # when rank 0 was told; from when on silence is believed
        self._beaten = time.monotonic()
        self._stacks = os.memfd_create("hpcmlp-stacks")
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)   # what `close` leaves: a late one must not end this process
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        self._signs.offer_stacks(self._stacks)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hpcmlp-watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave: this rank is not missed from now on. Local."""
        if self._thread is None:
            return
        self._signs.leave()
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(GRACE_S)
        faulthandler.unregister(signal.SIGUSR2)
        os.close(self._stacks)
        if self._beacon is not None:
            self._beacon.close()
        self._thread = None

    # ---- the thread

    def _expect(self, topology: Any) -> dict[int, dict[int, Sign]]:
        """Return node -> rank -> a first sign of its ranks: on rank 0 of all other nodes, elsewhere of rank 0's."""
        if self._beacon is None:
            return {}
        leader = topology.local_rank == 0
        own = [self._signs.read(k) for k in range(topology.local_size)] if leader else []
        text = "\n".join(f"{self._beacon.node} {s.rank} {s.pid} {s.host}" for s in own)
        found: dict[int, dict[int, Sign]] = {}
        for block in gather_bytes(topology.comm, text.encode()) or ():
            for line in block.decode().splitlines():
                number, rank, pid, host = line.split(" ", 3)
                if int(number):
                    found.setdefault(int(number), {})[int(rank)] = Sign(int(rank), host, int(pid))
        if not self._is_center:
            host, ranks, pids = self._beacon.center
            found = {0: {rank: Sign(rank, host, pid) for rank, pid in zip(ranks, pids, strict=True)}}
        return found

    def _run(self) -> None:
        started = time.monotonic()
        self._heard = dict.fromkeys(self._far, started)
        while not self._stop.wait(self._beat_s):
            try:
                self._beat(time.monotonic())
            except Exception as error:      # a watchdog that fails must not fail the run
                print(f"hpcmlp: the watchdog has failed and watches no more: {type(error).__name__}: {error}",
                      file=sys.stderr, flush=True)
                return

    def _beat(self, now: float) -> None:
        self._signs.look()
        late_s, self._beaten = now - self._beaten - self._beat_s, now
        if late_s > max(2 * self._beat_s, self.limit_s / 4):
            self._trusts = now + self.limit_s / 2
        if self._parent and os.getppid() != self._parent:
            self._say("the launcher has ended; this rank ends too")
            os._exit(CODE)
        if self._beacon is not None and self._local_rank == 0:
            self._talk(now)
        if not self._acts():
            return
        signs = [self._signs.read(k) for k in range(len(self._signs.ranks))]
        if not self._removes:
            self._look_for_gone(now)
        far = self._signs_of_others(now)
        in_contact = not self._judges and all(sign.silent_s < self.limit_s / 2 for sign in far)
        # After a time in which this thread itself got no processor the others' silence says nothing.
        verdict = None if in_contact or now < self._trusts else judge(signs + far, self.limit_s)
        if verdict is None:
            if self._said is not None:
                self._said = None
                self._say("the wait is over, the run goes on")
            return
        verdict = self._with_states(verdict)
        if self._said != verdict.key:
            self._said = verdict.key
            self._announce(verdict)
        self._act(verdict)

    def _acts(self) -> bool:
        """Whether this rank speaks for its node: the first one that gives signs of life."""
        for k in range(self._local_rank):
            other = self._signs.read(k)
            if not other.leaves and other.silent_s < self.limit_s / 2 and k not in self._missed:
                return False
        return True

    def _with_states(self, verdict: Verdict) -> Verdict:
        """Add what the system says of the late ranks of this node that are silent."""
        local = {rank: k for k, rank in enumerate(self._signs.ranks)}
        late = tuple(replace(s, state=self._signs.state(local[s.rank]))
                     if s.rank in local and s.silent_s >= self.limit_s / 4 else s for s in verdict.late)
        return replace(verdict, late=late)

    def _announce(self, verdict: Verdict) -> None:
        self._wanted += 1
        if self._beacon is not None and self._is_center:
            self._beacon.send(self._news())
        stacks = self._take_stacks()
        name = "stacks-*.txt" if self._beacon is not None else self._stacks_name()
        place = f"stacks of all ranks: {os.path.join(self._folder, name)}" if self._folder else "stacks follow"
        # Of a rank whose own thread cannot run its stack alone tells where it is.
        late = tuple(replace(s, line=line_of(stacks[s.rank]) or s.line) if s.state == "busy" else s
                     for s in verdict.late)
        text = sentence(replace(verdict, late=late), place)
        if self._judges or self._beacon.node == 1:      # of those that rank 0's node does not reach one is enough
            self._say(text)
        self._write_stacks(text, stacks)
        self._beaten = time.monotonic()     # this thread was busy, not without a processor

    def _act(self, verdict: Verdict) -> None:
        """Remove the late ranks or end the job, once the wait has lasted long enough."""
        local = {rank: k for k, rank in enumerate(self._signs.ranks)}
        here = [sign for sign in verdict.late if sign.rank in local] if self._removes else []
        stopped = [sign for sign in here if sign.state == "stopped"]
        # One that has gone and is waited for all the same is one that MPI does not miss: nobody can go on without it.
        gone = any(sign.state == "gone" for sign in verdict.late)
        patience = SILENT if gone else 1.0 if stopped else verdict.patience
        if any(sign.state == "busy" for sign in verdict.late):      # it may only lack a processor
            patience = max(patience, STUCK)
        if verdict.waited_s < patience * self.limit_s:
            return
        for sign in () if gone else stopped or here:
            if self._signs.send(local[sign.rank], signal.SIGKILL):
                self._say(f"rank {sign.rank} (pid {sign.pid}) is killed; the others go on without it")
        if gone or not here:
            self._end_all(f"after {verdict.waited_s:.1f} s of waiting the job ends with {CODE}; run the same command "
                          "with --resume to go on from the newest checkpoint")

    def _end_all(self, text: str) -> None:
        self._say(text)
        if self._folder is not None:
            self._write(END_FILE, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())
        # MPI may wait for the very rank that is late; then the system ends this node's ranks.
        threading.Thread(target=self._insist, daemon=True).start()
        self._end(CODE)
        os._exit(CODE)

    def _insist(self) -> None:
        time.sleep(2 * GRACE_S)
        for k in range(len(self._signs.ranks)):
            if k != self._local_rank:
                self._signs.send(k, signal.SIGKILL)
        os._exit(CODE)

    def _look_for_gone(self, now: float) -> None:
        """End the job when a rank of this node has gone without a word and the launcher does nothing about it."""
        for k, rank in enumerate(self._signs.ranks):
            if not self._signs.gone(k):
                continue
            sign = self._signs.read(k)
            if sign.leaves:
                continue
            since = self._missed.setdefault(k, now)
            if now - since >= GRACE_S - self._beat_s:
                at = f", last at {sign.line}" if sign.line else ""
                self._end_all(f"rank {rank} (host {sign.host}, pid {sign.pid}) has gone in {sign.phase} step "
                              f"{sign.step}{at}; the job ends with {CODE}, run the same command with --resume to go on "
                              "from the newest checkpoint")

    def _say(self, text: str) -> None:
        print(f"hpcmlp: watchdog: {text}", file=sys.stderr, flush=True)

    # ---- stacks

    def _take_stacks(self) -> dict[int, str]:
        """Return the stacks of this node's ranks: each process writes its own at a signal, in any state but stopped,
        and they are read from here.
        """
        self._written = self._wanted
        places = [(k, rank, self._signs.stacks_path(k)) for k, rank in enumerate(self._signs.ranks)]
        before = [_size(path) for _, _, path in places]
        for k, _, path in places:
            if path is not None and self._signs.state(k) == "busy":
                self._signs.send(k, signal.SIGUSR2)
        time.sleep(STACKS_S)
        return {rank: _read_from(path, start) for (_, rank, path), start in zip(places, before, strict=True)}

    def _write_stacks(self, text: str, stacks: dict[int, str]) -> None:
        """Write the stacks of this node's ranks into one file."""
        lines = [time.strftime("%Y-%m-%d %H:%M:%S"), text]
        for k, rank in enumerate(self._signs.ranks):
            sign = self._signs.read(k)
            state = {"busy": ""}.get(self._signs.state(k), self._signs.state(k) + ", ")
            lines += ["", f"rank {rank} (host {sign.host}, pid {sign.pid}), {sign.phase} of step {sign.step}, {state}"
                      f"last sign of life {sign.silent_s:.1f} s ago at {sign.line or 'no line of hpcmlp'}",
                      stacks[rank]]
        data = ("\n".join(lines) + "\n\n").encode()
        if self._folder is None:
            sys.stderr.write(data.decode(errors="replace"))
            return
        self._write(self._stacks_name(), data)

    def _write(self, name: str, data: bytes) -> None:
        """Append to a file of the run directory, if that can be done."""
        path = os.path.join(self._folder, name)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
            os.write(file, data)
            os.close(file)
        except OSError as error:
            self._say(f"{path} cannot be written ({error.strerror})")

    def _stacks_name(self) -> str:
        return f"stacks-{self._signs.host}.txt"

    # ---- between nodes

    def _talk(self, now: float) -> None:
        """Hear what has come from other nodes, and say what there is to say here."""
        for message in self._beacon.receive():
            self._hear(message, now)
        if now - self._sent >= self.limit_s / SENDS:
            self._sent = now
            self._beacon.send(self._news())
        if self._wanted > self._written:
            self._write_stacks("stacks wanted by rank 0", self._take_stacks())

    def _news(self) -> dict[str, Any]:
        """This node's ranks that have stood still for a while, its first rank always."""
        signs = [self._signs.read(k) for k in range(len(self._signs.ranks))]
        told = signs[:1] + [s for s in signs[1:] if s.still_s > self.limit_s / 4 or s.silent_s > self.limit_s / 4]
        fields = [[s.rank, s.pid, s.place, round(s.silent_s, 3), round(s.still_s, 3), s.waits, s.leaves, s.operation,
                   s.line, self._signs.state(s.rank - signs[0].rank) if s.silent_s > self.limit_s / 4 else ""]
                  for s in told[:TOLD]]
        return {"host": self._signs.host, "signs": fields, "wanted": self._wanted}

    def _hear(self, message: dict[str, Any], now: float) -> None:
        try:
            node, host = message["node"], str(message["host"])
            ranks = {}
            for rank, pid, place, silent, still, waits, leaves, operation, line, state in message["signs"]:
                ranks[int(rank)] = Sign(int(rank), host, int(pid), int(place), float(silent), float(still),
                                        bool(waits), bool(leaves), str(operation), str(line), str(state))
            wanted = int(message["wanted"])
        except (KeyError, TypeError, ValueError):
            return
        self._heard[node] = now
        known = self._far.setdefault(node, {})
        # Who is not told of moves: it neither waits nor is late.
        for rank, sign in known.items():
            known[rank] = Sign(rank, sign.host, sign.pid, sign.place, leaves=sign.leaves)
        known.update(ranks)
        if not self._is_center:
            self._wanted = max(self._wanted, wanted)

    def _signs_of_others(self, now: float) -> list[Sign]:
        """What is known of the ranks of other nodes: all of them on rank 0, those of rank 0's node elsewhere."""
        if self._beacon is None or self._local_rank:
            return []
        return [with_age(sign, now - self._heard.get(node, now)) for node, signs in self._far.items()
                for sign in signs.values()]


def watch_limit(config: Any) -> float:
    """Return the limit that the options of `train` ask for, seconds.

    Local. Servers and workers out of step wait for each other in ways of their own: --worker-timeout watches them.
    """
    return 0.0 if config.sync == "server" and config.staleness not in (None, "0") else config.watchdog


def _no_mark(phase: int, step: int) -> None:
    """Where nobody watches."""


def _size(path: str | None) -> int:
    try:
        return os.stat(path).st_size if path else 0
    except OSError:
        return 0


def _read_from(path: str | None, start: int) -> str:
    if path is None:
        return "(no stacks from this process)"
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(1 << 16).decode(errors="replace").rstrip() or "(it has written no stacks)"
    except OSError as error:
        return f"(its stacks cannot be read: {error.strerror})"
