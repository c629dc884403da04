"""What one slow worker of four costs: synchronous, bounded and asynchronous parameter server on a data set directory.

    python benchmarks/straggler.py DATA SCRATCH [--speed-epochs 2] [--accuracy-epochs 10] [--seeds 3]

One dedicated server and four workers (5 ranks). The undisturbed synchronous run gives the time of a step; then rank 4
sleeps four times that at each of its tasks, so that it is five times slower. Speed: samples/s over the last epoch of
a short run, with the sleep, in each mode. Accuracy: test accuracy at equal samples of a longer run, for each seed; the
synchronous one without the sleep, which changes its time and not its numbers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

TRAIN = ("--hidden", "256,128", "--global-batch-size", "512", "--lr", "0.002", "--schedule", "cosine", "--sync",
         "server", "--servers", "1")


def train(data, out, staleness, epochs, sleep_s=None, *more):
    """Return what one run's summary and log tell."""
    shutil.rmtree(out, ignore_errors=True)
    environ = {**os.environ, **({"HPCMLP_FAULT": f"rank=4,act=sleep:{sleep_s}"} if sleep_s else {})}
    launcher = os.environ.get("MPIEXEC") or str(Path(sys.executable).parent / "mpiexec")
    subprocess.run([launcher, "-n", "5", sys.executable, "-m", "hpcmlp", "train", "--data", data, "--out", out,
                    "--staleness", staleness, "--epochs", str(epochs), *TRAIN, *more], env=environ, check=True,
                   stdout=subprocess.DEVNULL)
    summary = json.loads((out / "summary.json").read_text())
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rate = [record["samples_per_s"] for record in records if record["kind"] == "epoch"][-1]
    return {"rate": rate, "accuracy": summary["test"]["accuracy"], "step_s": summary["step_s"],
            "staleness": summary["server"]["staleness"],
            "pushes": {worker["rank"]: worker["pushes"] for worker in summary["server"]["workers"]}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--speed-epochs", type=int, default=2)
    parser.add_argument("--accuracy-epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--modes", type=int, default=4, help="of accuracy, in the order of the table")
    given = parser.parse_args()
    out = given.scratch / "run"
    plain = train(given.data, out, "0", 1)
    sleep_s = round(4 * plain["step_s"], 5)
    print(f"undisturbed: {plain['rate']:,.0f} samples/s, {1e3 * plain['step_s']:.1f} ms a step; rank 4 sleeps "
          f"{1e3 * sleep_s:.1f} ms a task", flush=True)
    base = train(given.data, out, "0", given.speed_epochs, sleep_s)
    print(f"staleness 0: {base['rate']:,.0f} samples/s", flush=True)
    for staleness in ("4", "async"):
        found = train(given.data, out, staleness, given.speed_epochs, sleep_s)
        print(f"staleness {staleness}: {found['rate']:,.0f} samples/s, {found['rate'] / base['rate']:.2f}x; observed "
              f"{found['staleness']}; pushes by rank {found['pushes']}", flush=True)
    if given.accuracy_epochs:
        print(f"accuracy after {given.accuracy_epochs} epochs, by seed:", flush=True)
        for staleness, more in (("0", ()), ("4", ()), ("async", ()), ("async", ("--staleness-lr",)))[:given.modes]:
            found = [100 * train(given.data, out, staleness, given.accuracy_epochs,
                                 None if staleness == "0" else sleep_s, "--seed", str(seed), *more)["accuracy"]
                     for seed in range(given.seeds)]
            print(f"staleness {staleness} {' '.join(more)}: {', '.join(f'{a:.2f}' for a in found)} %; mean "
                  f"{sum(found) / len(found):.3f} %", flush=True)


if __name__ == "__main__":
    main()
