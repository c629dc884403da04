"""Measure what --trace costs: runs of the smallest network with and without it, turn by turn, median step of each.

All steps but the first few are traced, so the median step of the run's summary is a traced one. Prints one JSON object:
the step in ms of every run, and the ratios on / off of neighbouring runs with their median.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def step_ms(args: argparse.Namespace, out: Path, traced: bool) -> float:
    """Train once and return the median step."""
    trace = ["--trace", "--trace-steps", str(args.steps)] if traced else []
    command = [*args.mpiexec.split(), "-n", str(args.ranks), sys.executable, "-m", "hpcmlp", "train", "--data",
               str(args.data), "--out", str(out), "--hidden", "256,128", "--global-batch-size", "128", "--optimizer",
               "adam", "--steps", str(args.steps), "--no-test", "--no-progress", "--validate-every", "1000", *trace]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return 1e3 * json.loads((out / "summary.json").read_text())["step_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="data set directory made by 'hpcmlp prepare mnist'")
    parser.add_argument("--mpiexec", default=str(Path(sys.executable).with_name("mpiexec")))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500, help="steps of a run")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of runs; which of a pair is first alternates")
    args = parser.parse_args()
    off, on = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for traced in (False, True) if number % 2 else (True, False):
                (on if traced else off).append(step_ms(args, Path(folder) / f"{number}-{traced}", traced))
    ratios = [a / b for a, b in zip(on, off, strict=True)]
    print(json.dumps({"off_ms": off, "on_ms": on, "ratios": ratios, "ratio": statistics.median(ratios),
                      "ratio_of_fastest": min(on) / min(off)}))


if __name__ == "__main__":
    main()
