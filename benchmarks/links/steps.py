"""Compare the whole training step over shaped links with its bounds and with PyTorch DDP, turn by turn.

    benchmarks/links/steps.py --peer-python .venv-peers/bin/python

Hosts with one core each and one rank on each, joined by links of one rate (see tests/cluster/hosts.py). Every round
runs each candidate once, so that a change of the machine's speed meets all of them; the table shows medians over the
rounds. `compute` is the step of one rank alone with its share of the batch, on all hosts at once, nothing sent (its
update is that of all parameters, a little more than a rank's share). `wire` is the time in which a link carries the
2 (P - 1)/P x parameters x width bytes that a rank must send, no headers counted (TCP leaves 95.6 % to us).
`communication` is what the step with one sample per rank takes longer than one rank alone with one sample.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTS = REPOSITORY / "tests/cluster/hosts.py"
DDP = {"DDP": [], "DDP, 4 MB buckets": ["--bucket-mb", "4"], "DDP float16": ["--float16"]}


class Bench:
    """How every candidate is run: a cluster of its own each time."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.hosts = [sys.executable, str(HOSTS), "--hosts", str(args.hosts), "--cores", "1", "--rate",
                      f"{args.mbit:g}mbit", "--"]

    def step(self, batch: int, *options: str) -> dict:
        """The step of all hosts together."""
        return self._run(["{mpiexec}", *self._bench(batch), *options])

    def alone(self, batch: int) -> dict:
        """The step of one rank on every host at once, each by itself; that of the first host."""
        words = " ".join(self._bench(batch))
        return self._run(["bash", "-c", self._everywhere(lambda _: words)])

    def ddp(self, *options: str) -> dict:
        args = self.args
        program = Path(__file__).with_name("ddp_step.py")
        with tempfile.TemporaryDirectory() as folder:
            words = [*args.through, args.peer_python, program, "--ranks", args.hosts, "--meeting", f"{folder}/meeting",
                     "--sizes", args.sizes, "--global-batch-size", args.global_batch_size, "--steps", args.steps,
                     *options]
            return self._run(["bash", "-c", self._everywhere(lambda k: f"{' '.join(map(str, words))} --rank {k}")])

    def _bench(self, batch: int) -> list[str]:
        args = self.args
        return [*args.through, "{python}", "-m", "hpcmlp", "bench", "step", "--sizes", args.sizes,
                "--global-batch-size", str(batch), "--steps", str(args.steps), "--json"]

    def _everywhere(self, command) -> str:
        others = [f"on n{k + 1} {command(k)} >/dev/null & " for k in range(1, self.args.hosts)]
        return f"{''.join(others)} on n1 {command(0)} || exit; wait"

    def _run(self, command: list[str]) -> dict:
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run([*self.hosts, *command], capture_output=True, text=True, env=environ, timeout=300)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])


def one_round(bench: Bench, args: argparse.Namespace) -> dict[str, float]:
    """Return milliseconds by name."""
    batch, local = args.global_batch_size, args.global_batch_size // args.hosts
    ms = {"compute": bench.alone(local)["step_ms"]}
    nothing = bench.alone(1)["step_ms"]
    for wire in args.wires:
        whole = bench.step(batch, "--wire", wire, *args.options)
        ms[f"hpcmlp {wire}"] = whole["step_ms"]
        ms[f"communication {wire}"] = bench.step(args.hosts, "--wire", wire, *args.options)["step_ms"] - nothing
    args.num_params = whole["num_params"]
    for name in DDP if args.peer_python else ():
        ms[name] = bench.ddp(*DDP[name])["step_ms"]
    return ms


def report(rounds: list[dict[str, float]], args: argparse.Namespace) -> dict:
    """Print the table; return it with the rounds."""
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    sent = 2 * (args.hosts - 1) / args.hosts * args.num_params
    width = {"float32": 4, "bf16": 2, "float16": 2, "int8": 1}
    wire = {name: sent * width[name] * 8 / args.mbit / 1e3 for name in args.wires}
    print(f"{args.sizes}, global batch {args.global_batch_size}, {args.hosts} hosts, {args.mbit:g} Mbit/s, "
          f"{len(rounds)} rounds, load {os.getloadavg()[0]:.1f}")
    for name, value in median.items():
        values = [r[name] for r in rounds]
        line = f"  {name:<24} {value:8.1f} ms ({min(values):.1f}-{max(values):.1f})"
        kind, _, of = name.partition(" ")
        if kind == "hpcmlp":
            line += f"  {value / max(median['compute'], wire[of]):.2f} x max(compute, wire {wire[of]:.1f} ms)"
        elif kind == "communication":
            line += f"  {value / wire[of]:.2f} x wire, {value / median['communication ' + args.wires[0]]:.2f} x "
            line += args.wires[0]
        elif kind.startswith("DDP"):
            line += "".join(f"  {value / median['hpcmlp ' + w]:.2f} x {w}" for w in args.wires)
        print(line, flush=True)
    return {"median_ms": median, "wire_ms": wire, "rounds_ms": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="a Python that has torch (default: no peer)")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--mbit", type=float, default=1000, help="rate of each link, Mbit/s")
    parser.add_argument("--sizes", default="784,2048,2048,10")
    parser.add_argument("--global-batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wires", type=lambda text: text.split(","), default=["float32", "bf16"])
    parser.add_argument("--options", type=str.split, default=[], help="more options of hpcmlp bench step, in one word")
    parser.add_argument("--through", type=str.split, default=[], help="words before every Python that is timed")
    parser.add_argument("--out", type=Path, help="JSON file with every round")
    args = parser.parse_args()
    bench = Bench(args)
    result = report([one_round(bench, args) for _ in range(args.rounds)], args)
    if args.out:
        args.out.write_text(json.dumps({**{k: str(v) for k, v in vars(args).items()}, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
