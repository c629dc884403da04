"""Compare accuracy and CPU time of hpcmlp with PyTorch runs of the same recipe on each named data set.

Both train on the same prepared rows with the recipes of recipes.json, from PyTorch's initial distribution unless
--initializer says otherwise, and are tested in their last state. CPU seconds:
of hpcmlp all processes from start to end, start-up, validation and test included; of PyTorch the training alone.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECIPES = json.loads((HERE / "recipes.json").read_text())
POINTS = 0.003      # how far an accuracy may lie below PyTorch's
RMSE_FACTOR = 1.03  # how far an RMSE may lie above it


def run(command: list[str], timeout_s: float) -> tuple[str, float]:
    """Run a command and return what it printed and the CPU seconds of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def options(recipe: dict, seed: int, epochs: int | None) -> list[str]:
    """The part of the command line that both sides share."""
    return ["--hidden", ",".join(map(str, recipe["hidden"])), "--global-batch-size", str(recipe["global_batch_size"]),
            "--epochs", str(epochs or recipe["epochs"]), "--lr", str(recipe["lr"]), "--seed", str(seed)]


def run_ours(name: str, data: Path, seed: int, args: argparse.Namespace) -> dict:
    """Train with hpcmlp and return the figures of the last state on the test rows."""
    out = args.work / f"run-{name}-{args.ranks}-{seed}-{time.time_ns()}"
    hpcmlp = [*args.mpiexec.split(), "-n", str(args.ranks), sys.executable, "-m", "hpcmlp"]
    begin = time.perf_counter()
    train = [*hpcmlp, "train", "--data", str(data), "--out", str(out), "--optimizer", "adam", "--schedule", "cosine",
             "--initializer", args.initializer, "--no-progress", *options(RECIPES[name], seed, args.epochs)]
    _, cpu = run(train, args.timeout)
    wall = time.perf_counter() - begin
    text, _ = run([*hpcmlp, "evaluate", str(out), "--which", "last", "--json"], args.timeout)
    figures = json.loads(text)
    r2 = [entry["r2"] for entry in figures.get("outputs", {}).values()]
    return {RECIPES[name]["metric"]: figures[RECIPES[name]["metric"]], "r2": r2, "cpu_s": cpu, "wall_s": wall}


def run_peer(name: str, data: Path, seed: int, args: argparse.Namespace) -> dict:
    """Train with PyTorch and return its figures."""
    text, _ = run([args.peer_python, str(HERE / "torch_recipe.py"), "--data", str(data), "--threads",
                   str(args.threads), *options(RECIPES[name], seed, args.epochs)], args.timeout)
    return json.loads(text.splitlines()[-1])


def compare(name: str, args: argparse.Namespace) -> dict:
    """Return the runs of both sides, one after the other for each seed, and the verdict."""
    data = args.work / name
    if not (data / "dataset.json").exists():
        source = [name] if args.from_dir is None else [name, "--from-dir", str(args.from_dir / name)]
        run([sys.executable, "-m", "hpcmlp", "prepare", *source, "--out", str(data)], args.timeout)
    ours, peer = [], []
    for seed in range(args.seeds):
        ours.append(run_ours(name, data, seed, args))
        peer.append(run_peer(name, data, seed, args))
    metric = RECIPES[name]["metric"]
    mean = {side: statistics.mean(r[metric] for r in runs) for side, runs in (("hpcmlp", ours), ("torch", peer))}
    if metric == "accuracy":
        held = mean["hpcmlp"] >= mean["torch"] - POINTS
    else:
        held = mean["hpcmlp"] <= mean["torch"] * RMSE_FACTOR
    return {"name": name, "recipe": RECIPES[name], "metric": metric, "mean": mean, "held": held,
            "cpu_s": {side: statistics.median(r["cpu_s"] for r in runs) for side, runs in
                      (("hpcmlp", ours), ("torch", peer))},
            "wall_s": {side: statistics.median(r["wall_s"] for r in runs) for side, runs in
                       (("hpcmlp", ours), ("torch", peer))},
            "hpcmlp": ours, "torch": peer}


def line(result: dict) -> str:
    """Return the line of one data set."""
    mean, cpu, wall = result["mean"], result["cpu_s"], result["wall_s"]
    worst = min((min(r["r2"]) for r in result["hpcmlp"] if r["r2"]), default=None)
    r2 = "" if worst is None else f"  worst R2 {worst:.4f}"
    return (f"{result['name']:<10} {result['metric']:<9} hpcmlp {mean['hpcmlp']:.4f}  torch {mean['torch']:.4f}  "
            f"{'held' if result['held'] else 'NOT HELD'}  cpu {cpu['hpcmlp']:.1f} / {cpu['torch']:.1f} s  "
            f"wall {wall['hpcmlp']:.1f} / {wall['torch']:.1f} s{r2}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="a Python that has torch and h5py")
    parser.add_argument("--work", type=Path, required=True, help="directory for data sets and runs")
    parser.add_argument("--sets", type=lambda text: text.split(","), default=list(RECIPES),
                        help=f"comma-separated: {', '.join(RECIPES)}")
    parser.add_argument("--mpiexec", default=str(Path(sys.executable).with_name("mpiexec")))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--initializer", default="torch", help="of hpcmlp; PyTorch starts from its own default")
    parser.add_argument("--epochs", type=int, help="instead of the recipes', to try the script")
    parser.add_argument("--from-dir", type=Path, help="directory with one folder of raw files per set")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds of one run")
    parser.add_argument("--out", type=Path, help="JSON file with every run")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results = []
    for name in args.sets:
        results.append(compare(name, args))
        print(line(results[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(),
                                        "load": os.getloadavg(), "ranks": args.ranks, "initializer": args.initializer,
                                        "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
