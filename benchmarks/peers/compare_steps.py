"""Compare the whole training step of hpcmlp with PyTorch's, turn by turn on this machine, for four networks.

Every round runs hpcmlp and each peer once, one after the other, so that a change of the machine's speed meets all of
them; the table shows the median over rounds and the ratio peer / hpcmlp (above 1: hpcmlp is faster) beside its goal.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# sizes, global batch, steps of one run, goal of the ratio to DDP (to one process it is 1 everywhere)
NETWORKS = [("784,256,128,10", 128, 500, 3.5), ("784,512,512,10", 512, 100, 1.5),
            ("28,300,300,300,300,2", 1024, 100, 1.6), ("784,2048,2048,10", 1024, 12, 1.25)]
PEERS = {"ddp": ["--mode", "ddp"], "ddp fused": ["--mode", "ddp", "--fused"], "eager": ["--mode", "eager"],
         "eager fused": ["--mode", "eager", "--fused"], "compile": ["--mode", "compile"]}


def run(command: list[str], timeout_s: float) -> dict:
    """Run a command that prints one JSON object last, and return that object."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(network: tuple[str, int, int, float], args: argparse.Namespace) -> dict:
    """Return all rounds of one network: milliseconds by name."""
    sizes, batch, steps, goal = network
    steps = max(5, int(steps * args.scale))
    what = ["--sizes", sizes, "--global-batch-size", str(batch), "--steps", str(steps)]
    ours = [args.mpiexec, "-n", str(args.ranks), sys.executable, "-m", "hpcmlp", "bench", "step", *what,
            "--sync", args.sync, "--json"]
    rounds: dict[str, list[float]] = {name: [] for name in ("hpcmlp", "floor", *args.peers)}
    for _ in range(args.rounds):
        result = run(ours, args.timeout)
        rounds["hpcmlp"].append(result["step_ms"])
        rounds["floor"].append(result["floor_ms"])
        for name in args.peers:
            peer = [args.peer_python, str(HERE / "torch_step.py"), *PEERS[name], *what]
            if "ddp" in name:
                peer += ["--ranks", str(args.ranks)]
            rounds[name].append(run(peer, args.timeout)["step_ms"])
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    ratios = {name: value / medians["hpcmlp"] for name, value in medians.items() if name != "hpcmlp"}
    return {"sizes": sizes, "global_batch_size": batch, "steps": steps, "goal_ddp": goal, "rounds_ms": rounds,
            "median_ms": medians, "ratio": ratios}


def table(results: list[dict]) -> str:
    """Return the comparison as text."""
    lines = []
    for result in results:
        lines.append(f"{result['sizes'].replace(',', '-')}, global batch {result['global_batch_size']}: hpcmlp "
                     f"{result['median_ms']['hpcmlp']:.3f} ms")
        for name, ratio in result["ratio"].items():
            values = result["rounds_ms"][name]
            goal = {"floor": None}.get(name, result["goal_ddp"] if "ddp" in name else 1.0)
            verdict = "" if goal is None else f"  goal {goal:g}: {'reached' if ratio >= goal else 'MISSED'}"
            lines.append(f"  {name:<12} {result['median_ms'][name]:9.3f} ms ({min(values):.3f}-{max(values):.3f})  "
                         f"ratio {ratio:5.2f}{verdict}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="a Python that has torch")
    parser.add_argument("--mpiexec", default=str(Path(sys.executable).with_name("mpiexec")))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sync", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps of each run")
    parser.add_argument("--networks", type=lambda text: [int(w) for w in text.split(",")], default=[0, 1, 2, 3],
                        help="which of the four networks, from 0")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS),
                        help=f"comma-separated: {', '.join(PEERS)}")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one run")
    parser.add_argument("--out", type=Path, help="JSON file with every round")
    args = parser.parse_args()
    before = os.getloadavg()
    results = [compare(NETWORKS[number], args) for number in args.networks]
    print(table(results))
    if args.out:
        args.out.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": platform.machine(),
                                        "cores": os.cpu_count(), "load_before": before, "load_after": os.getloadavg(),
                                        "ranks": args.ranks, "sync": args.sync, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
