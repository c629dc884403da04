"""Measure what --trace costs: blocks of steps of the smallest network with and without it, in turn, in one job.

Runs differ from start to start by more than a trace costs, so both kinds are steps of the same ranks: block by block
the recorder is put in and taken out. Prints one JSON object: the median step of either kind in ms, the ratio on / off
of the medians of neighbouring blocks (median and quartiles), and the events of a step.

    python benchmarks/trace_cost.py --data data/mnist
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def inside(args: argparse.Namespace) -> None:
    """The ranks' part."""
    from hpcmlp import launch
    comm = launch.open_world().comm
    from hpcmlp.comm.topology import Topology
    from hpcmlp.config import TrainConfig, build
    from hpcmlp.run.coordinator import open_dataset
    from hpcmlp.run.parts import Parts
    from hpcmlp.run.trace import Recorder
    config = build(TrainConfig, {"data": str(args.data), "out": "unused", "hidden": (256, 128),
                                 "global_batch_size": 128, "optimizer": "adam"})
    parts = Parts(config, Topology(comm), open_dataset(comm, config.data))
    step, number, medians, events = parts.step, 0, {False: [], True: []}, 0
    for block in range(2 * args.blocks + 2):
        traced = bool(block % 2)
        recorder = Recorder(comm, step, parts.loader, number, number + args.steps + 1) if traced else None
        comm.Barrier()
        times = []
        for _ in range(args.steps):
            begin = time.perf_counter()
            if recorder is not None:
                recorder.begin_step(number)
            batch = parts.loader.batch(*divmod(number, parts.steps_per_epoch))
            step.run(batch, number, 1e-3)
            times.append(time.perf_counter() - begin)
            number += 1
        if recorder is not None:
            lines = recorder.lines()
            if lines is not None:
                events = sum(text.count('"ph": "X", "pid": 0') for text in lines) / args.steps
        if block > 1:
            medians[traced].append(1e3 * statistics.median(times[5:]))
    if comm.rank == 0:
        ratios = [on / off for on, off in zip(medians[True], medians[False], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(json.dumps({"off_ms": round(statistics.median(medians[False]), 4),
                          "on_ms": round(statistics.median(medians[True]), 4), "ratio": round(middle, 4),
                          "quartiles": [round(low, 4), round(high, 4)], "blocks": len(ratios),
                          "events_per_step": round(events, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="data set directory made by 'hpcmlp prepare mnist'")
    parser.add_argument("--mpiexec", default=str(Path(sys.executable).with_name("mpiexec")))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=20, help="pairs of blocks")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(args)
        return
    subprocess.run([*args.mpiexec.split(), "-n", str(args.ranks), sys.executable, __file__, "--inside", "--data",
                    str(args.data), "--steps", str(args.steps), "--blocks", str(args.blocks)], check=True)


if __name__ == "__main__":
    main()
