"""Kill -9 of a random rank at a random moment of short training runs, saves included, and what a restart makes of it.

Each case starts a run that saves every few steps, kills one of its ranks (or all, or the launcher's whole group) after
a random delay between the first save and the end, and starts the same command again with --resume: until it has
finished. Required: every restart goes on or begins anew where nothing had been acknowledged, the final parameters are
those of the run that nobody disturbed bit for bit, and no checkpoint is unreadable at any time. A second row goes on at
another rank count: losses equal to rounding. Then, a twentieth as many each, other ways to train: parameters in slices,
local steps, a server in step, and one whose workers are not, of which only the end is asked for.

    python benchmarks/faults/kills.py --count 500 [--form sharded]
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpcmlp.run import checkpoint

RANKS = 2
STEPS = 60
OPTIONS = ("--hidden", "24,16", "--global-batch-size", "32", "--lr", "0.01", "--dropout", "0.2", "--ema", "0.95",
           "--checkpoint-every", "5", "--log-every", "5", "--steps", str(STEPS), "--keep", "2", "--no-progress")
MOST_RESTARTS = 6
# Options, ranks, whether a restarted run has the bits of the undisturbed one.
FORMS = {"plain": ((), RANKS, True), "sharded": (("--shard", "params"), RANKS, True),
         "local steps": (("--local-steps", "5", "--outer-optimizer", "nesterov"), RANKS, True),
         "server": (("--sync", "server"), 3, True),
         "server out of step": (("--sync", "server", "--staleness", "2"), 3, False)}


def mpiexec() -> str:
    """The launcher that belongs to this interpreter's MPI."""
    beside = Path(sys.executable).parent / "mpiexec"
    return os.environ.get("MPIEXEC", str(beside) if beside.exists() else "mpiexec")


def make_data(folder: Path) -> Path:
    """A small classification data set: 480 rows in 6 features, 3 classes."""
    chance = np.random.default_rng(0)
    y = chance.integers(0, 3, 480)
    x = chance.standard_normal((3, 6))[y] * 1.5 + chance.standard_normal((480, 6))
    np.savez(folder / "table.npz", x=x.astype(np.float32), y=y)
    subprocess.run([sys.executable, "-m", "hpcmlp", "prepare", str(folder / "table.npz"), "--out", str(folder / "data"),
                    "--shards", "3", "--seed", "1"], check=True, stdout=subprocess.DEVNULL)
    return folder / "data"


def start(data: Path, out: Path, ranks: int, form: str, slow: float = 0.0) -> subprocess.Popen:
    command = [*mpiexec().split(), "-n", str(ranks), sys.executable, "-m", "hpcmlp", "train", "--data", str(data),
               "--out", str(out), "--resume", *OPTIONS, *FORMS[form][0]]
    environ = {**os.environ, **({"HPCMLP_FAULT": f"act=sleep:{slow}"} if slow else {})}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ,
                            start_new_session=True)


def finish(process: subprocess.Popen, within: float = 120.0) -> tuple[int, str]:
    """Return exit code and standard error; what hangs is killed and is -1."""
    try:
        _, text = process.communicate(timeout=within)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return -1, "hangs"


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The process numbers of the ranks below a launcher."""
    children: dict[int, list[int]] = {}
    names = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
                names[int(entry)] = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found, todo = [], [process.pid]
    while todo:
        for child in children.get(todo.pop(), ()):
            todo.append(child)
            if b"hpcmlp" in names.get(child, ()) and names[child][0] == os.fsencode(sys.executable):
                found.append(child)
    return found


def kill_somebody(process: subprocess.Popen, chance: random.Random) -> str:
    """Kill a random rank, all of them, or launcher and ranks at once; return whom."""
    ranks = ranks_of(process)
    whom = chance.choice(("rank", "rank", "rank", "all", "job"))
    try:
        if whom == "job" or not ranks:
            os.killpg(process.pid, signal.SIGKILL)
            whom = "job"
        for pid in (ranks if whom != "rank" else [chance.choice(ranks)]):
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return whom


def unreadable(out: Path) -> list[str]:
    """The checkpoints in a run directory that do not load."""
    bad = []
    for path in checkpoint.list_checkpoints(out):
        try:
            checkpoint.read(path)
        except Exception as error:
            bad.append(f"{path.name}: {error}")
    return bad


def case(data: Path, out: Path, chance: random.Random, then: int, form: str) -> dict[str, Any]:
    """One run with one kill, and restarts until it has finished; `then`: ranks of the restarts."""
    process = start(data, out, FORMS[form][1], form, slow=0.01)
    since = time.monotonic()
    while process.poll() is None and not list((out / "checkpoints").glob("*step-*")) and time.monotonic() < since + 60:
        time.sleep(0.005)
    time.sleep(chance.uniform(0.0, 0.9))
    killed = process.poll() is None
    whom = kill_somebody(process, chance) if killed else "nobody"
    code, _ = finish(process)
    told = {"whom": whom, "killed": killed and code != 0, "bad": unreadable(out), "restarts": 0, "code": code,
            "text": ""}
    at = time.monotonic()
    while not (out / "summary.json").exists() and told["restarts"] < MOST_RESTARTS:
        told["restarts"] += 1
        told["code"], told["text"] = finish(start(data, out, then, form))
        if told["code"]:
            break
    told["seconds"] = time.monotonic() - at
    told["bad"] += unreadable(out)
    told["finished"] = (out / "summary.json").exists() and told["code"] == 0 or not killed
    return told


def final(out: Path) -> str:
    return checkpoint.load_model(out, "last").parameters_sha256


def losses(out: Path) -> dict[int, float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in lines if r["kind"] == "step"}


def campaign(folder: Path, count: int, seed: int, then: int, until: float,
             form: str = "plain") -> tuple[list[dict[str, Any]], int, float]:
    """Return the cases in which somebody was killed, how many ended as the undisturbed run, the largest loss gap."""
    data = folder / "data" if (folder / "data").exists() else make_data(folder)
    whole = folder / f"whole-{form}"
    if not whole.exists():
        code, text = finish(start(data, whole, FORMS[form][1], form))
        assert code == 0, text
    chance = random.Random(seed)
    cases, same, gap = [], 0, 0.0
    while len(cases) < count and time.monotonic() < until:
        out = folder / f"run-{then}-{seed}-{len(cases)}"
        told = case(data, out, chance, then, form)
        if told["killed"]:
            cases.append(told)
            if told["finished"]:
                same += final(out) == final(whole)
                one, other = losses(out), losses(whole)
                gaps = [abs(one[s] - other[s]) / max(abs(other[s]), 1e-6) if s in one else float("inf") for s in other]
                gap = max(gap, *gaps)
        subprocess.run(["rm", "-rf", str(out)], check=True)
    return cases, same, gap


def rows(count: int | None, seed: int, minutes: float = float("inf"),
         form: str | None = None) -> Iterator[dict[str, Any]]:
    """One row at the same rank count, one at another (a tenth as many), and one for each other form; or of one form."""
    count = count or 500
    until = time.monotonic() + 60 * minutes
    lots = [("plain", RANKS, count), ("plain", RANKS + 1, max(1, count // 10))]
    lots += [(name, ranks, max(1, count // 20)) for name, (_, ranks, _) in FORMS.items() if name != "plain"]
    if form is not None:
        lots = [(form, FORMS[form][1], count)]
    with tempfile.TemporaryDirectory(prefix="hpcmlp-kills-") as place:
        for name, then, number in lots:
            yield _row(name, then, *campaign(Path(place), number, seed, then, until, name))


def _row(form: str, then: int, cases: list[dict[str, Any]], same: int, gap: float) -> dict[str, Any]:
    _, ranks, exact = FORMS[form]
    good = [c for c in cases if c["finished"] and not c["bad"]]
    bad = next((c for c in cases if c not in good), None)
    what = ", ".join(f"{w} {sum(c['whom'] == w for c in cases)}" for w in ("rank", "all", "job"))
    within = gap < 1e-4 or not exact
    gaps = f"; largest relative gap of losses {gap:.1e}" if exact else ""
    return {"fault": f"kill -9 of {ranks} ranks, restart on {then}" + f", {form}" * (form != "plain"),
            "injected": len(cases), "completed": len(good) if within else 0,
            "identical": same if then == ranks and exact else None,
            "recover_s": float(np.median([c["seconds"] for c in cases])) if cases else None,
            "note": f"{what}; unreadable checkpoints {sum(len(c['bad']) for c in cases)}{gaps}"
                    + (f"; first failure: {bad}" if bad else "")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=500, help="kills (default: 500)")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop early after so many")
    parser.add_argument("--form", choices=FORMS, help="one way to train (default: all)")
    options = parser.parse_args()
    broken = 0
    for row in rows(options.count, options.seed, options.minutes, options.form):
        print(json.dumps(row), flush=True)
        broken += row["completed"] < row["injected"] or row["identical"] not in (None, row["injected"])
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
