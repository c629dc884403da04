"""Efficiency from one rank to one rank on each of two hosts over a shaped link, and whether the log tells the truth.

    benchmarks/links/efficiency.py --rounds 3

Hosts with one core each (tests/cluster/hosts.py). Efficiency is T1 / (P T_P) for the same global batch: T1 the step of
one rank with the whole batch on one host, the other cores idle. Then two short trainings without overlap: the
communication that summary.json reports of a step, waiting for the later rank apart, beside what bytes and bandwidth
say, 2 (P - 1)/P x parameters x bytes a number, over the part of the link's rate that payload gets (95.6 % of frames of
1,514 bytes).
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

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTS = REPOSITORY / "tests/cluster/hosts.py"
PAYLOAD = 0.956
WIDTH = {"float32": 4, "bf16": 2}


def run_hosts(args, *command):
    """Run a command on hosts of its own and return what it printed."""
    words = [sys.executable, HOSTS, "--hosts", args.hosts, "--cores", 1, "--rate", f"{args.mbit:g}mbit", "--", *command]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environ, timeout=400)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def step(args, launcher, *options):
    """Return what `bench step --json` says."""
    words = ["{python}", "-m", "hpcmlp", "bench", "step", "--sizes", args.sizes, "--global-batch-size",
             args.global_batch_size, "--steps", args.steps, "--json", *options]
    return json.loads(run_hosts(args, *launcher, *words).splitlines()[-1])


def logged_parts(args, wire, folder):
    """Return the median seconds of a step's parts, of a training over the hosts: summary.json's step_parts_s."""
    sizes = args.sizes.split(",")
    run = f"{folder}/run-{wire}"
    run_hosts(args, "{mpiexec}", "{python}", "-m", "hpcmlp", "train", "--data", f"{folder}/data", "--out", run,
              "--hidden", ",".join(sizes[1:-1]), "--steps", args.logged_steps, "--global-batch-size",
              args.global_batch_size, "--wire", wire, "--sync", "ring", "--no-overlap", "--no-test",
              "--checkpoint-every", 10**6)
    return json.loads(Path(run, "summary.json").read_text())["step_parts_s"]


def make_data(args, folder):
    """Prepare made-up samples as wide as the network wants them."""
    sizes = list(map(int, args.sizes.split(",")))
    random = np.random.default_rng(0)
    rows = 2 * args.global_batch_size
    y = np.arange(rows) % sizes[-1]
    np.savez(f"{folder}/samples.npz", x=random.standard_normal((rows, sizes[0])).astype(np.float32), y=y)
    subprocess.run([sys.executable, "-m", "hpcmlp", "prepare", f"{folder}/samples.npz", "--out", f"{folder}/data",
                    "--val-fraction", "0", "--test-fraction", "0"], check=True, stdout=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--mbit", type=float, default=1000)
    parser.add_argument("--sizes", default="784,2048,2048,10")
    parser.add_argument("--global-batch-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--logged-steps", type=int, default=20)
    args = parser.parse_args()
    ms = {"one rank": [], "float32": [], "bf16": []}
    for _ in range(args.rounds):
        ms["one rank"].append(step(args, ["on", "n1"])["step_ms"])
        for wire in WIDTH:
            result = step(args, ["{mpiexec}"], "--wire", wire)
            ms[wire].append(result["step_ms"])
    for name, values in ms.items():
        shares = [one / (args.hosts * value) for one, value in zip(ms["one rank"], values, strict=True)]
        text = "" if name == "one rank" else (f"  efficiency {100 * statistics.median(shares):.1f} % "
                                              f"({100 * min(shares):.1f}-{100 * max(shares):.1f})")
        print(f"{name:10} {statistics.median(values):8.1f} ms ({min(values):.1f}-{max(values):.1f}){text}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_data(args, folder)
        for wire, width in WIDTH.items():
            sent = 2 * (args.hosts - 1) / args.hosts * result["num_params"] * width
            bound = sent / (args.mbit * 125_000 * PAYLOAD)
            parts = logged_parts(args, wire, folder)
            print(f"{wire:10} communication of a step {1000 * parts['comm']:.1f} ms, bytes over bandwidth "
                  f"{1000 * bound:.1f} ms: {100 * (parts['comm'] / bound - 1):+.1f} %; and "
                  f"{1000 * parts['wait']:.1f} ms of waiting", flush=True)


if __name__ == "__main__":
    main()
