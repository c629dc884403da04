"""Errors of the disk: every n-th call that changes a file fails once, or the disk is full from there on.

A shim (io_shim.c, built by cc) stands between the program and libc, libhdf5 included. After each fault: the program has
ended with 0, or with 73 and one sentence; what stands under a final name is whole; a run is resumed without the fault
and ends with the parameters of the undisturbed run. Real small disks (tmpfs, as root) besides.

    python benchmarks/faults/campaign.py disk [--count N]    N faults a row, spread over the calls (default: all)
"""

import errno
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG)
TIMEOUT_S = 120
TRAIN = ("--hidden", "6", "--epochs", "3", "--global-batch-size", "32", "--log-every", "2", "--checkpoint-every", "3",
         "--no-progress")
CODES = {0, 73}


@dataclass
class Task:
    """One program under fault. `check` raises AssertionError unless what is left is as promised; it returns whether
    the final result has the bits of the undisturbed run, None where there is none."""

    name: str
    words: Callable[[Path], list[Any]]
    check: Callable[[Path, int], bool | None]


def run(words: list[Any], **environment: str) -> subprocess.CompletedProcess:
    """Run hpcmlp in a process of its own."""
    return subprocess.run([sys.executable, "-m", "hpcmlp", *map(str, words)], capture_output=True, text=True,
                          timeout=TIMEOUT_S, env={**os.environ, **environment})


def sound(done: subprocess.CompletedProcess) -> None:
    """Raise AssertionError unless the program ended in order."""
    ended = signal.Signals(-done.returncode).name if done.returncode < 0 else done.returncode
    assert done.returncode in CODES, f"ended with {ended}: {done.stderr[-300:]}"
    assert "Traceback" not in done.stderr, done.stderr[-400:]
    if done.returncode:
        lines = done.stderr.removesuffix("\n").split("\n")
        assert lines[-1].startswith("hpcmlp: ") and sum(line.startswith("hpcmlp: ") for line in lines) == 1, done.stderr


class Bench:
    """A folder with a data set and an undisturbed run, and the shim."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shim = folder / "io_shim.so"
        source = Path(__file__).with_name("io_shim.c")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", self.shim, source, "-ldl"], check=True)
        rows = "".join(f"{k % 17},{k * 7 % 11},{(k % 17 > 8) + 0}\n" for k in range(150))
        (folder / "t.csv").write_text("a,b,label\n" + rows)
        for words in (["prepare", folder / "t.csv", "--target", "label", "--shards", 2, "--out", folder / "data"],
                      ["train", "--data", folder / "data", "--out", folder / "whole", *TRAIN]):
            done = run(words)
            assert done.returncode == 0, done.stderr
        self.finals = json.loads((folder / "whole/summary.json").read_text())["parameters_sha256"]
        self.tasks = (
            Task("prepare", lambda work: ["prepare", folder / "t.csv", "--target", "label", "--shards", 2, "--out",
                                          work / "out"], self._check_prepare),
            Task("train", lambda work: ["train", "--data", folder / "data", "--out", work / "run", *TRAIN],
                 self._check_train),
            Task("predict", lambda work: ["predict", folder / "whole", folder / "t.csv", "--out", work / "p.h5"],
                 self._check_predict))

    def _check_prepare(self, work: Path, code: int) -> bool | None:
        if (work / "out").exists():
            assert run(["inspect", work / "out"]).returncode == 0, "a data set that is not whole"
        else:
            assert code == 73, "ended with 0 and left nothing"
        assert code == 0 or not [p for p in work.iterdir() if p.name != "out"], f"left over: {os.listdir(work)}"
        return None

    def _check_predict(self, work: Path, code: int) -> bool | None:
        import h5py
        assert (work / "p.h5").exists() or code == 73, "ended with 0 and left nothing"
        if (work / "p.h5").exists():
            with h5py.File(work / "p.h5") as file, h5py.File(self._whole_predictions()) as whole:
                for name in whole:
                    assert (file[name][...] == whole[name][...]).all(), f"{name} differs"
        assert code == 0 or set(os.listdir(work)) <= {"p.h5"}, f"left over: {os.listdir(work)}"
        return None

    def _whole_predictions(self) -> Path:
        path = self.folder / "p.h5"
        if not path.exists():
            assert run(["predict", self.folder / "whole", self.folder / "t.csv", "--out", path]).returncode == 0
        return path

    def _check_train(self, work: Path, code: int) -> bool | None:
        if not (work / "run/summary.json").exists() or code:
            done = run(["train", "--data", self.folder / "data", "--out", work / "run", *TRAIN, "--resume"])
            assert done.returncode == 0, f"does not resume: {done.stderr[-300:]}"
        return json.loads((work / "run/summary.json").read_text())["parameters_sha256"] == self.finals

    def calls(self, task: Task) -> int:
        """How many calls of a task change files."""
        work = self.fresh("count")
        log = self.folder / "calls"
        log.unlink(missing_ok=True)
        done = run(task.words(work), LD_PRELOAD=str(self.shim), HPCMLP_IO_BELOW=str(work), HPCMLP_IO_LOG=str(log))
        assert done.returncode == 0, done.stderr
        return max(map(int, log.read_text().split()))

    def fresh(self, name: str) -> Path:
        """An empty folder."""
        work = self.folder / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        return work

    def fail_at(self, task: Task, call: int, code: int, full: bool) -> bool | None:
        """Fail one call of a task and check what it left."""
        work = self.fresh("work")
        done = run(task.words(work), LD_PRELOAD=str(self.shim), HPCMLP_IO_BELOW=str(work), HPCMLP_IO_AT=str(call),
                   HPCMLP_IO_ERRNO=str(code), HPCMLP_IO_FROM=str(int(full)))
        sound(done)
        return task.check(work, done.returncode)


def tally(name: str, cases: list[Callable[[], bool | None]], labels: list[str]) -> dict[str, Any]:
    """Run the cases and make them one row."""
    completed, same, times, first = 0, [], [], ""
    for case, label in zip(cases, labels, strict=True):
        begin = time.monotonic()
        try:
            identical = case()
            completed += 1
            if identical is not None:
                same.append(identical)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            first = first or f"FIRST: {label}: {' '.join(str(error).split())[:300]}"
        times.append(time.monotonic() - begin)
    return {"fault": name, "injected": len(cases), "completed": completed, "identical": sum(same) if same else None,
            "recover_s": statistics.median(times) if times else None, "note": first or "ends with 0 or 73; whole"}


def spread(calls: int, count: int | None) -> list[int]:
    """Numbers of calls: all, or `count` of them from first to last."""
    if count is None or count >= calls:
        return list(range(1, calls + 1))
    return sorted({1 + k * (calls - 1) // max(1, count - 1) for k in range(count)})


def rows(count: int | None, seed: int) -> Iterator[dict[str, Any]]:
    """One row a program and kind of fault."""
    folder = Path(tempfile.mkdtemp(prefix="hpcmlp-disk-"))
    try:
        bench = Bench(folder)
        for task in bench.tasks:
            numbers = spread(bench.calls(task), count)
            for full in (False, True):
                what = "disk full from call n on" if full else "call n fails (ENOSPC, EIO, EDQUOT, EFBIG)"
                cases = [(n, errno.ENOSPC if full else ERRORS[(n + seed) % 4]) for n in numbers]
                yield tally(f"{task.name}: {what}",
                            [lambda n=n, code=code, task=task, full=full: bench.fail_at(task, n, code, full)
                             for n, code in cases], [f"call {n}, errno {code}" for n, code in cases])
        yield from small_disks(bench, count)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def small_disks(bench: Bench, count: int | None) -> Iterator[dict[str, Any]]:
    """Real disks of a few blocks, where this user may mount them."""
    place = bench.folder / "small"
    place.mkdir()
    probe = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True)
    if probe.returncode:
        return
    subprocess.run(["umount", place], check=True)
    sizes = [4, 12, 20, 28, 44, 60, 100, 400][:count]
    for task in bench.tasks:
        def case(size: int, task: Task = task) -> bool | None:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place], check=True)
            try:
                work = place / "w"
                work.mkdir()
                done = run(task.words(work))
                sound(done)
                if task.name == "train":                # resumed where there is room
                    shutil.copytree(work, bench.fresh("work"), dirs_exist_ok=True)
                    work = bench.folder / "work"
                return task.check(work, done.returncode)
            finally:
                subprocess.run(["umount", place], check=True)
        yield tally(f"{task.name}: a disk of n KiB", [lambda n=n, case=case: case(n) for n in sizes],
                    [f"{n} KiB" for n in sizes])
