"""What lies around the steps of a device: predictions, copies beside other work, collectives in graphs, shared GPUs.

`python check_paths.py` checks it on the emulated device; as ranks of MPI (`mpiexec -n 2 python check_paths.py staged`)
two ranks take steps through the memory of the host, and straight from that of the device where MPI proves that it can,
on one GPU where there is one.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_steps
import numpy as np

from hpcmlp.data.order import Order
from hpcmlp.data.samples import Samples
from hpcmlp.nn.initializers import initialize
from hpcmlp.nn.layout import PaddedLayout, pad
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.planned import PlannedNetwork
from hpcmlp.nn.planned_forward import Predictor
from hpcmlp.ops.device import DeviceOps, DirectOps
from hpcmlp.ops.plain import PlainOps
from hpcmlp.sync.planned import DeviceSamples, PlannedSteps

BATCH = 64
STAGED_ELEMENTS, CHUNKS = 1 << 24, 8


def check_predictions(device: Any) -> None:
    """Compare predictions with those of float64 on the host; a row with NaN must give NaN."""
    for activation in ("relu", "gelu", "tanh", "identity"):
        spec = NetworkSpec((28, 300, 300, 10), activation)
        flat = initialize(spec, 3, "auto", np.float32)
        x = np.random.default_rng(0).standard_normal((1000, 28), dtype=np.float32)
        x[0, 3] = np.nan
        wanted = Network(spec, PlainOps(np), len(x), flat.astype(np.float64), dtype=np.float64).forward(
            x.astype(np.float64))
        predictor, ops = Predictor(spec, device, 1024), DeviceOps(device.xp)
        predictor.set_params(predictor.layout.pack(spec.layout().views(flat)))
        got = np.empty((len(x), 10), np.float32)
        ops.to_host(predictor.forward(device.xp.asarray(x)), got)
        off = check_steps.deviation(got[1:], wanted[1:])
        print(f"  predictions, {activation}: {off:.1e}; a row with NaN gives {got[0, 0]}")
        assert off < 1e-5 and np.isnan(got[0]).all()


def check_staging(device: Any) -> None:
    """Copy a vector to the host and back in chunks, look at every number, and print the rates of both ways."""
    values = np.random.default_rng(0).standard_normal(STAGED_ELEMENTS, dtype=np.float32)
    array = device.zeros(values.size, np.float32)
    device.upload(values, array)
    stage, edge = DeviceOps(device.xp).stage(array), STAGED_ELEMENTS // CHUNKS
    pieces = [(k * edge, (k + 1) * edge) for k in range(CHUNKS)]
    for turn in range(2):       # the first one locks the pages
        begin = time.perf_counter()
        arrivals = [stage.fetch(*piece) for piece in pieces]
        for (start, stop), arrived in zip(pieces, arrivals, strict=True):
            arrived()
            assert np.array_equal(stage.host[start:stop], values[start:stop])
            stage.host[start:stop] += 1
            stage.put(start, stop)
        stage.settle()
        taken, values = time.perf_counter() - begin, values + np.float32(1)
        back = np.empty_like(values)
        device.download(array, back)
        assert np.array_equal(back, values)
        print(f"  there, changed and back, {values.nbytes >> 20} MiB in {CHUNKS} chunks: {1e3 * taken:.1f} ms"
              f"{' with the locking of pages' if turn == 0 else ''}")
    begin = time.perf_counter()
    for arrived in [stage.fetch(*piece) for piece in pieces]:
        arrived()
    middle = time.perf_counter()
    for piece in pieces:
        stage.put(*piece)
    stage.settle()
    down, up = (values.nbytes / 1e9 / s for s in (middle - begin, time.perf_counter() - middle))
    print(f"  to the host {down:.1f} GB/s, to the device {up:.1f} GB/s")


def run_together(device: Any, comm: Any, precision: str, make_exchange: Callable[[Any, int], Any], steps: int, due: Any,
                 between: Callable[[Any], None] | None = None) -> tuple[PlannedNetwork, list[Any]]:
    """Take whole steps of all ranks of `comm`, collectives included; return the network and the results read.

    make_exchange : of the network and the elements of a rank's part. due : step numbers after which results are read.
    between : is given the `TogetherStep` before the last step.
    """
    from hpcmlp.sync.device_step import TogetherStep
    p, rank, size = check_steps.Problem(check_steps.TABLE[0]), comm.rank, comm.size
    layout = p.spec.layout(PaddedLayout)
    layout.size = pad(layout.size, PaddedLayout.WIDTH * size)
    part = layout.size // size
    network = PlannedNetwork(p.spec, p.loss, device, -(-BATCH // size), p.rule, p.hyper, precision=precision, seed=5,
                             average=0.9, ranges=[(rank * part, (rank + 1) * part)], layout=layout)
    network.set_params(layout.pack(p.spec.layout().views(p.flat)))
    exchange = make_exchange(network, part)
    samples = DeviceSamples(device, Samples(p.x, p.y, p.weight), [0, 1, 2], *shift_and_scale(p))
    order = Order(check_steps.SHARDS, BATCH, seed=3)
    planned = PlannedSteps(network, samples, order, p.rate, rank, size, True, exchange)
    step, results = TogetherStep(planned, lambda number: number in due, comm, DeviceOps(device.xp)), []
    for number in range(steps):
        if between is not None and number == steps - 1:
            between(step)
        results.append(step.run(None, number, p.rate(number), check=True))
    return network, [result for result in results if result.steps]


def shift_and_scale(problem: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return what `check_steps.run_float64` does to the samples."""
    d = problem.x.shape[1]
    return 0.1 * np.arange(d), 1.0 + 0.01 * np.arange(d)


def check_together(device: Any) -> None:
    """Capture steps with NCCL inside, of one rank, and compare them with float64."""
    from mpi4py import MPI

    from hpcmlp.run.on_device import open_collectives
    problem, steps = check_steps.Problem(check_steps.TABLE[0]), 40
    wanted, _ = check_steps.run_float64(problem, steps)
    for precision, bound in check_steps.BOUNDS.items():
        network, results = run_together(device, MPI.COMM_SELF, precision, lambda _, part: open_collectives(
            MPI.COMM_SELF, device, part), steps, (13, 27, 39))
        host = np.empty(network.layout.size, np.float32)
        device.download(network.params, host)
        off = check_steps.deviation(problem.spec.layout().pack(network.layout.unpack(host), np.float64), wanted)
        print(f"  whole steps with collectives of one rank, {precision}: {off:.1e}")
        assert off < bound and all(r.replicas_agree and not r.skipped for r in results)


def check_messages() -> None:
    """Print whether MPI claims to send from GPU memory, and what a child finds when it tries, claimed or not."""
    from mpi4py import MPI  # noqa: F401 - loads the library

    from hpcmlp.run.device_messages import claims, mapped_mpi, why_false
    print(f"  claimed by {', '.join(claims(mapped_mpi())) or 'nobody'}; a child: {why_false() or 'it is true'}")


def check_sums(device: Any) -> None:
    """Add as the ring does that sends straight from the device: into a view, waited for, with the bits of the host."""
    random, sums = np.random.default_rng(0), DirectOps(device.xp).sums
    for count, scale in ((1, 1.0), (1000, 1e-38), (1 << 20, 1.0)):
        a, b = (random.standard_normal(count, dtype=np.float32) * np.float32(scale) for _ in range(2))
        own, work = device.zeros(count + 8, np.float32), sums.empty(4 * count + 64)[:4 * count].view(np.float32)
        device.upload(a, own[8:])
        device.upload(b, work)
        assert sums.holds(own) and sums.holds(work)
        sums.add(own[8:], work, own[8:])
        sums.wait()
        back = np.empty(count + 8, np.float32)
        device.download(own, back)
        assert not back[:8].any() and back[8:].tobytes() == (a + b).tobytes()
    print("  sums of the ring have the bits of the host, small numbers too")


def check_gpus() -> None:
    """Print how the GPUs of this node are known, and that they are told apart."""
    from hpcmlp.ops.device import see_gpus
    seen = see_gpus()
    print(f"  {', '.join(seen)}")
    assert len(set(seen)) == len(seen)


def start_ranks(ranks: int) -> None:
    """Let ranks share the GPU: steps through the memory of the host, or straight from that of the device."""
    beside = Path(sys.executable).with_name("mpiexec")
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    if launcher is None:
        print("  left out: there is no mpiexec")
        return
    done = subprocess.run([launcher, "-n", str(ranks), sys.executable, __file__, "staged"], capture_output=True,
                          text=True, timeout=240, cwd=Path(__file__).parent,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])})
    print("".join(f"  {line}\n" for line in done.stdout.splitlines()), end="")
    assert done.returncode == 0, done.stderr


def staged() -> None:
    """Take steps with the other ranks through the memory of the host, and compare them with float64.

    So also straight from the memory of the device, where a child process proves that MPI can; the emulated one's can.
    """
    from hpcmlp import launch
    world = launch.open_world()
    from hpcmlp.comm import open_direct, open_exchange
    from hpcmlp.comm.topology import Topology
    from hpcmlp.ops import open_planned
    from hpcmlp.run.device_messages import may_send, why_wrong
    from hpcmlp.run.gpus import open_arithmetic
    from hpcmlp.sync import make_strategy
    from hpcmlp.sync.buckets import cut_evenly
    from hpcmlp.sync.device_step import StagedStep
    topology, steps = Topology(world.comm), 40
    own_ops, note = open_arithmetic("gpu", world.comm)
    ops: DeviceOps = own_ops
    device, rank, size = open_planned(ops), topology.rank, topology.size
    p = check_steps.Problem(check_steps.TABLE[0])
    wanted, _ = check_steps.run_float64(p, steps)
    layout = p.spec.layout(PaddedLayout)
    layout.size = pad(layout.size, PaddedLayout.WIDTH * size)
    for name in ("shared", "ring", "direct"):
        if name == "direct":
            good, why = (True, "") if device.name == "emulated" else \
                may_send(world.comm, topology.num_nodes, own_ops.number, asked=True)
            if not good:
                if rank == 0:
                    print(json.dumps({"ranks": size, "sync": name, "left out": why}), flush=True)
                continue
            ops = DirectOps(own_ops.xp, own_ops.identity, own_ops.number)
            exchange = open_direct(topology, layout.size, np.float32, ops.sums)
            wrong = why_wrong(exchange.collective, device)
            assert not wrong, f"{why}, but {wrong}"
        else:
            exchange = open_exchange(name, topology, layout.size, np.float32)
        params, grads = device.zeros(layout.size, np.float32), device.zeros(layout.size, np.float32)
        buckets = cut_evenly(layout.size, 0.005, size)      # several of them
        strategy = make_strategy(False)(exchange.collective, buckets, size, params, grads, ops,
                                        (exchange.params, exchange.grads))
        network = PlannedNetwork(p.spec, p.loss, device, -(-BATCH // size), p.rule, p.hyper, seed=5,
                                 ranges=strategy.ranges, params=params, grads=grads, layout=layout)
        network.set_params(layout.pack(p.spec.layout().views(p.flat)))
        samples = DeviceSamples(device, Samples(p.x, p.y, p.weight), [0, 1, 2], *shift_and_scale(p))
        planned = PlannedSteps(network, samples, Order(check_steps.SHARDS, BATCH, seed=3), p.rate, rank, size, False)
        step = StagedStep(planned, strategy, ops, None)
        agree = all([step.run(None, number, p.rate(number), check=True).replicas_agree for number in range(steps)])
        host = np.empty(layout.size, np.float32)
        device.download(params, host)
        off = check_steps.deviation(p.spec.layout().pack(layout.unpack(host), np.float64), wanted)
        if rank == 0:
            print(json.dumps({"ranks": size, "sync": name, "buckets": len(buckets), "deviation": off, "alike": agree,
                              "note": note}), flush=True)
        assert agree and off < check_steps.BOUNDS["float32"]


def check_all(attempt: Callable[[str, Callable[[], None]], Any], device: Any) -> None:
    """Run every check by `attempt(what, action)`."""
    attempt("GPUs of this node", check_gpus)
    attempt("predictions", lambda: check_predictions(device))
    attempt("copies in chunks", lambda: check_staging(device))
    attempt("sums of the ring", lambda: check_sums(device))
    attempt("collectives in steps", lambda: check_together(device))
    attempt("ranks that share the GPU", lambda: start_ranks(2))
    attempt("messages from GPU memory", check_messages)


def main() -> None:
    """Check everything on the emulated device."""
    from hpcmlp.ops.emulated import EmulatedDevice
    os.environ["HPCMLP_GPU"] = "emulated"

    def attempt(what: str, action: Callable[[], None]) -> None:
        print(f"== {what}", flush=True)
        action()

    check_all(attempt, EmulatedDevice())


if __name__ == "__main__":
    np.seterr(all="ignore")
    staged() if sys.argv[1:] == ["staged"] else main()
