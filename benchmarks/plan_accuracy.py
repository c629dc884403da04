"""Measure how near `hpcmlp plan` comes: a machine file, then real runs of `hpcmlp train`, foretold beside measured.

    .venv/bin/python benchmarks/plan_accuracy.py calibrate --machine m.json
    .venv/bin/python benchmarks/plan_accuracy.py runs --machine m.json --out results.json
    .venv/bin/python benchmarks/plan_accuracy.py link --mbit 1000 --out link.json
    .venv/bin/python benchmarks/plan_accuracy.py table results.json link.json

Every run trains with Adam on made-up samples of 784 float32 inputs, one BLAS thread a rank, and its summary.json holds
both sides. `calibrate` takes as many ranks as have a core, 4 at most, and `runs` leaves out what has more ranks than
cores, unless `--crowded` (with a machine file of `calibrate --ranks 4`). `link` calibrates and runs on two hosts with
one core and `--per-host` ranks each, joined by a link of that rate (see tests/cluster/hosts.py): one each with the
ring, more with ring and node memory; they share their host's core.
Long tables can be made in pieces: `--only 0:6` takes some configurations, `--repeat` each of them so often, in turn.
Ratios are measured / foretold.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
HOSTS = REPOSITORY / "tests/cluster/hosts.py"
ROWS, WIDTH, CLASSES = 16384, 784, 10
CORES = len(os.sched_getaffinity(0))
# hidden widths, global batch, ranks, sync, steps
RUNS = [("256", 64, 1, "ring", 400), ("256", 64, 2, "shared", 400), ("256", 1024, 2, "ring", 200),
        ("512,256", 512, 2, "shared", 200), ("512,512", 8192, 2, "ring", 12), ("1024,1024", 256, 1, "ring", 100),
        ("1024,1024", 1024, 2, "shared", 50), ("2048,2048", 256, 2, "shared", 40), ("2048,2048", 1024, 1, "ring", 12),
        ("2048,2048", 2048, 2, "ring", 12), ("4096,4096,4096", 128, 2, "shared", 12),
        ("4096,4096,4096", 512, 1, "ring", 8), ("1024,1024", 1024, 3, "ring", 50), ("512,256", 512, 4, "shared", 200),
        ("512,512", 8192, 4, "ring", 12), ("1024,1024", 1024, 4, "shared", 50), ("2048,2048", 2048, 4, "ring", 12)]
LINK_RUNS = [("512,256", 512, 60), ("1024,1024", 1024, 30), ("2048,2048", 2048, 15)]     # hidden, batch, steps
MEASURED = ("step_s", "compute_s", "comm_s", "wait_s", "input_s", "memory_bytes_per_node",
            "sent_bytes_per_rank_and_step")


def make_data(folder: Path) -> None:
    """Write a data set of made-up samples by `hpcmlp prepare`."""
    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS, WIDTH), dtype=np.float32)
    y = random.integers(0, CLASSES, ROWS)
    np.savez(folder / "made-up.npz", x=x, y=y)
    subprocess.run([sys.executable, "-m", "hpcmlp", "prepare", folder / "made-up.npz", "--out", folder / "data",
                    "--normalize", "none", "--val-fraction", "0", "--test-fraction", "0", "--shards", "4"], check=True,
                   stdout=subprocess.DEVNULL)


def train(launch: list[str], case: tuple, data: Path, machine: str, folder: Path, most_steps: int) -> dict:
    """Run one configuration and return its summary's plan with what it was."""
    hidden, batch, ranks, sync, steps = case
    steps = min(steps, most_steps)
    with tempfile.TemporaryDirectory(dir=folder) as run:
        command = [*launch, sys.executable, "-m", "hpcmlp", "train", "--data", data, "--out", Path(run) / "out",
                   "--hidden", hidden, "--global-batch-size", batch, "--optimizer", "adam", "--sync", sync, "--steps",
                   steps, "--machine", machine, "--no-progress", "--checkpoint-every", steps]
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environ)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        summary = json.loads((Path(run) / "out/summary.json").read_text())
    return {"hidden": hidden, "global_batch_size": batch, "ranks": ranks, "sync": sync, "steps": steps,
            "plan": summary["plan"]}


def run_all(cases: list[tuple], launch, args: argparse.Namespace, folder: Path, link: str = "") -> None:
    """Run the cases in turn, and add each result to the file of --out as soon as it is there; `link`: joined how."""
    make_data(folder)
    for _ in range(args.repeat):
        for case in cases:
            where = link or (f", {CORES} cores" if case[2] > CORES else "")
            found = {**train(launch(case[2]), case, folder / "data", args.machine, folder, args.steps), "link": where}
            step = found["plan"]["step_s"]
            if args.out:
                before = json.loads(args.out.read_text()) if args.out.exists() else []
                args.out.write_text(json.dumps([*before, found], indent=1) + "\n")
            print(f"784-{case[0]}-10 batch {case[1]} ranks {case[2]} {case[3]}: {1e3 * step['measured']:.2f} ms, "
                  f"foretold {1e3 * step['foretold']:.2f}", flush=True)


def on_hosts(args: argparse.Namespace) -> list[str]:
    return [sys.executable, str(HOSTS), "--hosts", "2", "--ranks", str(args.per_host), "--cores", "1", "--rate",
            f"{args.mbit:g}mbit", "--", "{mpiexec}"]


def link_runs(per_host: int) -> list[tuple]:
    """The configurations of `link`: a rank alone on its host has no node memory to share."""
    return [(hidden, batch, 2 * per_host, sync, steps) for hidden, batch, steps in LINK_RUNS
            for sync in ("ring", "shared")[:per_host]]


def table(paths: list[Path]) -> None:
    """Print the table in Markdown, medians over repetitions, and how near all of it comes."""
    groups: dict[tuple, list[dict]] = {}
    for path in paths:
        for entry in json.loads(path.read_text()):
            key = tuple(entry[name] for name in ("hidden", "global_batch_size", "ranks", "sync")) + (
                entry.get("link", ""),)
            groups.setdefault(key, []).append(entry["plan"])
    print("| network | batch | ranks, sync | step foretold, ms | measured | ratio | compute | comm "
          "| wait foretold, measured, ms | memory foretold, MiB | measured | ratio | bytes sent a step |\n|"
          + "---|" * 13)
    times, memories, exact = [], [], True
    for (hidden, batch, ranks, sync, link), plans in groups.items():
        median = {name: {side: statistics.median(p[name][side] for p in plans) for side in ("foretold", "measured")}
                  for name in MEASURED if all(name in p for p in plans)}
        ratio = {name: pair["measured"] / pair["foretold"] if pair["foretold"] else float("nan")
                 for name, pair in median.items()}
        step, memory, sent = (median[name] for name in ("step_s", "memory_bytes_per_node",
                                                        "sent_bytes_per_rank_and_step"))
        wait = median.get("wait_s") or dict.fromkeys(("foretold", "measured"), float("nan"))
        times.append(abs(ratio["step_s"] - 1))
        memories.append(abs(ratio["memory_bytes_per_node"] - 1))
        exact &= sent["measured"] == sent["foretold"]
        print(f"| 784-{hidden.replace(',', '-')}-10 | {batch} | {ranks}, {sync}{link} | {1e3 * step['foretold']:.2f} | "
              f"{1e3 * step['measured']:.2f} | {ratio['step_s']:.2f} | {ratio['compute_s']:.2f} | "
              f"{ratio['comm_s']:.2f} | {1e3 * wait['foretold']:.2f}, {1e3 * wait['measured']:.2f} | "
              f"{memory['foretold'] / 2**20:.1f} | {memory['measured'] / 2**20:.1f} | "
              f"{ratio['memory_bytes_per_node']:.3f} | {sent['measured']:,.0f} |")
    print(f"\n{len(times)} configurations: time off by {100 * statistics.median(times):.1f} % in the median, "
          f"{100 * max(times):.1f} % at most; memory {100 * statistics.median(memories):.1f} % and "
          f"{100 * max(memories):.1f} %; traffic {'exact' if exact else 'NOT exact'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("calibrate", "runs", "link", "table"))
    parser.add_argument("results", nargs="*", type=Path, help="files of --out (table)")
    parser.add_argument("--mpiexec", default=str(Path(sys.executable).with_name("mpiexec")))
    parser.add_argument("--machine", default="machine.json", help="machine file to write (calibrate) or use (runs)")
    parser.add_argument("--mbit", type=float, default=1000, help="rate of the link, Mbit/s (link)")
    parser.add_argument("--per-host", type=int, default=1, help="ranks of each of the two hosts (link, default 1)")
    parser.add_argument("--ranks", type=int, default=min(4, CORES), help="ranks that calibrate (default: as many as "
                        "have a core, 4 at most)")
    parser.add_argument("--crowded", action="store_true", help="run what has more ranks than there are cores, too")
    parser.add_argument("--only", default=":", help="configurations to run, as first:last (runs)")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10_000, help="most steps of a run: 3 do for memory and traffic")
    parser.add_argument("--out", type=Path, help="JSON file to add the results to")
    args = parser.parse_args()
    if args.what == "table":
        table(args.results)
        return
    if args.what == "calibrate":
        subprocess.run([args.mpiexec, "-n", str(args.ranks), sys.executable, "-m", "hpcmlp", "bench", "--calibrate",
                        args.machine], check=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "runs":
            first, last = (int(word) if word else None for word in args.only.split(":"))
            cases = [case for case in RUNS[first:last] if case[2] <= CORES or args.crowded]
            if left := len(RUNS[first:last]) - len(cases):
                print(f"left out: {left} configurations of more ranks than the {CORES} cores", flush=True)
            run_all(cases, lambda ranks: [args.mpiexec, "-n", str(ranks)], args, Path(folder))
        else:
            args.machine = str(Path(folder) / "link.json")
            environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
            subprocess.run([*on_hosts(args), sys.executable, "-m", "hpcmlp", "bench", "--calibrate", args.machine],
                           check=True, env=environ)
            run_all(link_runs(args.per_host), lambda ranks: on_hosts(args), args, Path(folder),
                    f", 2 hosts, {args.mbit:g} Mbit/s")


if __name__ == "__main__":
    main()
