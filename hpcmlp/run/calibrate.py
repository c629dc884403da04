"""Measure a machine in about a minute: rates of products, passes, messages, node memory, files, and what a rank holds.

Every table is taken twice where a node has several ranks: by one of them while the others sleep, and by all at once, as
far as they have a core each, since ranks share memory, caches and clock. What they wait for together is timed with all.
A time is the median of a few calls; over ranks their mean, of what ranks do together the slowest. Operations are those
of training (`ops`, `comm`), called as training calls them.
"""

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import cycle
from typing import Any

import numpy as np

from hpcmlp.comm import make_collective, messages
from hpcmlp.comm.ring import Ring
from hpcmlp.comm.shared import SharedUnavailable
from hpcmlp.comm.topology import Topology, usable_cores
from hpcmlp.data.loader import Loader
from hpcmlp.data.manifest import Manifest
from hpcmlp.data.samples import Batch
from hpcmlp.data.shards import shard_name, write_shard
from hpcmlp.launch import cpu_quota
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.optimizers import make_optimizer
from hpcmlp.ops import open_ops
from hpcmlp.plan.events import step_time
from hpcmlp.plan.machine import Machine, Process
from hpcmlp.plan.workload import Workload
from hpcmlp.run.io_rates import forget
from hpcmlp.run.memory import held_bytes
from hpcmlp.sync import make_strategy, plan
from hpcmlp.sync.buckets import part_bounds
from hpcmlp.sync.step import Step
from hpcmlp.traffic import small_limit

ROWS = (16, 64, 256, 1024, 4096)
# Rows a power of two apart fall on the same lines of a cache: at 1024 small products can have half the rate of 720.
WIDTHS = (10, 64, 256, 720, 1024, 4096)
BLAS_ROWS, BLAS_WIDTH = (16, 4096), 1024    # of products that show the BLAS's buffers
MOST_ELEMENTS = 4096 * 4096     # of one matrix
MOST_FLOPS = 2.2e9      # of one product: larger ones are cut, longest side first, and taken to have the same rate
ELEMENTS = tuple(256 * n for n in (1, 8, 66, 528, 2112, 8448, 33792))   # no high powers of two, for the same reason
BYTES = (2**6, 2**10, 2**13, 2**16, 2**18, 2**20, 2**22, 2**24)
PART_BYTES = (2**10, 2**13, 2**16, 2**18, 2**20, 2**22, 2**23)
MESSAGE_BYTES, MOST_MESSAGE_BYTES = 1 << 21, 1 << 26     # of a rank's part of what shows MPI's buffers, of all of it
ENOUGH_S = 2e-3         # of calls to take a median of, three at least
FILE_BYTES = 1 << 25
SMALL, SMALL_ROWS = (256, 128, 10), 32  # a network and local batch whose step has much cost beside its operations
SPREAD_PRODUCT, SPREAD_CALLS = (64, 256, 256), 4096     # what ranks do at once to see how far their times are apart
SPREAD_WINDOWS = (1, 4, 16, 64, 256, 1024)              # calls that are added up to one time
COLD_BYTES = 1 << 23    # of arrays that take turns: what a step uses once is not in the nearest caches
WATCHED = 2             # ms between looks of a rank that sleeps while others measure


class Calibration:
    """The measurements, all of them collective over `topology.comm`.

    threads : BLAS threads of a rank. rounds : how often every rate is taken, far apart.
    directory : where a file is written and read to learn the file system's rates.
    """

    def __init__(self, topology: Topology, threads: int, directory: str, rounds: int):
        self.rounds = rounds
        self.topology, self.comm, self.threads, self.directory = topology, topology.comm, threads, directory
        self.ops = open_ops("cpu")
        self.process = Process(*(self._mean(value) for value in asdict(self._process()).values()))

    def run(self, name: str, source: str, watts: float | None, facts: dict[str, Any]) -> Machine:
        """Return the machine. Collective."""
        t = self.topology
        cores, busy = busy_ranks(t, self.threads)
        machine = Machine(name, source, cores, node_memory_bytes(), self.threads, busy, watts=watts, facts=facts)
        products, ops = {}, {}
        for measure, into in ((self._products, products), (self._passes, ops)):
            rounds: dict[int, list[Any]] = {1: [], busy: []}
            for _ in range(self.rounds):     # far apart, so that a disturbance meets one of them
                for count in sorted(rounds):
                    rounds[count].append(self._on(count, measure))
            for count, values in rounds.items():
                into[str(count)] = _medians(values)
        read, write = self._files()
        machine = replace(machine, products=products, ops=ops, node=self._node(), net=self._net(),
                          read_s_per_byte=read, write_s_per_byte=write, process_bytes=self.process.own,
                          shared_bytes=self.process.code, panel_bytes=self.process.row_bytes,
                          block_rows=self.process.block_rows, window_bytes=self.process.windows,
                          message_bytes=self.process.messages)
        input_s, row_s = self._input()
        machine = replace(machine, input_s=input_s, row_s=row_s, late_s=self._lateness(busy))
        return replace(machine, step_s={str(count): self._left_over(machine, count) for count in sorted({1, busy})})

    # ---- who measures

    def _on(self, count: int, measure: Callable[[], Any]) -> Any:
        """Return what `count` ranks of a node measure, as the mean over them; the others sleep."""
        mine = self.topology.local_rank < count
        values = measure() if mine else None
        self._sleep_until_all()
        flat = np.array(_numbers(values), np.float64) if mine else np.zeros(0)
        length = np.array([float(flat.size)])
        messages.max_in_place(self.comm, length)
        total = flat if mine else np.zeros(int(length[0]))
        weight = np.array([1.0 if mine else 0.0])
        messages.sum_in_place(self.comm, total)
        messages.sum_in_place(self.comm, weight)
        shape = values if mine else None
        return None if shape is None else _refill(shape, iter((total / weight[0]).tolist()))

    def _sleep_until_all(self) -> None:
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(1e-3 * WATCHED)

    def _mean(self, value: float) -> float:
        total = np.array([value])
        messages.sum_in_place(self.comm, total)
        return float(total[0]) / self.topology.size

    # ---- what a rank holds

    def _process(self) -> Process:
        """What a rank holds that has done all that training does, but for its arrays. Collective.

        Modules, HDF5 and MPI take theirs when they are used: so samples are read and steps taken before.
        """
        grown, row_bytes, block_rows = blas_buffers(self.ops)
        from hpcmlp.run import checkpoint, evaluation, forecast, judge  # noqa: F401  and all that they bring
        self._input()
        alone = self.topology.node.Split(self.topology.local_rank)
        self._small_step_s(alone)
        alone.Free()
        own, code = held_bytes()
        return Process(own - grown, code, row_bytes, block_rows, self._held_by(self._open_windows),
                       self._held_by(self._send_messages))

    def _held_by(self, action: Callable[[], None]) -> int:
        """By how many bytes this rank has grown after `action`, which leaves nothing of ours. Collective."""
        before = held_bytes()[0]
        action()
        messages.barrier(self.comm)     # shared memory counts by halves, once the others have touched it
        return max(0, held_bytes()[0] - before)

    def _open_windows(self) -> None:
        """Open and close the memory of every node, where some have several ranks."""
        if self.topology.local_sizes[1] > 1:
            with suppress(SharedUnavailable):
                make_collective("shared", self.topology).free()

    def _send_messages(self) -> None:
        """Send large messages inside nodes and between them."""
        for comm in (self.topology.node, self.topology.cross):
            ring = Ring(comm, small_bytes=0)
            array = ring.empty(min(MESSAGE_BYTES * ring.size, MOST_MESSAGE_BYTES) // 4, np.float32)
            bounds = part_bounds(array.size, ring.size)
            for _ in range(4):
                ring.reduce_scatter(array, bounds)
                ring.all_gather(array, bounds)
            ring.free()

    # ---- one rank

    def _products(self) -> dict[str, Any]:
        """Times of the three matrix products over the grid."""
        found: dict[str, Any] = {}
        pool, results = _pool(2 * MOST_ELEMENTS), np.full(2 * MOST_ELEMENTS, 0.0, np.float32)
        for name in ("forward", "weight", "input"):
            cache: dict[tuple, float] = {}
            found[name] = {"m": list(ROWS), "k": list(WIDTHS), "n": list(WIDTHS),
                           "s": [[[self._product(name, (m, k, n), cache, pool, results) for n in WIDTHS]
                                 for k in WIDTHS] for m in ROWS]}
        return found

    def _product(self, name: str, sizes: tuple[int, int, int], cache: dict[tuple, float], pool: np.ndarray,
                 results: np.ndarray) -> float:
        """Time of one product; its operands come from another place of `pool` in every call, as in a step."""
        m, k, n = taken = within_limit(sizes)
        if taken not in cache:
            left, right, out = {"forward": ((m, k), (n, k), (m, n)), "weight": ((m, n), (m, k), (n, k)),
                                "input": ((m, n), (n, k), (m, k))}[name]
            places = cycle(_places(pool, results, left, right, out))

            def action() -> None:
                a, b, c = next(places)
                if name == "forward":
                    self.ops.linear(a, b, None, c)
                elif name == "weight":
                    self.ops.linear_backward(a, b, None, c)
                else:
                    self.ops.linear_backward(a, None, b, None, c)

            cache[taken] = timed(action)
        return cache[taken] * (sizes[0] * sizes[1] * sizes[2]) / (m * k * n)

    def _passes(self) -> dict[str, list[list[float]]]:
        """Times of all other operations over the number of elements."""
        tables: dict[str, list[list[float]]] = {}
        for elements in ELEMENTS:
            for name, action in self._actions(elements).items():
                tables.setdefault(name, []).append([elements, timed(action)])
        return tables

    def _actions(self, n: int) -> dict[str, Callable[[], Any]]:
        ops = self.ops
        a, b, c, d = (np.full(n, 0.01, np.float32) for _ in range(4))
        wide = min(256, n)
        square = [array.reshape(-1, wide) for array in (a, b, c)]
        bias, bias2 = np.zeros(wide, np.float32), np.zeros(wide, np.float32)
        logits, dlogits = (array[:n // 8 * 8].reshape(-1, 8) for array in (a, b))
        labels = np.zeros(len(logits), np.int32)
        random = np.random.default_rng(n)
        out = np.zeros((max(1, n // SOURCE_WIDTH), min(SOURCE_WIDTH, n)), np.float32)
        rows = cycle([random.integers(0, ROWS_OF_SOURCE, len(out)) for _ in range(16)])
        state = cycle([(a, b, c, d), *(tuple(np.full(n, 0.01, np.float32) for _ in range(4))
                                       for _ in range(min(64, COLD_BYTES // (16 * n))))])
        source = np.zeros((ROWS_OF_SOURCE, out.shape[1]), np.float32)
        pixels = np.zeros((ROWS_OF_SOURCE, out.shape[1]), np.uint8)
        mask = np.zeros(square[0].shape, np.bool_)
        mean, rstd = np.zeros(len(square[0]), np.float32), np.ones(len(square[0]), np.float32)
        relu, gelu = "relu", "gelu"
        return {
            "gather": lambda: ops.gather(source, next(rows), out),
            "gather_uint8": lambda: ops.gather(pixels, next(rows), out),
            "bias_identity": lambda: ops.bias_activation("identity", square[0], bias, square[0]),
            "bias_relu": lambda: ops.bias_activation(relu, square[0], bias, square[0]),
            "relu_backward": lambda: ops.activation_backward(relu, square[0], square[1], None, square[0], bias2),
            "bias_gelu": lambda: ops.bias_activation(gelu, square[0], bias, square[1]),
            "gelu_backward": lambda: ops.activation_backward(gelu, square[0], square[1], square[1], square[2], bias2),
            "column_sum": lambda: ops.column_sum(square[0], bias2),
            "softmax_cross_entropy": lambda: ops.loss("softmax_cross_entropy", logits, labels, None, dlogits),
            "mean_squared": lambda: ops.loss("mean_squared", logits, dlogits, None, dlogits),
            "layer_norm": lambda: ops.layer_norm(square[0], bias, bias, square[1], mean, rstd),
            "layer_norm_backward": lambda: ops.layer_norm_backward(square[0], square[1], bias, mean, rstd, square[2],
                                                                  bias2, bias2),
            "dropout_mask": lambda: ops.dropout_mask(mask, 0.5, 0, 0, 0, 0),
            "dropout": lambda: ops.dropout(square[0], mask, 0.5, square[1]),
            "add": lambda: np.add(a, b, a),
            "finite": lambda: ops.finite(a), "sum_squares": lambda: ops.sum_squares(a),
            "adam": lambda: ops.adam(*next(state), 1e-3, 0.9, 0.999, 1e-8, 0.0, False, 1, 1.0),
            "momentum": lambda: ops.sgd(*next(state)[:3], 1e-3, 0.9, 0.0, False, 0.0, 1.0, False),
            "ema": lambda: ops.ema(*next(state)[:2], 0.99), "copy": lambda: np.copyto(a, b)}

    # ---- ranks together

    def _node(self) -> dict[str, Any]:
        """Tables of what the ranks of a node do together."""
        t = self.topology
        if t.local_size == 1:
            return {}
        found = self._ring_tables(t.node, one_node=True)
        node = Topology(t.node)     # by itself: what goes between nodes is measured apart
        try:
            shared = make_collective("shared", node)
        except SharedUnavailable:
            node.free()
            return found
        tables: dict[str, Any] = {"shared_reduce": [], "shared_gather": []}
        words = np.zeros(9)
        for num_bytes in BYTES:
            elements = num_bytes // 4
            try:
                array, common = shared.empty(elements, np.float32), shared.common(elements, np.float32)
            except SharedUnavailable:   # all ranks stop at the same size
                break
            bounds = np.arange(node.size + 1) * elements // node.size
            tables["shared_reduce"].append([num_bytes, self._together(
                lambda a=array, b=bounds: shared.reduce_scatter(a, b, words), lambda a=array: a.fill(1.0), t.node)])
            tables["shared_gather"].append([num_bytes, self._together(
                lambda a=common, b=bounds: shared.all_gather(a, b), lambda: None, t.node)])
        shared.free()
        node.free()
        return found | (tables if tables["shared_gather"] else {})

    def _net(self) -> dict[str, Any]:
        """Tables of what one rank of every node does with the others'; then what latency, bytes and computing cost."""
        t = self.topology
        if t.num_nodes == 1:
            return {}
        found: dict[str, Any] = {}
        if t.local_rank == 0:
            found = self._ring_tables(t.cross, one_node=False)
            small, large = found["gather"][0], found["gather"][-1]
            found["latency_s"] = small[1]
            found["s_per_byte"] = (large[1] - small[1]) / (large[0] - small[0])
            found["cpu_s_per_byte"] = self._cpu_per_byte(t.cross)
        self._sleep_until_all()
        return found

    def _ring_tables(self, comm: Any, one_node: bool) -> dict[str, Any]:
        """Seconds of a hop of each half over the bytes of its part, and of one call of MPI."""
        size = comm.size
        found: dict[str, Any] = {"reduce": [], "gather": [], "together": []}
        ring = Ring(comm, small_bytes=0)
        words = np.zeros(9)
        for num_bytes in PART_BYTES:
            array = ring.empty(size * num_bytes // 4, np.float32)
            bounds = np.arange(size + 1) * (num_bytes // 4)
            halves = {"reduce": lambda a=array, b=bounds: ring.reduce_scatter(a, b, words),
                      "gather": lambda a=array, b=bounds: ring.all_gather(a, b)}
            for half, action in halves.items():
                seconds = self._together(action, lambda a=array: a.fill(1.0), comm)
                found[half].append([num_bytes, seconds / (size - 1)])
            ring.forget()
        ring.free()
        small = Ring(comm, small_bytes=2**30)
        for num_bytes in (8, 2**10, 2**13, small_limit(size, one_node)):
            array = np.zeros(num_bytes // 4, np.float32)
            found["together"].append([num_bytes, self._together(lambda a=array: small.all_reduce(a, words),
                                                                lambda a=array: a.fill(1.0), comm)])
        small.free()
        return found

    def _together(self, action: Callable[[], Any], prepare: Callable[[], Any], comm: Any = None) -> float:
        """Median time of what ranks do together, slowest rank; `prepare` before each call is not counted. Collective.

        The ranks meet before each call, so that a rank that comes late to one does not count there.
        """
        comm = comm or self.comm
        taken, begin = [], time.perf_counter()
        count = 4
        while len(taken) < count:
            prepare()
            messages.barrier(comm)
            start = time.perf_counter()
            action()
            taken.append(time.perf_counter() - start)
            if len(taken) == 3:     # all ranks take as many
                rest = np.array([(time.perf_counter() - begin) / 3])
                messages.max_in_place(comm, rest)
                count = int(min(60, max(6, 0.08 / rest[0])))
        slowest = np.array(taken[1:])
        messages.max_in_place(comm, slowest)
        return float(np.median(slowest))

    def _lateness(self, busy: int) -> list[list[float]]:
        """Mean seconds by which two ranks differ that compute the same at once, over the seconds that it takes.

        Of `busy` ranks of every node, which have a core each: to take turns is not to be late.
        """
        mine = self.topology.local_rank < busy
        comm = self.comm.Split(0 if mine else 1, self.comm.rank)
        table = self._spread_over(comm) if mine and comm.size > 1 else []
        self._sleep_until_all()
        comm.Free()
        return table

    def _spread_over(self, comm: Any) -> list[list[float]]:
        """What `_lateness` returns, of the ranks of `comm`, two at least. Collective over `comm`."""
        m, k, n = SPREAD_PRODUCT
        random = np.random.default_rng(0)
        x, w = (random.standard_normal(shape, dtype=np.float32) for shape in ((m, k), (n, k)))
        out, rounds = np.empty((m, n), np.float32), []
        for _ in range(self.rounds):
            times = np.empty(SPREAD_CALLS)
            self.ops.linear(x, w, None, out)
            messages.barrier(comm)
            for call in range(SPREAD_CALLS):
                begin = time.perf_counter()
                self.ops.linear(x, w, None, out)
                times[call] = time.perf_counter() - begin
            found = messages.all_gather_bytes(comm, times.tobytes())
            rounds.append(spread(np.frombuffer(b"".join(found)).reshape(comm.size, -1)))
        return np.median(rounds, axis=0).tolist()

    def _cpu_per_byte(self, comm: Any, num_bytes: int = 1 << 22) -> float:
        """Computing time of a byte that arrives and leaves while nobody waits for it by looking all the time."""
        out, into = np.zeros(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
        used = []
        for _ in range(5):
            messages.barrier(comm)
            begin = time.process_time()
            receive = comm.Irecv(into, (comm.rank - 1) % comm.size, 7)
            send = comm.Isend(out, (comm.rank + 1) % comm.size, 7)
            while not (receive.Test() and send.Test()):
                time.sleep(5e-4)
            used.append(time.process_time() - begin)
        return float(np.median(used)) / num_bytes

    # ---- files, input, fixed costs

    def _files(self) -> tuple[float, float]:
        """Seconds a byte of reading a file that is not cached, and of writing one through to the disk; one rank."""
        values = np.zeros(2)
        if self.topology.rank == 0:
            data = os.urandom(1 << 20) * (FILE_BYTES >> 20)
            with tempfile.NamedTemporaryFile(dir=self.directory) as file:
                begin = time.perf_counter()
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                values[1] = time.perf_counter() - begin
                forget(file.name)
                begin = time.perf_counter()
                with open(file.name, "rb", buffering=0) as again:
                    while again.read(1 << 22):
                        pass
                values[0] = time.perf_counter() - begin
        self._sleep_until_all()
        messages.sum_in_place(self.comm, values)
        return float(values[0]) / FILE_BYTES, float(values[1]) / FILE_BYTES

    def _input(self) -> tuple[float, float]:
        """Seconds of fetching a batch of no rows, and of each row, from a data set in memory."""
        with tempfile.TemporaryDirectory(dir=self.directory) as folder:
            total, width = 1 << 14, 4
            entry = write_shard(os.path.join(folder, shard_name("train", 0, 1)), np.zeros((total, width), np.float32),
                                np.zeros(total, np.int32), None, {"split": "train"})
            manifest = Manifest("calibration", "classification", width, "float32", [f"x{k}" for k in range(width)],
                                {"train": (entry,)}, ["a", "b"])
            seconds = []
            for rows in (16, 2048):
                loader = Loader(folder, manifest, "train", 0, 1, rows, verify=False)
                steps = min(256, loader.steps_per_epoch)
                taken = []
                for epoch in range(4):
                    begin = time.perf_counter()
                    for t in range(steps):
                        loader.batch(epoch, t)
                    taken.append((time.perf_counter() - begin) / steps)
                seconds.append(sorted(taken)[1])
                loader.close()
        row_s = max(0.0, (seconds[1] - seconds[0]) / (2048 - 16))
        return self._mean(max(0.0, seconds[0] - 16 * row_s)), self._mean(row_s)

    def _left_over(self, machine: Machine, count: int) -> float:
        """Seconds of a small real step that `count` ranks of a node take together, beside what is in the tables."""
        t = self.topology
        own = t.node.Split(max(0, t.local_rank - count + 1), t.local_rank)
        seconds = self._on(count, lambda: self._small_step_s(own))
        own.Free()
        if t.rank:
            return 0.0      # rank 0's machine is the one that is kept
        w = Workload(NetworkSpec(SMALL), count, count, SMALL_ROWS * count, optimizer="adam", sync="ring")
        bare = replace(machine, step_s=dict.fromkeys(("1", str(machine.busy)), 0.0), input_s=0.0, row_s=0.0)
        return max(0.0, seconds - step_time(w, bare).step_s)

    def _small_step_s(self, own: Any) -> float:
        """Median seconds of a small real step of the ranks of `own`. Collective over `own`."""
        spec, rows, size = NetworkSpec(SMALL), SMALL_ROWS, own.size
        ring = Ring(own, small_bytes=small_limit(size, True))
        network = Network(spec, self.ops, rows, ring.empty(spec.layout().size, np.float32),
                          ring.empty(spec.layout().size, np.float32))
        planned = plan(spec, ring, size, 1)
        strategy = make_strategy(False)(ring, planned.buckets, size, network.params, network.grads, self.ops)
        optimizer = make_optimizer("adam", self.ops, spec.layout(), strategy.ranges, np.float32)
        step = Step(network, Loss("softmax_cross_entropy"), optimizer, strategy, self.ops, rows=rows)
        random = np.random.default_rng(0)
        source, labels = np.zeros((ROWS_OF_SOURCE, SMALL[0]), np.float32), np.zeros(rows, np.int32)
        batches = [Batch(rows, 0, rows, source, random.integers(0, ROWS_OF_SOURCE, rows), labels, None)
                   for _ in range(16)]
        taken = []
        for number in range(300):
            begin = time.perf_counter()
            step.run(batches[number % 16], number, 1e-3)
            taken.append(time.perf_counter() - begin)
        ring.free()
        return float(np.median(taken[20:]))


ROWS_OF_SOURCE, SOURCE_WIDTH = 8192, 512


def _pool(elements: int) -> np.ndarray:
    """Random numbers: how much power, and so how fast a clock, products take depends on what they multiply."""
    return np.resize(np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32), elements)


def _places(pool: np.ndarray, results: np.ndarray, left: tuple, right: tuple, out: tuple) -> list[tuple]:
    """Triples of matrices of these shapes in different places, of COLD_BYTES together where they are small."""
    a, b, c = (rows * columns for rows, columns in (left, right, out))
    count = max(1, min(64, COLD_BYTES // (4 * (a + b + c)), pool.size // (a + b), results.size // c))
    return [(pool[k * (a + b):k * (a + b) + a].reshape(left), pool[k * (a + b) + a:(k + 1) * (a + b)].reshape(right),
             results[k * c:(k + 1) * c].reshape(out)) for k in range(count)]


def spread(times: np.ndarray) -> list[list[float]]:
    """Return [mean seconds, mean difference between two ranks, s] of what takes 1, 4, 16, ... calls.

    Local. times : (ranks, calls) seconds; two ranks at least.
    """
    size, calls = times.shape
    # Sorted, the k-th of P values is the greater one in k pairs and the lesser one in P - 1 - k.
    weights = 2 * np.arange(size) - size + 1
    table = []
    for window in SPREAD_WINDOWS:
        whole = calls // window * window
        sums = np.sort(times[:, :whole].reshape(size, -1, window).sum(axis=2), axis=0)
        apart = (weights @ sums).mean() / (size * (size - 1) / 2)
        table.append([float(sums.mean()), max(1e-9, float(apart))])
    return table


def within_limit(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the sizes of a product that is measured in the place of one of `sizes`: longest sides halved. Local."""
    sides = list(sizes)
    while 2.0 * sides[0] * sides[1] * sides[2] > MOST_FLOPS:
        longest = sides.index(max(sides))
        sides[longest] //= 2
    return sides[0], sides[1], sides[2]


def timed(action: Callable[[], Any], enough_s: float = ENOUGH_S) -> float:
    """Return the median seconds of a few calls; of short ones after a first one. Local."""
    begin = time.perf_counter()
    action()
    first = time.perf_counter() - begin
    taken = [first] if first > enough_s else []     # what caches held before is nothing to a long one
    while len(taken) < 3 or sum(taken) < enough_s:
        begin = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[len(taken) // 2]


def blas_buffers(ops: Any) -> tuple[float, float, float]:
    """Return by how much the BLAS's buffers have grown here, and `Process.row_bytes` and `Process.block_rows`.

    Local. To be called before any larger product: what has been used is kept.
    """
    def product(rows: int, width: int) -> int:
        x, w = np.ones((rows, width), np.float32), np.ones((width, width), np.float32)
        ops.linear(x, w, None, np.empty_like(x))
        del x, w
        return held_bytes()[0]

    begin = product(8, 8)
    low, high = (product(rows, BLAS_WIDTH) for rows in BLAS_ROWS)
    row_bytes = max(0.0, (high - low) / (BLAS_ROWS[1] - BLAS_ROWS[0]))
    block_rows = max(0.0, (low - begin) / row_bytes - BLAS_ROWS[0]) if row_bytes else 0.0
    return high - begin, row_bytes, block_rows


def busy_ranks(topology: Topology, threads: int) -> tuple[int, int]:
    """Return the cores of a node, and how many of its ranks have `threads` cores each, on all nodes alike.

    Collective over the topology's ranks; of several nodes the fewest cores and ranks count. Where the cores do not
    suffice, they are those that the ranks share: ranks that are bound to some say nothing of all there are.
    """
    usable = np.array([usable_cores(topology.node)])
    messages.min_in_place(topology.comm, usable)
    ranks, cores = topology.local_sizes[0], int(usable[0])
    busy = min(ranks, max(1, cores // threads))
    return cores if busy < ranks else node_cores(), busy


def node_cores() -> int:
    """Return the cores that this process's node has, or may use where a quota limits them. Local."""
    cores, quota = os.cpu_count() or 1, cpu_quota()
    return cores if quota is None else max(1, int(quota))


def node_memory_bytes() -> int:
    """Return the memory of this node, bytes. Local."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _medians(nests: list[Any]) -> Any:
    """One nest of the medians of several alike; None where there are none."""
    if nests[0] is None:
        return None
    table = np.array([_numbers(nest) for nest in nests])
    return _refill(nests[0], iter(np.median(table, axis=0).tolist()))


def _numbers(values: Any) -> list[float]:
    """All numbers in nested lists and dictionaries, in their order."""
    if isinstance(values, dict):
        return [n for value in values.values() for n in _numbers(value)]
    if isinstance(values, list):
        return [n for value in values for n in _numbers(value)]
    return [float(values)]


def _refill(shape: Any, numbers: Any) -> Any:
    """The same nest with the next numbers in it; whole numbers stay whole."""
    if isinstance(shape, dict):
        return {key: _refill(value, numbers) for key, value in shape.items()}
    if isinstance(shape, list):
        return [_refill(value, numbers) for value in shape]
    number = next(numbers)
    return round(number) if isinstance(shape, int) else number
