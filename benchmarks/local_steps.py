"""Accuracy on MNIST of local steps, averaged or with DiLoCo's outer step, beside synchronous training.

    python benchmarks/local_steps.py --data data/mnist --work runs/local --ranks 2,4 --steps 4,16,64 --seeds 0,1,2

Trains the recipe of `make run` once for every combination, one after the other; a run whose summary is there already is
not repeated. Prints one line per setting: test accuracy of each seed, exchanges in % of synchronous steps, drift.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

RECIPE = ("--hidden 512,256 --dropout 0.25 --epochs 15 --global-batch-size 512 --schedule cosine --no-progress "
          "--keep 1 --log-every 64").split()


def integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def train(args: argparse.Namespace, ranks: int, local_steps: int, outer: list[str], seed: int) -> dict:
    """Return the summary of one run."""
    name = "-".join([f"p{ranks}", f"k{local_steps}", *(w.strip("-") for w in outer), f"lr{args.lr}", f"s{seed}"])
    run = args.work / name
    if not (run / "summary.json").exists():
        command = [args.mpiexec, "-n", str(ranks), sys.executable, "-m", "hpcmlp", "train", "--data", str(args.data),
                   "--out", str(run), *RECIPE, "--lr", str(args.lr), "--seed", str(seed), "--resume",
                   "--local-steps", str(local_steps), *outer]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((run / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--ranks", type=integers, default=[2, 4])
    parser.add_argument("--steps", type=integers, default=[4, 16, 64], help="local steps")
    parser.add_argument("--seeds", type=integers, default=[0])
    parser.add_argument("--lr", type=float, default=0.003)
    beside = Path(sys.executable).parent / "mpiexec"
    parser.add_argument("--mpiexec", default=os.environ.get("MPIEXEC", str(beside) if beside.exists() else "mpiexec"))
    parser.add_argument("--outer-lr", default="0.7")
    parser.add_argument("--outer-momentum", default="0.9")
    args = parser.parse_args()
    nesterov = ["--outer-optimizer", "nesterov", "--outer-lr", args.outer_lr, "--outer-momentum", args.outer_momentum]
    settings = [(1, [], "synchronous"), *((k, outer, f"{k} local steps, {name}") for k in args.steps
                                          for outer, name in (([], "averaged"), (nesterov, "nesterov")))]
    for ranks in args.ranks:
        for local_steps, outer, name in settings:
            runs = [train(args, ranks, local_steps, outer, seed) for seed in args.seeds]
            accuracy = "  ".join(f"{run['test']['accuracy']:.4f}" for run in runs)
            local = runs[0].get("local")
            more = "" if local is None else (f"  exchanges {100 * local['rounds'] / local['steps']:5.1f} %  "
                                             f"drift {100 * local['drift']:.2g} %  alignment {local['align']:.2f}")
            print(f"{ranks} ranks  {name:<26}  accuracy {accuracy}{more}", flush=True)


if __name__ == "__main__":
    main()
