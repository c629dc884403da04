"""Time the parts of a step on this machine."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from hpcmlp.comm import make_collective, messages, open_exchange
from hpcmlp.comm.agreement import agreed
from hpcmlp.comm.shared import SharedUnavailable
from hpcmlp.comm.topology import Topology
from hpcmlp.config import BenchConfig
from hpcmlp.data.samples import Batch
from hpcmlp.errors import CannotWrite, ConfigError, flag
from hpcmlp.nn.initializers import initialize
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.optimizers import make_optimizer
from hpcmlp.ops import open_ops
from hpcmlp.run.gpus import open_arithmetic
from hpcmlp.sync import Plan, make_strategy, plan
from hpcmlp.sync.step import Step, hidden_share
from hpcmlp.traffic import check_wire

ROWS = 8192  # made-up samples a rank draws its batches from
ACTS_ON = {"sizes": ("step", "gemm"), "global_batch_size": ("step", "gemm", "io"), "sync": ("step",),
           "servers": ("step",), "bytes": ("comm",), "wire": ("step",), "overlap": ("step",), "bucket_mb": ("step",),
           "optimizer": ("step",), "device": ("step",), "precision": ("step",), "data": ("io",),
           "memory_limit": ("io",)}


def main(config: BenchConfig, comm: Any) -> int:
    """Time what `config` names. Collective over `comm`; returns 0, or raises HpcmlpError."""
    with agreed(comm):
        _check(config, comm.size)
    topology = Topology(comm)
    if config.calibrate:
        calibrate(config, topology)
        topology.free()
        return 0
    timers = {"step": time_step, "comm": time_comm, "gemm": time_gemm, "io": time_io}
    result = timers[config.what](config, topology)
    if comm.rank == 0:
        print(json.dumps(result) if config.json else _table(result), flush=True)
    topology.free()
    return 0


def _check(config: BenchConfig, size: int) -> None:
    """Raise ConfigError for what cannot be timed and for an option that would have no effect."""
    if (config.what is None) == (config.calibrate is None):
        raise ConfigError("bench times step, comm, gemm or io, or measures the machine with --calibrate FILE.json; "
                          "give one of them.")
    if config.calibrate is None and (config.watts or config.rounds != BenchConfig.rounds):
        raise ConfigError("--watts and --rounds have no effect without --calibrate.")
    for name, whats in ACTS_ON.items():
        if config.what not in whats and getattr(config, name) != BenchConfig.__dataclass_fields__[name].default:
            raise ConfigError(f"{flag(name)} has no effect with bench {config.what}; it belongs to bench "
                              f"{' and '.join(whats)}.")
    if config.what == "step":
        _check_device(config)
        check_wire(config.sync, config.wire)
        if config.servers is not None and (config.sync != "server" or config.servers > size):
            raise ConfigError(f"--servers {config.servers} has no effect with --sync {config.sync} on {size} ranks; it "
                              "belongs to --sync server with at least as many ranks.")
        if config.overlap and config.sync == "native":
            raise ConfigError("--overlap has no effect with --sync native, which sends nothing while it computes; "
                              "leave one out.")
    if len(config.sizes) < 2:
        raise ConfigError(f"--sizes {','.join(map(str, config.sizes))}: give at least two widths, input and output.")
    if config.what == "io" and config.data is None:
        raise ConfigError("bench io needs --data DIR, a data set directory made by 'hpcmlp prepare'.")


def calibrate(config: BenchConfig, topology: Topology) -> None:
    """Measure the machine and write its file, from rank 0. Collective."""
    import datetime
    import os
    import platform

    from hpcmlp.comm.topology import mpi_library
    from hpcmlp.plan.machine import write_machine
    from hpcmlp.run.calibrate import Calibration
    begin = time.perf_counter()
    threads = int(os.environ.get("OPENBLAS_NUM_THREADS", "1"))
    directory = os.path.dirname(os.path.abspath(config.calibrate))
    with agreed(topology.comm):
        if topology.rank == 0 and not os.access(directory, os.W_OK):
            raise CannotWrite(f"{directory}: cannot write here; name a file in a directory that can be written to.")
    date = datetime.date.today().isoformat()
    where = f"{topology.num_nodes} node{'s' * (topology.num_nodes > 1)} of {topology.local_size} rank(s)"
    machine = Calibration(topology, threads, directory, config.rounds).run(
        platform.node(), f"measured by hpcmlp bench --calibrate on {date}, {where}", config.watts,
        {"date": date, "mpi": mpi_library(), "numpy": np.__version__, "python": platform.python_version(),
         "nodes": topology.num_nodes})
    with agreed(topology.comm):
        if topology.rank == 0:
            write_machine(config.calibrate, machine)
    if topology.rank == 0:
        taken = time.perf_counter() - begin
        print(json.dumps({"what": "calibrate", "file": config.calibrate, "seconds": taken}) if config.json else
              f"wrote {config.calibrate}: {machine.source}, in {taken:.0f} s", flush=True)


def _check_device(config: BenchConfig) -> None:
    """Raise ConfigError for what acts on one kind of device only."""
    if config.sync in ("nccl", "direct"):
        raise ConfigError(f"--sync {config.sync} has no effect with bench step, which times the path through host "
                          "memory.")
    if config.device == "cpu":
        if config.precision != "float32":
            raise ConfigError(f"--precision {config.precision} has no effect with --device cpu, which computes in "
                              "float32; it belongs to --device gpu.")
        return
    odd = {f"--optimizer {config.optimizer}": config.optimizer in ("lamb", "lars"), f"--wire {config.wire}":
           config.wire != "float32", "--overlap": bool(config.overlap), "--sync server": config.sync == "server"}
    given = [name for name, holds in odd.items() if holds]
    if given:
        raise ConfigError(f"{given[0]} has no effect with bench step --device gpu, which times planned steps; leave "
                          "it out.")


def time_step(config: BenchConfig, topology: Topology) -> dict[str, Any]:
    """Return the median time of a whole step (gather, forward, backward, reduce, update, share) and of its GEMMs alone.

    Collective.
    """
    rank, size, batch_rows = topology.rank, topology.size, config.global_batch_size
    roles = None
    if config.sync == "server":
        from hpcmlp.comm.served import Roles
        roles = Roles(config.servers or 1, size)
    number, count = (rank, size) if roles is None else roles.share(rank) or (0, batch_rows + 1)
    rows = (number + 1) * batch_rows // count - number * batch_rows // count
    ops, note = open_arithmetic(config.device, topology.comm)
    if note and rank == 0:
        print(f"note: {note}", file=sys.stderr)
    if config.device == "gpu":
        from hpcmlp.run.device_rates import time_planned_step
        return time_planned_step(config, topology, ops)
    spec = NetworkSpec(tuple(config.sizes))
    layout = spec.layout()
    exchange = open_exchange(config.sync, topology, layout.size, np.float32, wire=config.wire,
                             servers=config.servers or 1, overlap=config.overlap)
    if roles is not None:
        from hpcmlp.sync.storage import one_bucket
        planned = Plan(one_bucket(layout.size, roles), None, False, 0.0)
    else:
        planned = plan(spec, exchange.collective, size, topology.num_nodes, config.bucket_mb, config.overlap)
    network = Network(spec, ops, max(rows, 1), exchange.params, exchange.grads, piece=planned.piece)
    ops.from_host(initialize(spec, 0, "auto", np.float32), network.params)
    kind = make_strategy(False, exchange.collective.narrow, planned.overlap)
    strategy = kind(exchange.collective, planned.buckets, size, network.params, network.grads, ops)
    optimizer = make_optimizer(config.optimizer, ops, layout, strategy.ranges, np.float32)
    step = Step(network, Loss("softmax_cross_entropy"), optimizer, strategy, ops, rows=rows)
    batches = _batches(spec.sizes, rows, rank)
    counter = iter(range(1 << 40))
    parts: dict[str, list[float]] = {"compute": [], "comm": [], "flight": []}

    def whole_step() -> None:
        number = next(counter)
        result = step.run(batches[number % len(batches)], number, 1e-4)
        parts["compute"].append(result.compute_s)
        parts["comm"].append(result.comm_s)
        parts["flight"].append(result.flight_s)

    gemms = _gemms(spec.sizes, rows)
    for action in (whole_step, gemms):
        _median(topology, action, max(3, config.steps // 10), finish=strategy.finish)
    step_ms, floor_ms = [], []
    for _ in range(5):  # alternating, so that a change of the machine's speed meets both
        if planned.overlap:
            step_ms.append(_mean(topology, whole_step, max(1, config.steps // 5), strategy.finish))
        else:
            step_ms.append(_median(topology, whole_step, max(1, config.steps // 5)))
        floor_ms.append(_median(topology, gemms, max(1, config.steps // 5)))
    return {"what": "step", "sizes": list(spec.sizes), "global_batch_size": batch_rows, "ranks": size,
            "sync": exchange.name, "wire": exchange.wire,
            "step_ms": statistics.median(step_ms), "floor_ms": statistics.median(floor_ms),
            "parts": {name: 1e3 * statistics.median(values) for name, values in parts.items()},
            "overlap": planned.overlap, "buckets": len(planned.buckets), "bucket_mb": planned.bucket_mb,
            "hidden": hidden_share(sum(parts["comm"]), sum(parts["flight"])), "num_params": layout.num_params}


def _batches(sizes: tuple[int, ...], rows: int, rank: int) -> list[Batch]:
    random = np.random.default_rng(rank)
    source = random.standard_normal((ROWS, sizes[0]), dtype=np.float32)
    labels = random.integers(0, sizes[-1], ROWS).astype(np.int32)
    batches = []
    for _ in range(16):
        index = random.integers(0, ROWS, rows)
        batches.append(Batch(rows, 0, rows, source, index, labels[index], None))
    return batches


def _gemms(sizes: tuple[int, ...], rows: int) -> Callable[[], None]:
    """Return a function that does only the matrix products of a step, on arrays of their own."""
    random = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    activations = [array(rows, width) for width in sizes]
    weights = [array(b, a) for a, b in zip(sizes, sizes[1:], strict=False)]
    gradients = [array(rows, width) for width in sizes]
    dweights = [np.empty_like(w) for w in weights]

    def run() -> None:
        for x, w, out in zip(activations, weights, gradients[1:], strict=False):
            np.matmul(x, w.T, out=out)
        for layer in range(len(weights) - 1, -1, -1):
            np.matmul(gradients[layer + 1].T, activations[layer], out=dweights[layer])
            if layer:
                np.matmul(gradients[layer + 1], weights[layer], out=gradients[layer])

    return run


def _mean(topology: Topology, action: Callable[[], None], count: int, finish: Callable[[], None]) -> float:
    """Return the mean time of `count` calls in a row that leave something under way; slowest rank, ms. Collective.

    A call before them leaves its own to the first, as the last leaves its own to `finish`, which is not timed: so each
    counts once, as in a long run.
    """
    messages.barrier(topology.comm)
    action()
    begin = time.perf_counter()
    for _ in range(count):
        action()
    taken = np.array([time.perf_counter() - begin])
    finish()
    messages.max_in_place(topology.comm, taken)
    return 1e3 * float(taken[0]) / count


def _median(topology: Topology, action: Callable[[], None], count: int, skip: int = 0,
            finish: Callable[[], None] = lambda: None) -> float:
    """Return the median over `count` calls of the slowest rank's time, ms, but for the first `skip`.

    Collective. `finish` ends what the calls left under way, before the ranks talk about it.
    """
    times = np.empty(count)
    messages.barrier(topology.comm)
    for k in range(count):
        begin = time.perf_counter()
        action()
        times[k] = time.perf_counter() - begin
    finish()
    messages.max_in_place(topology.comm, times)
    return 1e3 * float(np.median(times[skip:]))


def time_gemm(config: BenchConfig, topology: Topology) -> dict[str, Any]:
    """Return the rate of the matrix products of the network, every rank at once. Collective."""
    rows = max(1, config.global_batch_size // topology.size)
    gemms = _gemms(tuple(config.sizes), rows)
    _median(topology, gemms, 3)
    ms = _median(topology, gemms, config.steps)
    pairs = list(zip(config.sizes, config.sizes[1:], strict=False))
    flops = sum(6 * rows * a * b for a, b in pairs) - 2 * rows * pairs[0][0] * pairs[0][1]
    return {"what": "gemm", "sizes": list(config.sizes), "rows": rows, "ranks": topology.size, "ms": ms,
            "gflops_per_rank": flops / ms / 1e6}


def time_comm(config: BenchConfig, topology: Topology) -> list[dict[str, Any]]:
    """Return the time of an all-reduce by each algorithm, of copying memory and of a message, over sizes. Collective.

    algorithm : "shared" and "ring", ours; "native", MPI_Reduce_scatter and MPI_Allgatherv, which a step uses with
        --sync native; "MPI_Allreduce", the library's own; "copy", np.copyto of as many bytes by all ranks at once;
        "message", half a round trip between the first and the last rank.
    us : median over calls of the slowest rank's time, microseconds; of copies as many that a barrier after them, which
        keeps the ranks together as an all-reduce does, counts little. gb_per_s : bytes of the array / us.
    of_copy : the copy's time / that of the algorithm, None for messages. On a node of P ranks an all-reduce of n bytes
        must read its share of P arrays, P n/P = n bytes on each rank, and write the sum into all of them, again n
        bytes: what the copy reads and writes. So 1 is the bound that memory sets, whatever way the numbers take.
    """
    rows = []
    for num_bytes in (4 * (size // 4) for size in config.bytes):
        actions, opened = _comm_actions(topology, num_bytes // 4)
        count = max(2, min(config.steps, int(2e7 / max(num_bytes, 1e5))))
        times: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(3):  # in turn, so that a change of the machine's speed meets all
            for name, action in actions.items():
                taken = _median(topology, action, *((8, 2) if name == "copy" else (2 * count, count)))
                times[name].append(1e3 * taken)
        medians = {name: statistics.median(values) for name, values in times.items()}
        medians["copy"] /= _copies(num_bytes)
        medians |= {name: us / 2 for name, us in medians.items() if name == "message"}
        for name, us in medians.items():
            rows.append({"algorithm": name, "bytes": num_bytes, "ranks": topology.size, "us": us,
                         "gb_per_s": num_bytes / us / 1e3,
                         "of_copy": None if name == "message" else medians["copy"] / us})
        actions.clear()
        for collective in opened:
            collective.free()
    return rows


def _comm_actions(topology: Topology, size: int) -> tuple[dict[str, Callable[[], None]], list[Any]]:
    """Return what `time_comm` times, by name, for float32 arrays of `size`, and the collectives to free after it."""
    actions: dict[str, Callable[[], None]] = {}
    opened = [make_collective("ring", topology), make_collective("native", topology)]
    array, native = opened[0].empty(size, np.float32), opened[1]
    bounds = np.arange(topology.size + 1) * size // topology.size

    def in_halves() -> None:
        native.reduce_scatter(array, bounds)
        native.all_gather(array, bounds)

    try:
        shared = make_collective("shared", topology)
        opened.append(shared)
        actions["shared"] = partial(shared.all_reduce, shared.empty(size, np.float32))
    except SharedUnavailable as reason:
        if topology.rank == 0:
            print(f"bench comm: shared is left out for {4 * size:,} bytes: {reason}", file=sys.stderr)
    actions |= {"ring": partial(opened[0].all_reduce, array), "native": in_halves,
                "MPI_Allreduce": partial(messages.sum_in_place, topology.comm, array),
                "copy": partial(_copy, topology.comm, np.ones_like(array), np.zeros_like(array))}
    if topology.size > 1:
        actions["message"] = partial(messages.there_and_back, topology.comm, array, topology.size - 1)
    return actions, opened


def _copies(num_bytes: int) -> int:
    return max(1, min(1000, (1 << 26) // num_bytes))


def _copy(comm: Any, array: np.ndarray, out: np.ndarray) -> None:
    for _ in range(_copies(array.nbytes)):
        np.copyto(out, array)
    messages.barrier(comm)


def time_io(config: BenchConfig, topology: Topology) -> list[dict[str, Any]]:
    """Return the rates of every stage of the input; see `run.io_rates`. Collective."""
    from hpcmlp.run.io_rates import IoRates
    limit = None if config.memory_limit is None else config.memory_limit * 2**20
    return IoRates(config.data, open_ops("cpu"), topology, config.global_batch_size, config.steps,
                   limit).run()


def _table(result: dict[str, Any] | list[dict[str, Any]]) -> str:
    rows = result if isinstance(result, list) else [result]
    names = list(rows[0])
    cells = [names, *([_cell(r[n]) for n in names] for r in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(names))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    if isinstance(value, dict):
        return " ".join(f"{name} {_cell(v)}" for name, v in value.items())
    if isinstance(value, list):
        return "-".join(map(str, value))
    return "-" if value is None else str(value)
