"""A machine in numbers: what `bench --calibrate` measured, as a small JSON file, and how times are read from it.

Rates are tables: of matrix products over a grid of three sizes, of everything else over the number of elements or
bytes. Between entries logarithms are interpolated; beyond the last one time grows as the work does. Every table exists
for one busy rank on a node and for as many as were measured, as ranks share memory and clock.
"""

import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hpcmlp.data.files import write_atomically
from hpcmlp.errors import ConfigError, InputMissing
from hpcmlp.plan.record import Op

FORMAT = "hpcmlp-machine-1"
LIMIT_BYTES = 1 << 22
PRODUCTS = ("forward", "weight", "input")
# What was not measured is like what was.
LIKE = {"bias_leaky_relu": "bias_relu", "leaky_relu_backward": "relu_backward", "identity_backward": "add",
        "binary_cross_entropy": "softmax_cross_entropy", "mean_absolute": "mean_squared", "huber": "mean_squared",
        "quantile": "mean_squared", "sgd": "add", "rmsprop": "adam", "checksum": "sum_squares", "scale": "add",
        "add_scaled": "add", "decode_add": "adam", **{f"bias_{kind}": "bias_gelu" for kind in
                                ("silu", "elu", "selu", "tanh", "sigmoid", "softplus")},
        **{f"{kind}_backward": "gelu_backward" for kind in ("silu", "elu", "selu", "tanh", "sigmoid", "softplus")}}

Table = list[list[float]]    # [size, seconds], ascending sizes
BLAS_MOST_ROWS = 16384       # of a panel, about


@dataclass(frozen=True)
class Process:
    """What a rank holds beside its arrays.

    Attributes
    ----------
    own, code : bytes of a rank (interpreter, modules, MPI), and of the code that a node's ranks have in common.
    row_bytes, block_rows : of the BLAS's own buffers, see `blas_bytes`.
    windows, messages : what MPI takes for itself in a rank that opens its node's memory, and in one that sends large
        messages.
    """

    own: float
    code: float
    row_bytes: float = 0.0
    block_rows: float = 0.0
    windows: float = 0.0
    messages: float = 0.0

    def blas_bytes(self, products: Iterable[tuple[int, int, int]]) -> float:
        """Return the bytes into which the BLAS copies operands of `products`, and which it keeps.

        Local. A product is (m, k, n): an (m, n) result, sums over k. After K. Goto, R. van de Geijn, "Anatomy of
        high-performance matrix multiplication", ACM Trans. Math. Softw. 34 (2008), as OpenBLAS has it: sums are cut to
        `row_bytes` / 4 terms; copied are a block of one operand, of `block_rows` columns of the result, and, where
        there are more columns, of the other operand all rows of the result.
        """
        block = panel = 0.0
        for m, k, n in products:
            depth = 4 * _cut(k, self.row_bytes / 4)
            block = max(block, depth * _cut(n, self.block_rows))
            if n > self.block_rows:
                panel = max(panel, depth * min(m, BLAS_MOST_ROWS))
        return block + panel


def _cut(size: int, most: float) -> float:
    """The longest piece of `size` in pieces of `most`; what is not twice as long is cut into halves."""
    return size if size <= most else -(-size // 2) if size < 2 * most else most


@dataclass(frozen=True)
class Machine:
    """A machine's rates.

    Attributes
    ----------
    name, source : what it is, and who says so (a measurement with its date, or a published figure).
    cores, memory_bytes : of a node. threads : BLAS threads of a rank while it was measured.
    busy : ranks of a node that were measured together, no more than have a core. The tables of `products` and `ops` are
        by "1" and str(busy).
    products : per busy count, per kind of product: {"m", "k", "n": ascending sizes, "s": seconds [m][k][n]}.
    ops : per busy count, per operation a table over elements.
    node : tables over bytes between ranks of a node: "reduce" and "gather", one hop of the ring; "together", one call
        of MPI; "shared_reduce" and "shared_gather", through node memory. Empty where one rank was measured.
    net : between nodes: "reduce", "gather" and "together" likewise, "latency_s", "s_per_byte" of a node's link, and
        "cpu_s_per_byte", the computing time that a byte takes away. Empty where one node was measured.
    step_s : what a step costs beside what is in the tables, per busy count.
    late_s : a table over seconds of computing: by how much the times of two ranks that do the same differ, in the mean.
        Empty where no two ranks had a core each.
    input_s, row_s : of fetching a batch, and of each of its rows.
    start_s : until the first step. read_s_per_byte, write_s_per_byte : of the file system.
    process_bytes, shared_bytes : what a rank holds beside its arrays: alone, and in common with the node's others (code
        of libraries). panel_bytes, block_rows : of the BLAS's own buffers (`Process.row_bytes`, `Process.block_rows`).
    window_bytes, message_bytes : of MPI's own, for node memory and for messages (`Process.windows`, `.messages`).
    watts : power per core (or GPU) in use, None where nobody said.
    """

    name: str
    source: str
    cores: int = 1
    memory_bytes: int = 0
    threads: int = 1
    busy: int = 1
    products: dict[str, Any] = field(default_factory=dict)
    ops: dict[str, dict[str, Table]] = field(default_factory=dict)
    node: dict[str, Any] = field(default_factory=dict)
    net: dict[str, Any] = field(default_factory=dict)
    step_s: dict[str, float] = field(default_factory=lambda: {"1": 0.0})
    late_s: Table = field(default_factory=list)
    input_s: float = 0.0
    row_s: float = 0.0
    start_s: float = 0.0
    read_s_per_byte: float = 0.0
    write_s_per_byte: float = 0.0
    process_bytes: float = 0.0
    shared_bytes: float = 0.0
    panel_bytes: float = 0.0
    block_rows: float = 0.0
    window_bytes: float = 0.0
    message_bytes: float = 0.0
    watts: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)     # versions and what else a reader may want; not used

    def op_s(self, op: Op, ranks: int) -> float:
        """Return the seconds of an operation where `ranks` ranks of the node are busy. Local."""
        if op.product is not None:
            return self._between(ranks, lambda tables: product_s(tables[op.name], op), self.products)
        name = op.name
        for _ in range(3):
            if name in self.ops["1"]:
                break
            name = LIKE.get(name, "adam")
        return self._between(ranks, lambda tables: look_up(tables[name], op.elements), self.ops)

    def _between(self, ranks: int, read: Any, by_busy: dict[str, Any]) -> float:
        """Between one busy rank and all that were measured; more ranks than cores take turns."""
        one = read(by_busy["1"])
        all_busy = read(by_busy[str(self.busy)])
        share = 0.0 if self.busy == 1 else min(1.0, (ranks - 1) / (self.busy - 1))
        return (one + share * (all_busy - one)) * self._turns(ranks)

    def _turns(self, ranks: int) -> float:
        """How many times as long ranks compute that take turns on the cores."""
        return max(1.0, ranks * self.threads / max(self.cores, 1))

    def fixed_s(self, ranks: int) -> float:
        """Return what a step costs beside its operations where `ranks` ranks of a node take it. Local."""
        return (self.step_s["1"] if ranks == 1 else self.step_s[str(self.busy)]) * self._turns(ranks)

    def wait_s(self, computing_s: float, ranks: int) -> float:
        """Return how much later than the mean rank the last of `ranks` is that compute `computing_s`. Local.

        Times are taken to have an exponential tail: then two of them differ by its mean, and the greatest of P is
        1/2 + 1/3 + ... + 1/P such means above the mean.
        """
        if not self.late_s:
            return 0.0
        return look_up(self.late_s, computing_s) * sum(1.0 / k for k in range(2, ranks + 1))

    def between_s(self, level: str, table: str, num_bytes: float) -> float:
        """Return the seconds of one hop, or one call, of `num_bytes` bytes on the level "node" or "net". Local."""
        return look_up((self.node if level == "node" else self.net)[table], num_bytes)

    @property
    def process(self) -> Process | None:
        """What ranks hold beside their arrays, as `demand.memory` takes it; None where it is not known."""
        return Process(self.process_bytes, self.shared_bytes, self.panel_bytes, self.block_rows, self.window_bytes,
                       self.message_bytes) if self.process_bytes else None

    @property
    def links(self) -> tuple[float, float] | None:
        """(latency s, s per byte) between nodes, None where they were not measured."""
        return (self.net["latency_s"], self.net["s_per_byte"]) if self.net else None


def look_up(table: Table, size: float) -> float:
    """Return the seconds at `size`: between entries by logarithms, below the first constant, above in proportion.

    Local.
    """
    if size <= table[0][0]:
        return table[0][1]
    last_size, last_s = table[-1]
    if size >= last_size:
        return last_s * size / last_size
    k = bisect_right(table, size, key=lambda entry: entry[0]) - 1
    (a, s), (b, t) = table[k], table[k + 1]
    share = math.log(size / a) / math.log(b / a)
    return s * (t / s) ** share


def product_s(grid: dict[str, Any], op: Op) -> float:
    """Return the seconds of a matrix product: its operations at a rate between those of the grid around it. Local."""
    axes = [_place(grid[name], size) for name, size in zip("mkn", op.product, strict=True)]
    logarithm = 0.0
    for i, u in axes[0]:
        for j, v in axes[1]:
            for k, w in axes[2]:
                if u * v * w:
                    flops = 2.0 * grid["m"][i] * grid["k"][j] * grid["n"][k]
                    logarithm += u * v * w * math.log(flops / grid["s"][i][j][k])
    return op.flops / math.exp(logarithm)


def _place(sizes: list[int], size: int) -> list[tuple[int, float]]:
    """The two entries around `size` with their shares by logarithms; the outermost one beyond the ends."""
    if size <= sizes[0]:
        return [(0, 1.0)]
    if size >= sizes[-1]:
        return [(len(sizes) - 1, 1.0)]
    k = bisect_right(sizes, size) - 1
    share = math.log(size / sizes[k]) / math.log(sizes[k + 1] / sizes[k])
    return [(k, 1.0 - share), (k + 1, share)]


def write_machine(path: str | os.PathLike, machine: Machine) -> None:
    """Write `machine` as JSON, atomically. Local; raises CannotWrite."""
    text = json.dumps({"format": FORMAT, **asdict(machine)}, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def read_machine(path: str | os.PathLike) -> Machine:
    """Return the machine of a file that `write_machine` wrote.

    Local. Raises InputMissing when it cannot be read, ConfigError when it is something else.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise InputMissing(f"{path}: cannot read this machine file ({error.strerror}); make one with 'hpcmlp bench "
                           "--calibrate FILE' on the machine, or name a built-in profile.") from None
    return machine_from_text(data, os.fspath(path))


def machine_from_text(data: bytes, path: str) -> Machine:
    """Return the machine that `data`, the bytes of the file `path`, describe. Local. Raises ConfigError."""
    try:
        values = json.loads(data)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"it is not of the format {FORMAT}")
        known = {f.name for f in fields(Machine)}
        machine = Machine(**{key: value for key, value in values.items() if key in known})
        _check(machine)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a machine file of this version ({error}); make one with 'hpcmlp bench "
                          "--calibrate FILE'.") from None
    return machine


def _check(machine: Machine) -> None:
    """Raise ValueError or KeyError where a table is missing, unordered or holds what is no time."""
    for busy in {"1", str(machine.busy)}:
        for name in PRODUCTS:
            grid = machine.products[busy][name]
            times = [s for plane in grid["s"] for row in plane for s in row]
            if len(times) != len(grid["m"]) * len(grid["k"]) * len(grid["n"]) or not all(s > 0 for s in times):
                raise ValueError(f"the products {name!r} are not whole")
        tables = [*machine.ops[busy].items()]
        tables += [(f"{level} {name}", table) for level in ("node", "net")
                   for name, table in getattr(machine, level).items() if isinstance(table, list)]
        tables += [("late_s", machine.late_s)] if machine.late_s else []
        for name, table in tables:
            sizes = [entry[0] for entry in table]
            if not table or sizes != sorted(set(sizes)) or not all(s > 0 for _, s in table):
                raise ValueError(f"the table {name!r} is not whole")
        if "adam" not in machine.ops[busy]:
            raise ValueError("the table 'adam' is missing")
        if not machine.step_s[busy] >= 0:
            raise ValueError("step_s is no time")
