"""Compare the whole training step of hpcmlp with its peers', turn by turn on this machine, for four networks.

All peers of a network are started first and wait. A round then runs hpcmlp and each peer once, one after the other
within seconds, so that a change of the machine's speed meets all of them. A ratio is peer / hpcmlp of one round (above
1: hpcmlp is faster); shown are the medians over rounds, the ratios' spread, and the goals they are held to: share of
the GEMM floor, the faster of PyTorch's DDP forms, the fastest form in one process. Printed as Markdown; `--out` keeps
every round as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Case:
    """A network, the steps of one turn, and the goals: share of the floor, ratio to DDP and to one process."""

    sizes: str
    global_batch_size: int
    steps: int
    floor_goal: float
    ddp_goal: float
    single_goal: float


CASES = [Case("784,256,128,10", 128, 400, 0.65, 4.0, 1.15), Case("784,512,512,10", 512, 60, 0.88, 1.8, 1.15),
         Case("28,300,300,300,300,2", 1024, 60, 0.88, 1.8, 1.15), Case("784,2048,2048,10", 1024, 8, 0.94, 1.35, 1.08)]
# name: program and its options; 'native' is hpcmlp itself with the MPI library's own collectives
PEERS = {"ddp": ("torch_step.py", "--mode", "ddp"), "ddp fused": ("torch_step.py", "--mode", "ddp", "--fused"),
         "eager": ("torch_step.py", "--mode", "eager"), "eager fused": ("torch_step.py", "--mode", "eager", "--fused"),
         "compile": ("torch_step.py", "--mode", "compile"),
         "compile fused": ("torch_step.py", "--mode", "compile", "--fused"),
         "jax": ("jax_step.py",), "sklearn": ("sklearn_step.py",), "native": ()}
SINGLE = ("eager", "eager fused", "compile", "compile fused", "jax")  # those that `single_goal` speaks of


class Peer:
    """One peer process: started once per network, asked for turns through its standard input."""

    def __init__(self, name: str, case: Case, args: argparse.Namespace):
        ddp = name.startswith("ddp")
        threads = 1 if ddp else args.threads
        program, *options = PEERS[name]
        command = [args.peer_python, str(HERE / program), *options, "--sizes", case.sizes, "--global-batch-size",
                   str(case.global_batch_size), "--threads", str(threads)]
        if ddp:
            command += ["--ranks", str(args.ranks)]
        # NPROC: threads of XLA
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")
        self.command, self.about = command, {}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         env={**os.environ, **dict.fromkeys(names, str(threads))})

    def wait(self) -> None:
        """Wait until it is ready, and keep what it says about itself."""
        self.about = self._answer()

    def turn(self, steps: int) -> float:
        """Return its milliseconds a step."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()["step_ms"]

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.command)}: ended with exit code {self._process.wait()}")
        return json.loads(line)


def run_hpcmlp(case: Case, sync: str, steps: int, args: argparse.Namespace) -> dict:
    """Return the result of one `hpcmlp bench step`."""
    command = [*args.mpiexec.split(), "-n", str(args.ranks), sys.executable, "-m", "hpcmlp", "bench", "step",
               "--sizes", case.sizes, "--global-batch-size", str(case.global_batch_size), "--steps", str(steps),
               "--sync", sync, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout)


def compare(case: Case, args: argparse.Namespace) -> dict:
    """Return all rounds of one network, milliseconds by name, and what they come to."""
    steps = max(5, int(case.steps * args.scale))
    rounds: dict[str, list[float]] = {name: [] for name in ("hpcmlp", "floor", *args.peers)}
    peers = {name: Peer(name, case, args) for name in args.peers if name != "native"}
    try:
        for peer in peers.values():
            peer.wait()
        for _ in range(args.rounds):
            ours = run_hpcmlp(case, args.sync, steps, args)
            rounds["hpcmlp"].append(ours["step_ms"])
            rounds["floor"].append(ours["floor_ms"])
            for name in args.peers:
                rounds[name].append(peers[name].turn(steps) if name in peers else
                                    run_hpcmlp(case, "native", steps, args)["step_ms"])
    finally:
        for peer in peers.values():
            peer.close()
    ratios = {name: [value / ours for value, ours in zip(values, rounds["hpcmlp"], strict=True)]
              for name, values in rounds.items() if name != "hpcmlp"}
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    return {"sizes": case.sizes, "global_batch_size": case.global_batch_size, "steps": steps, "rounds_ms": rounds,
            "median_ms": {name: statistics.median(values) for name, values in rounds.items()},
            "ratio": {name: {"median": medians[name], "min": min(values), "max": max(values)}
                      for name, values in ratios.items()},
            "goals": goals(case, medians), "peers": {name: peer.about for name, peer in peers.items()}}


def goals(case: Case, ratio: dict[str, float]) -> list[dict]:
    """Return what was to be reached and what was, of the peers that took part."""
    found = [("of the GEMM floor", "floor", ratio["floor"], case.floor_goal)]
    for what, names, goal in (("PyTorch DDP", [n for n in ratio if n.startswith("ddp")], case.ddp_goal),
                              ("one process", [n for n in ratio if n in SINGLE], case.single_goal)):
        if names:
            best = min(names, key=ratio.__getitem__)
            found.append((what, best, ratio[best], goal))
    return [{"what": what, "by": by, "ratio": value, "goal": goal, "reached": value >= goal}
            for what, by, value, goal in found]


def markdown(results: list[dict], peers: list[str]) -> str:
    """Return two tables: the goals, and the median of every peer with its ratio and the ratio's spread."""
    titles = [f"{r['sizes'].replace(',', '-')} ({r['global_batch_size']})" for r in results]
    lines = ["| network (global batch) | hpcmlp | of the GEMM floor | faster than the faster PyTorch DDP | faster than "
             "the fastest single process |", "|---|---|---|---|---|"]
    for title, r in zip(titles, results, strict=True):
        by_what = {g["what"]: g for g in r["goals"]}
        cells = [f"{r['median_ms']['hpcmlp']:.3g} ms"]
        for what in ("of the GEMM floor", "PyTorch DDP", "one process"):
            g = by_what.get(what)
            sign = "" if g is None or g["reached"] else " MISSED"
            cells.append("-" if g is None else f"{100 * g['ratio']:.0f} % (goal {100 * g['goal']:.0f}){sign}"
                         if g["by"] == "floor" else f"{g['ratio']:.2f}x ({g['by']}; goal {g['goal']:g}){sign}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| network (global batch) | hpcmlp | floor | " + " | ".join(peers) + " |",
              "|---" * (len(peers) + 3) + "|"]
    for title, r in zip(titles, results, strict=True):
        own = r["rounds_ms"]["hpcmlp"]
        cells = [f"{r['median_ms']['hpcmlp']:.3g} ({min(own):.3g}-{max(own):.3g})", f"{r['median_ms']['floor']:.3g}"]
        cells += [f"{r['median_ms'][name]:.3g}, {r['ratio'][name]['median']:.2f}x "
                  f"({r['ratio'][name]['min']:.2f}-{r['ratio'][name]['max']:.2f})" for name in peers]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cpu_model() -> str:
    """Return the processor's name as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="a Python with benchmarks/peers/requirements.txt")
    parser.add_argument("--mpiexec", default=str(Path(sys.executable).with_name("mpiexec")),
                        help="launcher of hpcmlp's ranks, with options if need be")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of hpcmlp and processes of DDP, 1 thread each")
    parser.add_argument("--threads", type=int, default=2, help="threads of the peers in one process")
    parser.add_argument("--sync", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps of each turn")
    parser.add_argument("--networks", type=lambda text: [int(w) for w in text.split(",")], default=[0, 1, 2, 3],
                        help="which of the four networks, from 0")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS),
                        help=f"comma-separated: {', '.join(PEERS)}")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one run of hpcmlp")
    parser.add_argument("--out", type=Path, help="JSON file with every round")
    args = parser.parse_args()
    unknown = [name for name in args.peers if name not in PEERS]
    if unknown:
        parser.error(f"--peers: not known: {', '.join(unknown)} (legal: {', '.join(PEERS)})")
    before = os.getloadavg()
    # What an environment sets here (OPENBLAS_CORETYPE) can halve our speed, and JAX's not.
    blas = {name: value for name, value in sorted(os.environ.items()) if name.startswith("OPENBLAS_")}
    results = [compare(CASES[number], args) for number in args.networks]
    about = {"date": time.strftime("%Y-%m-%d"), "machine": cpu_model(), "cores": len(os.sched_getaffinity(0)),
             "load_before": before, "load_after": os.getloadavg(), "ranks": args.ranks, "threads": args.threads,
             "sync": args.sync, "rounds": args.rounds, "blas": blas}
    print(f"{about['date']}, {about['machine']}, {about['cores']} cores, {args.rounds} rounds; load {before[0]:.1f} "
          f"before, {about['load_after'][0]:.1f} after{''.join(f'; {name}={value}' for name, value in blas.items())}"
          f"\n\n{markdown(results, args.peers)}")
    if args.out:
        args.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
