"""Measure what saving costs: how long training is held up beside one copy of memory, the write, the verified load.

A state of 100 MB (8.2 million parameters and Adam's moments) is captured and written as `train` does it. Prints one
JSON object: milliseconds of a copy of as many bytes between warm arrays, and of the hold-up of training (median and
range over the rounds), seconds and processor seconds of the write, GB/s of a verified load from the page cache, and
the share of one save a minute. Run it on a quiet machine.

    python benchmarks/saving.py --ranks 2
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HIDDEN = (2048, 3200)


def processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    return {"median": round(statistics.median(values), digits), "least": round(min(values), digits),
            "most": round(max(values), digits)}


def inside(folder: Path, rounds: int, sync: str) -> None:
    """The ranks' part."""
    from hpcmlp import launch
    comm = launch.open_world().comm
    from hpcmlp.comm.topology import Topology
    from hpcmlp.config import TrainConfig, build
    from hpcmlp.run import checkpoint
    from hpcmlp.run.coordinator import open_dataset
    from hpcmlp.run.parts import Parts
    from hpcmlp.run.record import checkpoint_meta
    from hpcmlp.run.writer import Writer
    config = build(TrainConfig, {"data": str(folder / "data"), "out": str(folder / "run"), "hidden": HIDDEN,
                                 "optimizer": "adam", "sync": sync})
    parts = Parts(config, Topology(comm), open_dataset(comm, config.data))
    session, writer = parts.session, Writer()
    if comm.rank == 0:
        session.make_room(best=False)
    copies, held, written, cpu = [], [], [], []
    vectors = 3 if comm.rank == 0 else 0
    source = [np.ones(session.network.layout.size, np.float32) for _ in range(vectors)]
    target = [np.ones_like(a) for a in source]
    for number in range(rounds + 1):
        comm.Barrier()
        begin = time.perf_counter()
        for a, b in zip(source, target, strict=True):
            np.copyto(b, a)
        copied = time.perf_counter()
        comm.Barrier()
        start = time.perf_counter()
        state = session.capture(checkpoint_meta(parts))
        if comm.rank == 0:
            writer.start(lambda step=number, state=state: checkpoint.save_timed(
                config.out, checkpoint.State({**state.meta, "step": step}, state.arrays), 2, 0.0))
        stop, used = time.perf_counter(), processor_s()
        writer.wait()
        if number:  # the first one warms up
            copies.append(1e3 * (copied - begin))
            held.append(1e3 * (stop - start))
            cpu.append(processor_s() - used)
            written += [one.written_s for one in writer.saved()]
        else:
            writer.saved()
    if comm.rank:
        return
    newest = checkpoint.list_checkpoints(config.out)[0]
    size = (newest / "state.h5").stat().st_size
    rates = []
    for _ in range(rounds):
        begin = time.perf_counter()
        checkpoint.read(newest)
        rates.append(size / (time.perf_counter() - begin) / 1e9)
    print(json.dumps({"ranks": comm.size, "sync": parts.exchange.name, "bytes": size, "rounds": rounds,
                      "copy_ms": spread(copies), "held_ms": spread(held),
                      "held_over_copy": spread([h / c for h, c in zip(held, copies, strict=True)]),
                      "write_s": spread(written), "write_processor_s": spread(cpu), "load_gb_per_s": spread(rates),
                      "share_at_one_a_minute": round((statistics.median(held) / 1e3 + statistics.median(cpu)) / 60, 5)},
                     ))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mpiexec", default=str(Path(sys.executable).with_name("mpiexec")))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sync", default="auto")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(args.inside, args.rounds, args.sync)
        return
    with tempfile.TemporaryDirectory() as place:
        values = np.random.default_rng(0)
        np.savez(Path(place) / "table.npz", x=values.standard_normal((400, 784)).astype(np.float32),
                 y=values.integers(0, 10, 400))
        subprocess.run([sys.executable, "-m", "hpcmlp", "prepare", f"{place}/table.npz", "--out", f"{place}/data"],
                       check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*args.mpiexec.split(), "-n", str(args.ranks), sys.executable, __file__, "--inside", place,
                        "--rounds", str(args.rounds), "--sync", args.sync], check=True)


if __name__ == "__main__":
    main()
