"""Check and time the GPU step on this machine, beside PyTorch where it is installed: one command, one table at the end.

Prints what the library can fuse, the deviation of whole steps from float64 (in float32 also with the library's products
alone and with our own alone), step times (ours and PyTorch's in turn), the products alone, by each maker, and which was
taken, and the time from the start of a process to its first step. Failures are printed and the rest goes on; the exit
code is 1 if there were any.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

import check_paths
import check_steps
import numpy as np
from cases import CASES, Case
from ours_step import OurStep, open_device

from hpcmlp.ops.candidates import MAKERS
from hpcmlp.sync.planned import BESIDE, BESIDE_ELEMENTS, BESIDE_TRIAL

HERE = Path(__file__).resolve().parent
ROUNDS = 5
TURN_S = 0.12       # about how long one turn of a mode takes
PEERS = ("eager", "compile", "reduce-overhead", "graph", "compile-graph")


class Peer:
    """The process that runs PyTorch."""

    def __init__(self, log: Any):
        self.process = subprocess.Popen([sys.executable, str(HERE / "torch_step.py")], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=log, text=True, cwd=HERE)

    def time_ms(self, case: str, mode: str, steps: int) -> float | str:
        """Return milliseconds a step, or what went wrong."""
        try:
            self.process.stdin.write(f"{case} {mode} {steps}\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or '{"error": "no answer"}')
        except (OSError, ValueError) as error:
            answer = {"error": str(error)}
        return answer.get("ms", answer.get("error"))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def time_case(device: Any, case: Case, peer: Peer | None, modes: tuple[str, ...]) -> dict[str, Any]:
    """Return the median times of a case, ms: ours, the peers', the products alone."""
    ours = {"ours": OurStep(device, case), "ours, one stream": OurStep(device, case, concurrent=False)}
    if ours["ours"].network.layout.size >= BESIDE_ELEMENTS:
        ours["ours, updates behind"] = OurStep(device, case, beside=())
    if any(launch.ways.of("own") for launch in ours["ours"].network.products()):
        for maker in MAKERS:
            device.makers = (maker,)
            ours[f"ours, {maker} products"] = OurStep(device, case)
        device.makers = MAKERS
    counts, times = {}, {}
    for name, step in ours.items():
        step.run(3)
        step.time_ms(20)
        counts[name] = max(10, int(1e3 * TURN_S / step.time_ms(20)))
        times[name] = []
    wrong = {}
    for mode in modes if peer else ():
        first = peer.time_ms(case.name, mode, 10)
        if isinstance(first, str):
            wrong[mode] = first
            continue
        counts[mode], times[mode] = max(5, int(1e3 * TURN_S / first)), []
    for _ in range(ROUNDS):
        for name in times:
            times[name].append(ours[name].time_ms(counts[name]) if name in ours
                               else peer.time_ms(case.name, name, counts[name]))
    ways = products_us(ours["ours"].network)
    for line in ways:
        fastest = ", ".join(f"{maker} {us:.2f} us" for maker, us in line["us"].items())
        print(f"    {line['product']:50s} {fastest}; taken: {line['taken']} ({line['name']})")
    fused, plain, each = ours["ours"].products_ms()
    for key, ms in each:
        print(f"    {key:50s} {1e3 * ms:9.1f} us")
    step = ours["ours"]
    return {"case": case.name, "ms": {name: median(values) for name, values in times.items()},
            "spread": {name: [min(v), max(v)] for name, v in times.items()}, "wrong": wrong, "products_ms": fused,
            "plain_products_ms": plain, "tflops": case.flops / plain / 1e9, "graph_steps": step.steps.graph_steps,
            "products": ways, "notes": step.network.notes, "beside": step.steps.beside,
            "algorithms": step.steps.algorithms,
            "ways": {str(way): seconds for way, seconds in step.steps.way_times.items()},
            "whole_tflops": case.flops / median(times["ours"]) / 1e9}


def products_us(network: Any) -> list[dict[str, Any]]:
    """Return for every product of a step the time of the fastest way of each maker, us, and which one was taken."""
    lines = []
    for launch in network.products():
        ways = launch.ways
        best = {maker: 1e6 * min(ways.seconds[k] for k in ways.of(maker)) for maker in MAKERS
                if ways.seconds and ways.of(maker)}
        name, taken = ways.names[ways.choice], ways.makers[ways.choice]
        lines.append({"product": launch.name, "us": best, "taken": taken,
                      "name": name if taken == "own" else f"algorithm {ways.choice}"})
    return lines


def same_bits(device: Any, algorithms: dict[str, str]) -> None:
    """Check that updates beside the next step change no bit, in the largest case: 11 steps in some ways."""
    found = {}
    for way in ((), BESIDE[1], BESIDE[-1]):
        step = OurStep(device, CASES["large-bf16"], beside=way)
        step.steps.algorithms = dict(algorithms)
        step.run(11)
        found[way] = step.params()
    print("  parameters as without:", {way: bool(np.array_equal(params, found[()])) for way, params in found.items()})
    assert all(np.array_equal(params, found[()]) for params in found.values())


def start_up(program: list[str], runs: int) -> list[float]:
    """Return the seconds from starting a process to its first finished step, for each run."""
    seconds = []
    for _ in range(runs):
        begin = time.time()
        done = subprocess.run([sys.executable, *program], cwd=HERE, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(HERE.parents[1])})
        if done.returncode:
            raise RuntimeError(done.stderr)
        seconds.append(json.loads(done.stdout.strip().splitlines()[-1])["done"] - begin)
    return seconds


def show(result: dict[str, Any]) -> None:
    """Print one case as a table."""
    ms, spread = result["ms"], result["spread"]
    best = min(ms["ours"], ms["ours, one stream"])
    print(f"  {result['case']}: graph of {result['graph_steps']} steps; products {1e3 * result['products_ms']:.1f} us, "
          f"plain {1e3 * result['plain_products_ms']:.1f} us = {result['tflops']:.1f} TFLOP/s; whole step "
          f"{result['whole_tflops']:.1f} TFLOP/s {result['notes']}")
    if result["ways"]:
        ways = {way: f"{1e6 * seconds / BESIDE_TRIAL:.0f}" for way, seconds in result["ways"].items()}
        print(f"    updates beside the next step {result['beside']}, as tried (us a step): {ways}")
    for name, value in ms.items():
        print(f"    {name:22s} {1e3 * value:10.1f} us  [{1e3 * spread[name][0]:.1f}, {1e3 * spread[name][1]:.1f}]"
              f"  {value / best:6.2f} x ours")
    for name, text in result["wrong"].items():
        print(f"    {name:22s} failed: {text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peers", default=",".join(PEERS), help="modes of PyTorch, or 'none'")
    parser.add_argument("--skip", default="", help="parts to leave out: probe, check, times, start")
    parser.add_argument("--out", default=os.environ.get("OUT", "."), help="directory of the JSON and log files")
    args = parser.parse_args()
    skip, begin, failures, results = args.skip.split(","), time.time(), [], []
    modes = () if args.peers == "none" else tuple(args.peers.split(","))
    device = open_device()
    log = open(Path(args.out) / "torch.log", "w", encoding="utf-8")  # noqa: SIM115
    peer = Peer(log) if modes else None

    def attempt(what: str, action: Any) -> Any:
        started = time.time()
        print(f"== {what}", flush=True)
        try:
            return action()
        except Exception:
            failures.append(what)
            traceback.print_exc(file=sys.stdout)
            return None
        finally:
            print(f"   ({time.time() - started:.1f} s)", flush=True)

    attempt("versions", lambda: check_steps.versions(device))
    if "probe" not in skip:
        attempt("what can be fused", lambda: check_steps.probe(device))
    if "check" not in skip:
        attempt("steps against float64", lambda: check_steps.check_all(device, failures))
        check_paths.check_all(attempt, device)
    if "times" not in skip:
        for name in args.cases.split(","):
            results.append(attempt(f"times of {name}", lambda name=name: time_case(device, CASES[name], peer, modes)))
    if results and results[-1] and results[-1]["case"] == "large-bf16":
        attempt("updates beside the next step", lambda: same_bits(device, results[-1]["algorithms"]))
    if peer is not None:
        attempt("end of the peer", peer.close)
    starts = {}
    if "start" not in skip:
        starts["ours"] = attempt("start of ours", lambda: start_up([str(HERE / "ours_step.py")], 3))
        if modes:
            starts["torch"] = attempt("start of torch", lambda: start_up([str(HERE / "torch_step.py"), "first-step"],
                                                                         3))
    print(f"== table ({device.name})")
    for result in filter(None, results):
        show(result)
    for name, seconds in starts.items():
        print(f"  start to first step, {name}: {', '.join(f'{s:.2f}' for s in seconds or [])} s")
    (Path(args.out) / "gpu.json").write_text(json.dumps({"device": device.name, "results": results, "starts": starts,
                                                         "failures": failures}, default=float, indent=1))
    print(f"== {time.time() - begin:.0f} s; failures: {', '.join(failures) or 'none'}")
    return 1 if failures else 0


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())
