"""Cut the power at every moment of the real checkpoint writer's trace, and let the real reader look at what is left.

The trace of the writer's file operations (`file_calls`) is played into a model of a disk on which only that is certain
which fsync has covered. Of the rest any subset may be there: every un-synced piece of a write (SECTOR bytes), every
un-synced creation, renaming or deletion of a name, in any combination. For each prefix of the trace the states are
enumerated, all of them up to 2^ALL pending pieces, else a sample; each is laid out in memory (/dev/shm) and read by
`checkpoint.find_newest`. Required of every state: what was acknowledged last, or something newer, comes back value for
value, and nothing is reported as damaged or gone.

The same is then done with writers that leave out one kind of fsync: each must be caught.

    python benchmarks/faults/power_cut.py --count 100000
"""

import argparse
import hashlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from file_calls import FileCalls, Killed

from hpcmlp.errors import HpcmlpError
from hpcmlp.run import checkpoint
from hpcmlp.run.state_file import State

SECTOR = 512
ALL = 11          # pending pieces of which all subsets are taken
SAMPLE = 2048     # else so many of them
MUTANTS: dict[str, Callable[[str], bool]] = {
    "state.h5": lambda path: path.endswith("state.h5"),
    "manifest.json": lambda path: path.endswith("manifest.json"),
    "the hidden directory": lambda path: os.path.basename(path).startswith(".step-"),
    "checkpoints/": lambda path: os.path.basename(path) == "checkpoints",
    "record.json": lambda path: os.path.basename(path).startswith(".record.json"),
    "the run directory": lambda path: os.path.basename(path) in ("run", "home"),
    "every file": lambda path: not os.path.isdir(path),
    "every directory": os.path.isdir,
}


class Disk:
    """What is certain, and what is pending, of a small file system."""

    def __init__(self, root: str):
        self.root = root
        self.nodes: dict[str, int] = {root: 0}     # path -> node, as the running process sees it
        self.entries: dict[int, dict[str, int]] = {0: {}}  # certain names of each directory
        self.content: dict[int, bytes] = {}        # certain content of each file
        self.names: dict[int, list[tuple]] = {0: []}       # pending: (from name or None, to name or None, node)
        self.writes: dict[int, list[tuple[int, bytes]]] = {}  # pending: (offset, bytes)

    def play(self, event: tuple) -> None:
        kind, path = event[0], event[1]
        if kind in ("mkdir", "create"):
            node = max(self.entries.keys() | self.content.keys()) + 1
            if kind == "mkdir":
                self.entries[node], self.names[node] = {}, []
            else:
                self.content[node], self.writes[node] = b"", []
            self._name(path, None, os.path.basename(path), node)
            self.nodes[path] = node
        elif kind == "write":
            node, at, data = self.nodes[path], event[2], event[3]
            for k in range(0, len(data), SECTOR):
                self.writes[node].append((at + k, data[k:k + SECTOR]))
        elif kind == "fsync":
            self._sync(self.nodes[path])
        elif kind == "rename":
            node, target = self.nodes[path], event[2]
            assert os.path.dirname(path) == os.path.dirname(target)
            self._name(path, os.path.basename(path), os.path.basename(target), node)
            moved = {p: n for p, n in self.nodes.items() if p == path or p.startswith(path + os.sep)}
            for old, number in moved.items():
                del self.nodes[old]
                self.nodes[target + old[len(path):]] = number
        elif kind in ("unlink", "rmdir"):
            self._name(path, os.path.basename(path), None, self.nodes.pop(path))
        elif kind == "damage":  # bits turn on the disk itself
            node = self.nodes[path]
            self._sync(node)
            self.content[node] = event[2]

    def _name(self, path: str, old: str | None, new: str | None, node: int) -> None:
        self.names[self.nodes[os.path.dirname(path)]].append((old, new, node))

    def _sync(self, node: int) -> None:
        if node in self.entries:
            self.entries[node] = self._names_with(node, self.names[node])
            self.names[node] = []
        else:
            self.content[node] = self._content_with(node, self.writes[node])
            self.writes[node] = []

    def _names_with(self, node: int, done: list[tuple]) -> dict[str, int]:
        names = dict(self.entries[node])
        for old, new, target in done:
            if old is not None:
                names.pop(old, None)
            if new is not None:
                names[new] = target
        return names

    def _content_with(self, node: int, done: list[tuple[int, bytes]]) -> bytes:
        data = bytearray(self.content[node])
        for at, piece in done:
            data.extend(bytes(max(0, at + len(piece) - len(data))))
            data[at:at + len(piece)] = piece
        return bytes(data)

    def pending(self) -> list[tuple[int, int]]:
        """(node, number) of all that is not certain and that some name leads to."""
        within, todo = set(), [0]
        while todo:
            node = todo.pop()
            if node not in within:
                within.add(node)
                if node in self.entries:
                    todo += [*self.entries[node].values(), *(target for _, _, target in self.names[node])]
        return [(node, k) for table in (self.names, self.writes) for node, ops in table.items() if node in within
                for k in range(len(ops))]

    def state(self, there: set[tuple[int, int]]) -> dict[str, bytes | None]:
        """Relative path -> content (None: a directory) when only `there` of what is pending reached the disk."""
        tree: dict[str, bytes | None] = {}

        def walk(node: int, prefix: str) -> None:
            chosen = [op for k, op in enumerate(self.names[node]) if (node, k) in there]
            for name, child in self._names_with(node, chosen).items():
                if child in self.entries:
                    tree[prefix + name] = None
                    walk(child, prefix + name + "/")
                else:
                    pieces = [op for k, op in enumerate(self.writes[child]) if (child, k) in there]
                    tree[prefix + name] = self._content_with(child, pieces)

        walk(0, "")
        return tree

    def states(self, chance: random.Random, old: set[tuple[int, int]]) -> Iterator[dict[str, bytes | None]]:
        """Yield the states that are possible now, but for those without anything that is not in `old`."""
        todo = self.pending()
        new = sum(1 << k for k, unit in enumerate(todo) if unit not in old)
        if len(todo) <= ALL:
            for mask in range(1 << len(todo)):
                if mask & new or not old:
                    yield self.state({unit for k, unit in enumerate(todo) if mask >> k & 1})
            return
        yield self.state(set())
        yield self.state(set(todo))
        for _ in range(SAMPLE):
            share = chance.random()
            yield self.state({unit for unit in todo if chance.random() < share})


def make_state(step: int, best: int | None, chance: random.Random) -> State:
    values = np.random.default_rng(chance.getrandbits(32))
    arrays = {f"params/{k}": values.standard_normal(chance.choice((1, 30, 200))).astype(np.float32) for k in range(2)}
    return State({"step": step, "mark": chance.getrandbits(60), "has_best": best is not None, "best": {"step": best}},
                 arrays)


def life(run: Path, calls: FileCalls, chance: random.Random) -> None:
    """The life of a run as the real functions write it: saves, kills in a save, falls back, the same step again.

    ("require", allowed, quiet): from here on the reader must find one of the states `allowed` (marks; None: nothing).
    """
    keep, good, step, best = chance.choice((1, 2, 3)), [], 0, None  # good: (path, mark), newest last
    calls.note("require", "", (None,), True)
    checkpoint.make_room(run)
    for _ in range(chance.choice((3, 4, 5))):
        before = good[-1][1] if good else None
        step += chance.choice((1, 7))
        best = chance.choice((best, step))
        state = make_state(step, best, chance)
        calls.note("require", "", (before, state.meta["mark"]), True)
        if good and chance.random() < 0.3:      # killed in the middle of the save, then another process goes on
            last = calls.number + chance.randrange(1, 14)
            calls.decide, kept = (lambda n, name, path, last=last, then=calls.decide:
                                  _kill(n, last) or (then(n, name, path) if then else None)), calls.decide
            try:
                path = checkpoint.save(run, step, state, keep)
                good.append((path, state.meta["mark"]))
            except Killed:
                pass
            calls.decide = kept
            calls.revive()
            checkpoint.remove_leftovers(run)
            path, found, _ = checkpoint.find_newest(run)
            good = [g for g in good if g[1] != found.meta["mark"]] + [(path, found.meta["mark"])]
            calls.note("require", "", (found.meta["mark"],), True)  # what it goes on from is certain
            continue
        path = checkpoint.save(run, step, state, keep)
        good.append((path, state.meta["mark"]))
        calls.note("require", "", (state.meta["mark"],), True)
        if len(checkpoint.list_checkpoints(run)) > 1 and chance.random() < 0.3:
            good = fall_back(run, calls, good)
            step = int(good[-1][0].name.split("-")[1])


def _kill(number: int, last: int) -> None:
    if number >= last:
        raise Killed


def fall_back(run: Path, calls: FileCalls, good: list) -> list:
    """The newest turns bad on the disk: it is passed over, set aside, and the one before is the newest.

    Until the directory is synced, a checkpoint newer than that one may come back whose deletion is not certain.
    """
    bad = checkpoint.list_checkpoints(run)[0] / "state.h5"
    image = bytearray(bad.read_bytes())
    image[len(image) // 2] ^= 4
    bad.write_bytes(image)
    older = checkpoint.list_checkpoints(run)[1]
    marks = [m for path, m in good if path != bad.parent]
    mark = next(m for path, m in good if path == older)
    calls.note("damage", str(bad), bytes(image))
    calls.note("require", "", tuple(marks[marks.index(mark):]), False)
    path, _, _ = checkpoint.find_newest(run)
    checkpoint.set_aside(run, path)
    calls.note("require", "", (mark,), True)
    return [g for g in good if g[0] != bad.parent]


def record(seed: int, skipped: Callable[[str], bool] | None = None) -> tuple[str, list[tuple], dict[int, str]]:
    """Return the place, the trace of one life, and mark -> digest of the state that has it."""
    chance = random.Random(seed)
    home = Path(tempfile.mkdtemp(prefix="hpcmlp-power-", dir=memory())) / "home"
    os.mkdir(home)

    def decide(number: int, name: str, path: str) -> str | None:
        return "skip" if skipped is not None and name == "fsync" and skipped(path) else None

    made: dict[int, str] = {}
    real = checkpoint.save

    def save(run_dir: Any, step: int, state: State, keep: int) -> Path:
        made[state.meta["mark"]] = fingerprint(state)
        return real(run_dir, step, state, keep)

    checkpoint.save = save
    try:
        with FileCalls(home, decide) as calls:
            life(home / "run", calls, chance)
    finally:
        checkpoint.save = real
        shutil.rmtree(home.parent)
    return str(home), calls.events, made


def fingerprint(state: State) -> str:
    digest = hashlib.sha256(repr(sorted(state.meta.items())).encode())
    for name in sorted(state.arrays):
        digest.update(name.encode() + np.ascontiguousarray(state.arrays[name]).tobytes())
    return digest.hexdigest()


def memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def lay_out(tree: dict[str, bytes | None], place: Path) -> None:
    for name, content in tree.items():  # parents come first
        if content is None:
            os.mkdir(place / name)
        else:
            with open(place / name, "wb", buffering=0) as file:
                file.write(content)


def judge(tree: dict[str, bytes | None], place: Path, allowed: tuple, quiet: bool, made: dict[int, str]) -> str | None:
    """Return what is wrong with what the real reader finds in a state, or None."""
    shutil.rmtree(place, ignore_errors=True)
    os.mkdir(place)
    lay_out(tree, place)
    try:
        _, found, notes = checkpoint.find_newest(place / "run")
    except HpcmlpError as error:
        return f"raises {error}"
    mark = None if found is None else found.meta.get("mark")
    if mark not in allowed:
        return "nothing is found" if found is None else f"finds step {found.meta['step']}, not what was acknowledged"
    if found is not None and fingerprint(found) != made[mark]:
        return "finds other values than were saved"
    if quiet and notes:
        return f"reports {notes[0]}"
    return None


def cut(seed: int, limit: int, skipped: Callable[[str], bool] | None = None,
        first_loss: bool = False) -> tuple[int, list[str]]:
    """Return the number of different states looked at in one life, and what was wrong in those that were wrong."""
    home, events, made = record(seed, skipped)
    disk, chance = Disk(home), random.Random(seed + 1)
    allowed: tuple = (None,)
    quiet, seen, wrong = True, set(), []
    place = Path(tempfile.mkdtemp(prefix="hpcmlp-cut-", dir=memory())) / "disk"
    try:
        for event in events:
            old = set(disk.pending())
            if event[0] == "require":
                allowed, quiet, old = event[2], event[3], set()
            else:
                disk.play(event)
                if event[0] in ("fsync", "damage"):
                    continue  # the one only makes the states fewer; what the other asks for comes next
            for tree in disk.states(chance, old):
                key = hash((tuple(sorted((k, v) for k, v in tree.items() if v is not None)), tuple(tree), allowed))
                if key in seen:
                    continue
                seen.add(key)
                problem = judge(tree, place, allowed, quiet, made)
                if problem is not None:
                    wrong.append(problem.replace(str(place), "DISK"))
                if len(seen) >= limit or (wrong and first_loss):
                    return len(seen), wrong
    finally:
        shutil.rmtree(place.parent)
    return len(seen), wrong


def run(count: int, seed: int) -> tuple[int, list[str], int]:
    """Look at `count` states over as many lives as it takes; return states, what was wrong, lives."""
    states, wrong, lives = 0, [], 0
    while states < count:
        more, bad = cut(seed + lives, min(count - states, 8000))
        states, wrong, lives = states + more, wrong + bad, lives + 1
    return states, wrong, lives


def caught(name: str, seed: int, lives: int, limit: int) -> str | None:
    """Return what the model says first of a writer without one kind of fsync, or None when it says nothing."""
    for k in range(lives):
        _, wrong = cut(seed + k, limit, MUTANTS[name], first_loss=True)
        if wrong:
            return wrong[0]
    return None


def rows(count: int | None, seed: int) -> Iterator[dict[str, Any]]:
    """One row for the writer, one for the writers that leave out an fsync."""
    count = count or 100_000
    states, wrong, lives = run(count, seed)
    yield {"fault": "power cut at any moment of a save (model)", "injected": states, "completed": states - len(wrong),
           "identical": states - len(wrong), "recover_s": None,
           "note": f"different disk states over {lives} lives of a run" + (f"; {wrong[0]}" if wrong else "")}
    told = {name: caught(name, seed, 6, 4000) for name in MUTANTS}
    yield {"fault": "the same, writers without one fsync: caught", "injected": len(told),
           "completed": sum(t is not None for t in told.values()), "identical": None, "recover_s": None,
           "note": "; ".join(f"{name}: {told[name]}" for name in told)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="different disk states (default: 100000)")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    options = parser.parse_args()
    begin = time.monotonic()
    broken = 0
    for row in rows(options.count, options.seed):
        print(f"{row['fault']}: {row['completed']:,} of {row['injected']:,}; {row['note']}; "
              f"{time.monotonic() - begin:.0f} s", flush=True)
        broken += row["completed"] < row["injected"]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
