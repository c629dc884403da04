"""One rank dies or fails: how long until no rank of the job is left, and what the user reads.

A rank is killed, leaves without a word, or raises, or the launcher is killed; the time runs from the moment the first
of them is gone to the moment the last rank is. Where a rank raises, its traceback and no other is printed.

    MPIEXEC=mpiexec python benchmarks/faults/campaign.py ranks [--count N]
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIMIT_S = 2.0
TIMEOUT_S = 120
FULL = 20
RANKS = 3
ACTS = ("kill", "exit:3", "raise", "launcher")


def launcher() -> list[str]:
    """The launcher of the environment, else the one beside this interpreter."""
    return os.environ.get("MPIEXEC", str(Path(sys.executable).with_name("mpiexec"))).split()


def ranks_of(root: int) -> set[int]:
    """The ranks (python processes) below the launcher's process."""
    parents, python = {}, set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            except (OSError, ValueError):
                continue
            if state not in "ZX":
                parents[int(entry)] = int(parent)
                if b"hpcmlp" in words and words[0].endswith(b"python"):
                    python.add(int(entry))

    def descends(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == root:
                return True
        return False
    return {pid for pid in python if descends(pid)}


def gone(pid: int) -> bool:
    """Whether a process has ended (and perhaps waits to be collected)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def one(data: Path, run: Path, ranks: int, act: str, step: int, victim: int, sync: str) -> tuple[float, int, str]:
    """Run with one fault; return (seconds from the first rank gone to the last, exit code, standard error)."""
    words = ["train", "--data", data, "--out", run, "--hidden", "8", "--steps", "4000", "--log-every", "4000", "--sync",
             sync, "--no-progress"]
    planned = "act=sleep:0.01" if act == "launcher" else f"rank={victim},step={step},act={act}"
    environment = {**os.environ, "HPCMLP_FAULT": planned}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([*launcher(), "-n", str(ranks), sys.executable, "-m", "hpcmlp", *map(str, words)],
                                   stdout=subprocess.DEVNULL, stderr=said, env=environment)
        try:
            pids: set[int] = set()
            end = time.monotonic() + TIMEOUT_S
            while len(pids) < ranks and process.poll() is None and time.monotonic() < end:
                pids |= ranks_of(process.pid)
                time.sleep(0.01)
            first = last = None
            if act == "launcher":
                time.sleep(0.3 + step / 150)           # some are still starting, most are in their steps
                process.kill()
                first = time.monotonic()
            while last is None and time.monotonic() < end:
                left = sum(not gone(pid) for pid in pids)
                now = time.monotonic()
                first = now if first is None and left < len(pids) else first
                last = now if not left else None
                time.sleep(0.002)
            code = process.wait(timeout=20)
        finally:
            process.kill()
        said.seek(0)
        text = said.read().decode(errors="replace")
    if last is None or first is None:
        raise AssertionError(f"ranks were left after {TIMEOUT_S} s")
    return last - first, code, text


def rows(count: int | None, seed: int) -> Iterator[dict[str, Any]]:
    """One row a fault and strategy."""
    folder = Path(tempfile.mkdtemp(prefix="hpcmlp-ranks-"))
    try:
        table = "".join(f"{k % 17},{k * 7 % 11},{(k % 17 > 8) + 0}\n" for k in range(600))
        (folder / "t.csv").write_text("a,b,label\n" + table)
        subprocess.run([sys.executable, "-m", "hpcmlp", "prepare", folder / "t.csv", "--target", "label", "--out",
                        folder / "data"], check=True, stdout=subprocess.DEVNULL)
        for sync in ("shared", "ring"):
            for act in ACTS:
                yield row(folder, sync, act, FULL if count is None else count, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def row(folder: Path, sync: str, act: str, count: int, seed: int) -> dict[str, Any]:
    """The row of one fault under one strategy; steps and victims go round."""
    times, completed, first = [], 0, ""
    for k in range(count):
        try:
            seconds, code, text = one(folder / "data", folder / f"run-{sync}-{act[:4]}-{k}", RANKS, act,
                                      3 + (seed + 37 * k) % 150, (seed + k) % RANKS, sync)
            assert code, "ended with 0"
            if act == "raise":
                assert text.count("Traceback") == 1 and "fault on purpose" in text, text[-400:]
            else:
                assert "Traceback" not in text, text[-400:]
            assert seconds <= LIMIT_S, f"{seconds:.2f} s"
            completed += 1
            times.append(seconds)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            first = first or f"; FIRST: {' '.join(str(error).split())[:300]}"
    worst = f"all gone after at most {max(times):.2f} s" if times else "none"
    return {"fault": f"a rank: {act} ({sync}, {RANKS} ranks)", "injected": count, "completed": completed,
            "identical": None, "recover_s": statistics.median(times) if times else None, "note": worst + first}
