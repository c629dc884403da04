"""Compare the all-reduce of hpcmlp with MPI's own, with gloo's and with a copy of memory, turn by turn on this machine.

A round runs `hpcmlp bench comm` and gloo once for each number of ranks, one after the other. Ratios are those of one
round (above 1: hpcmlp is faster; of_copy: the share of what memory allows, as `bench comm` defines it); shown are the
medians over rounds, the spread of the ratios, and the goals they are held to. Printed as Markdown; `--out` keeps every
round as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
# What is divided by what, its goal, and from how many bytes on it holds
RATIOS = [("MPI_Allreduce", "shared", 3.0, MIB), ("gloo", "shared", 6.0, MIB), ("copy", "shared", 0.6, MIB),
          ("MPI_Allreduce", "ring", 1.0, MIB // 4), ("MPI_Allreduce", "ring", 1 / 1.5, 0)]


def run(command: list[str], timeout_s: float) -> list[dict]:
    """Run a command that prints one JSON list last, and return that list."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def take_round(ranks: int, args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Return {bytes: {algorithm: microseconds}} of one turn of each."""
    sizes = ",".join(map(str, args.bytes))
    rows = run([args.mpiexec, "-n", str(ranks), sys.executable, "-m", "hpcmlp", "bench", "comm", "--bytes", sizes,
                "--steps", str(args.calls), "--json"], args.timeout)
    rows += [{**row, "algorithm": "gloo"} for row in
             run([args.peer_python, str(HERE / "torch_all_reduce.py"), "--ranks", str(ranks), "--bytes", sizes,
                  "--calls", str(args.calls)], args.timeout)]
    found: dict[int, dict[str, float]] = {num_bytes: {} for num_bytes in args.bytes}
    for row in rows:
        found[row["bytes"]][row["algorithm"]] = row["us"]
    return found


def table(rounds: list[dict[int, dict[str, float]]], ranks: int) -> str:
    """Return the medians and the ratios of `rounds` as Markdown."""
    names = [name for name in next(iter(rounds[0].values())) if name != "message"]
    lines = [f"{ranks} ranks, us (median of {len(rounds)} rounds)", "",
             f"| bytes | {' | '.join(names)} | ratios of one round: median (spread), goal |",
             f"|---|{'---|' * (len(names) + 1)}"]
    for num_bytes in rounds[0]:
        times = [f"{statistics.median(r[num_bytes][name] for r in rounds):,.1f}" for name in names]
        lines.append(f"| {num_bytes:,} | {' | '.join(times)} | {'; '.join(ratios(rounds, num_bytes))} |")
    return "\n".join(lines)


def ratios(rounds: list[dict[int, dict[str, float]]], num_bytes: int) -> list[str]:
    """Return each ratio that has a goal for arrays of this size, and whether it is reached."""
    said, texts = set(), []
    for over, under, goal, least in RATIOS:
        if num_bytes < least or (over, under) in said:
            continue
        said.add((over, under))
        values = [r[num_bytes][over] / r[num_bytes][under] for r in rounds]
        middle = statistics.median(values)
        texts.append(f"{over}/{under} {middle:.2f} ({min(values):.2f}-{max(values):.2f}) goal {goal:.2g} "
                     f"{'reached' if middle >= goal else 'MISSED'}")
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="a Python that has torch")
    parser.add_argument("--mpiexec", default=str(Path(sys.executable).with_name("mpiexec")))
    parser.add_argument("--ranks", type=lambda text: [int(w) for w in text.split(",")], default=[2, 4])
    parser.add_argument("--bytes", type=lambda text: [int(w) for w in text.split(",")],
                        default=[4, 4096, 65536, MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=100, help="most timed calls of one size in a round")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one run")
    parser.add_argument("--out", type=Path, help="JSON file with every round")
    args = parser.parse_args()
    before, every = os.getloadavg(), {}
    for ranks in args.ranks:
        every[ranks] = [take_round(ranks, args) for _ in range(args.rounds)]
        print(table(every[ranks], ranks) + "\n", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(),
                                        "load_before": before, "load_after": os.getloadavg(), "rounds_us": every},
                                       indent=1) + "\n")


if __name__ == "__main__":
    main()
