"""What a run demands: parameters, floating-point operations, memory, storage and traffic, from the recorded step.

Memory counts what is touched: arrays that the code makes and uses, as the recording counted them, the samples, and the
process itself. Traffic is that of the buckets as they are cut, by the rules of `hpcmlp.traffic`: exact, byte for byte.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcmlp import traffic
from hpcmlp.data.order import Order
from hpcmlp.nn.network import EVALUATION_ROWS
from hpcmlp.ops.activations import NEEDS_PRE
from hpcmlp.plan.machine import Process
from hpcmlp.plan.record import Op, Recording, Transfer, meeting
from hpcmlp.plan.workload import Workload
from hpcmlp.sync.buckets import part_bounds
from hpcmlp.sync.memory import buffer_elements

# Where no machine file says it: as measured with the wheels of MPICH, NumPy (OpenBLAS, AVX-512) and h5py.
PROCESS = Process(own=33e6, code=40e6, row_bytes=1792, block_rows=448, windows=2e6, messages=2e6)
# float32 that an operation reads and writes for each element of its main array; others 2.
MOVED = {"adam": 7, "momentum": 5, "rmsprop": 5, "finite": 1, "sum_squares": 1, "column_sum": 1, "checksum": 1,
         "add": 3, "ema": 3, "dropout": 2, "relu_backward": 3, "gelu_backward": 3}


@dataclass(frozen=True)
class Memory:
    """Bytes: `rank`, by part, of the rank that holds most; `node`, of all ranks of a node; and for a moment more.

    `copy` is what rank 0 keeps for saving, counted in the first node's `node`; `moment` is what validation, the
    final evaluation, or saving what a narrow wire carries, adds there while it lasts.
    """

    rank: dict[str, int]
    node: int
    copy: int
    moment: int

    @property
    def rank_bytes(self) -> int:
        """All parts of a rank together."""
        return sum(self.rank.values())


def count_params(w: Workload) -> tuple[list[int], int]:
    """Return the parameters of each layer, and of all. Local."""
    layers = w.spec.layer_params()
    return layers, sum(layers)


def forward_flops(w: Workload) -> int:
    """Return the floating-point operations of one sample's way through the network. Local."""
    return sum(2 * a * b for a, b in zip(w.spec.sizes, w.spec.sizes[1:], strict=False))


def moved_bytes(recording: Recording) -> int:
    """Return the bytes that a rank's step reads and writes at least, each operand of an operation once. Local."""
    total = 0
    for event in recording.events:
        if isinstance(event, Op):
            m, k, n = event.product or (0, 0, 0)
            total += 4 * (m * k + k * n + m * n) if event.product else 4 * MOVED.get(event.name, 2) * event.elements
    return total


def memory(w: Workload, recording: Recording, process: Process | None = None) -> Memory:
    """Return the memory of `w`, whose step was recorded. Local.

    process : what ranks hold beside their arrays (`Machine.process`), None: PROCESS.
    """
    process = PROCESS if process is None else process
    flat = recording.held["parameters"]
    local = min(w.ranks, w.ranks_per_node)
    owned = flat if w.whole else -(-flat // w.ranks)
    shared = w.sync == "shared" and not w.full_update or w.served_on_node
    rank = {"parameters": flat, "gradients": flat, "optimizer": recording.held.get("optimizer", 0),
            "activations": _activations(w, recording), "data": data_bytes(w), "messages": _messages(w, recording),
            "process": process.own + _blas_bytes(w, recording, process) + _mpi_bytes(w, process)}
    if w.rows[1]:
        rank["best state"] = owned
    if w.is_local:
        rank["where ranks last met"] = flat * (1 + w.outer)
    if _is_narrow(w):   # masters, then what is owed, for checkpoints
        rank["gathered for saving"] = flat
    common = flat if shared else 0
    if w.sharded:
        buffers = 4 * sum(buffer_elements(w.spec))
        rank |= {"parameters": owned, "gradients": owned, "gathered layers": buffers, "gradients of layers": buffers}
        common = buffers if shared else 0
    elif w.rows[1] and w.ema:
        rank["averaged network"] = flat + _evaluating(w)
    node = local * (sum(rank.values()) - common) + common + process.code
    if w.workers < w.ranks:
        server, worker = _server(w, rank, recording), _worker(w, rank)
        serve = min(local, w.servers)   # the first ranks do
        node = serve * sum(server.values()) + (local - serve) * sum(worker.values()) + process.code
        node -= (local - 1) * common
        rank = max(server, worker, key=lambda parts: sum(parts.values()))
    # Saved array by array where parameters are in slices.
    copy = 0 if w.sharded else flat * (1 + state_vectors(w) + w.ema + bool(w.rows[1]) + w.is_local * w.outer)
    moment = max(local * _moment(w, flat), 2 * flat * _is_narrow(w))    # rank 0 alone keeps what is carried
    return Memory({name: int(value) for name, value in rank.items() if value}, int(node + copy), copy, int(moment))


def _sends(w: Workload) -> bool:
    """Whether anything large goes in messages, not through a node's memory."""
    return not w.served_on_node and (w.nodes if w.sync == "shared" else w.ranks) > 1


def _is_narrow(w: Workload) -> bool:
    """Whether anything is rounded on its way: messages are, node memory is not."""
    return w.wire != "float32" and _sends(w)


def _mpi_bytes(w: Workload, process: Process) -> float:
    """What MPI takes for itself by the ways that the run uses."""
    in_memory = w.served_on_node or w.sync == "shared" and min(w.ranks, w.ranks_per_node) > 1
    return process.windows * in_memory + process.messages * _sends(w)


def _evaluation_rows(w: Workload, split: int) -> int:
    """Samples of split 1 (val) or 2 (test) that a rank takes through a network at once."""
    return min(EVALUATION_ROWS, -(-w.rows[split] // w.ranks))


def _evaluating(w: Workload) -> int:
    """Activations of a network for evaluation alone: of parameters that are not those in training."""
    return 4 * max(_evaluation_rows(w, 1), _evaluation_rows(w, 2)) * sum(w.spec.sizes[1:])


def _moment(w: Workload, flat: int) -> int:
    """What a rank adds while it evaluates: samples, and copies of the parameters to be judged with their network."""
    ends = w.spec.sizes[0] + w.spec.sizes[-1]
    validation, test = (4 * _evaluation_rows(w, split) * ends if w.rows[split] else 0 for split in (1, 2))
    test += -(-w.rows[2] // w.ranks) * w.row_bytes
    if w.sharded or not (w.rows[1] or w.ema):   # the network in training is the one that is judged
        return max(validation, test)
    if w.ema and w.rows[1]:     # its network is there since the first validation
        return flat + max(validation, test)
    return max(validation, flat + (flat + _evaluating(w) + test if w.rows[2] else 0))


def _blas_bytes(w: Workload, recording: Recording, process: Process) -> float:
    """The BLAS's buffers as the products of a step and of a validation leave them."""
    products = [_as_blas(event) for event in recording.events if isinstance(event, Op) and event.product]
    if rows := _evaluation_rows(w, 1):
        products += [(rows, k, n) for k, n in zip(w.spec.sizes, w.spec.sizes[1:], strict=False)]
    return process.blas_bytes(products)


def _as_blas(op: Op) -> tuple[int, int, int]:
    """Rows of a product's result, terms of a sum, columns of the result."""
    m, k, n = op.product
    return {"forward": (m, k, n), "weight": (n, m, k), "input": (m, n, k)}[op.name]


def state_vectors(w: Workload) -> int:
    """Return how many vectors of all parameters' length the optimizer keeps. Local."""
    own = {"adam": 2, "adamw": 2, "lamb": 2, "rmsprop": 1, "adagrad": 1, "lars": 1, "sgd": 0}[w.optimizer]
    return own + bool(w.hyper.get("momentum")) * (w.optimizer in ("sgd", "rmsprop"))


def _activations(w: Workload, recording: Recording) -> int:
    """Buffers as far as they are used: by the rows of a training batch or of a validation, in backward of the first."""
    micro = -(-w.local_rows // w.accumulate)
    # The gradient of one layer of one micro-batch, which is added to those before it.
    extra = 4 * max(stop - start for start, stop in w.spec.layer_spans()) if micro < w.local_rows else 0
    used = (recording.held.get("backward", 0) - extra) * micro / max(1, w.network_rows) + extra * (not w.sharded)
    kept = recording.held.get("activations", 0) * max(micro, _evaluation_rows(w, 1)) / max(1, w.network_rows)
    if w.recompute:
        needs_pre = w.spec.activation in NEEDS_PRE
        kept *= w.spec.kept_activations(needs_pre, w.spec.segments(needs_pre)) / w.spec.kept_activations(needs_pre)
    return int(kept + used + recording.held.get("input", 0))


def data_bytes(w: Workload) -> int:
    """Return the bytes of samples that rank 0 keeps: the shards that it touches, and its share of the others. Local."""
    val = _validation_bytes(w)
    if not w.shard_rows or not w.row_bytes:
        held = -(-w.rows[0] // w.workers) * w.row_bytes
    else:
        order = Order(list(w.shard_rows), w.global_batch_size, 0, True, None)
        held = sum(w.shard_rows[s] for s in order.touched(0, w.workers)) * w.row_bytes
    if w.memory_limit is not None:
        held = min(held, w.memory_limit)
    return held + val


def _validation_bytes(w: Workload) -> int:
    return min(-(-w.rows[1] // w.ranks) * w.row_bytes, w.memory_limit or math.inf)


def _messages(w: Workload, recording: Recording) -> int:
    """Work buffers of the ring or of ranks that all serve, and with a narrow wire what it keeps of every element."""
    size = w.nodes if w.sync == "shared" else w.ranks
    if size == 1 or w.sync == "native" or w.served_on_node:
        return 0
    if w.sync == "server":
        part = -(-recording.held["parameters"] // w.servers)
        return 2 * min(traffic.served_segment_bytes(w.ranks), part) * (w.workers - 1) if w.workers == w.ranks else 0
    if w.sharded:       # two segments for each shape of a layer in each of two buffers
        shapes = {(number % 2, stop - start) for number, (start, stop) in enumerate(w.spec.layer_spans())}
        segment = traffic.segment_bytes(w.nodes == 1, by_layer=True)
        return sum(2 * min(segment, 4 * -(-length // w.ranks)) for _, length in shapes)
    flat = recording.held["parameters"]
    share = flat // min(w.ranks, w.ranks_per_node) if w.sync == "shared" else flat
    buffers, segment = 0, traffic.segment_bytes(w.nodes == 1)
    for bucket in recording.planned.buckets:
        part = int(max(bucket.bounds[1:] - bucket.bounds[:-1]))
        buffers += 2 * min(segment, 4 * part)
    if w.wire != "float32":
        narrow = traffic.part_bytes(share // 4, w.wire)
        buffers += share + flat // w.ranks + narrow * (size - 1) // size + narrow
    return buffers


def _server(w: Workload, rank: dict[str, int], recording: Recording) -> dict[str, int]:
    """The parts of a rank that only serves: all state of its slice; it validates, and trains on nothing.

    From each worker it takes segments, of the first in place, or reads them in node memory; out of step it takes a
    whole slice, and gives one.
    """
    part = -(-rank["parameters"] // w.servers)
    segment = min(traffic.served_segment_bytes(w.ranks), part)
    taken = 2 * part * w.workers if w.staleness else 0 if w.served_on_node else 2 * segment * (w.workers - 1)
    forward = recording.held.get("activations", 0) * _evaluation_rows(w, 1) // max(1, w.network_rows)
    return {**rank, "optimizer": part * (state_vectors(w) + w.ema), "activations": forward,
            "data": _validation_bytes(w), "messages": taken, **({"best state": part} if w.rows[1] else {})}


def _worker(w: Workload, rank: dict[str, int]) -> dict[str, int]:
    """The parts of a rank that owns no slice; out of step it may be given any training rows, and has them all."""
    data = {"data": w.rows[0] * w.row_bytes + _validation_bytes(w)} if w.staleness else {}
    return {**rank, **data, "optimizer": 0, "best state": 0}


def storage(w: Workload, data_on_disk: int) -> dict[str, int]:
    """Return bytes on disk: the data set, a checkpoint, and all checkpoints that are kept. Local."""
    _, params = count_params(w)
    one = 4 * params * (1 + state_vectors(w) + w.ema + bool(w.rows[1]))
    return {"data": data_on_disk, "checkpoint": one, "checkpoints": one * (w.keep + bool(w.rows[1]))}


def sent_bytes(w: Workload, recording: Recording, rank: int = 0) -> int:
    """Return the bytes that `rank` hands to others in a step; exact, but for native and a server out of step.

    Local. Control words are included, but with a server. With shared they are those between nodes; a server on the node
    of its workers sends none. A call of the MPI library counts as what the rank gives it.
    """
    if w.is_local:
        return sum(_transfer_bytes(w, half, rank) for half in meeting(w)) // w.local_steps
    if w.sharded:
        return _sliced_bytes(w, rank)
    total = 0
    for event in recording.events:
        if isinstance(event, Transfer) and event.action != "wait":
            total += _transfer_bytes(w, event, rank)
    return total


def _transfer_bytes(w: Workload, event: Transfer, rank: int) -> int:
    size, one_node = w.ranks, w.nodes == 1
    if w.sync == "server":
        return _served_bytes(w, event, rank)
    if event.half == "sum":
        if w.sync == "shared":
            return traffic.together_sends(8, w.nodes)
        return traffic.together_sends(8, size)
    bounds = np.asarray(event.bounds)
    if w.sync == "shared":
        if one_node:
            return 0
        local, cross = rank % w.ranks_per_node, rank // w.ranks_per_node
        inner = bounds[local * w.nodes:(local + 1) * w.nodes + 1]
        size, rank, bounds, one_node = w.nodes, cross, inner - inner[0], False
    elements = int(bounds[-1] - bounds[0])
    small = event.half == "reduce" and w.wire == "float32" and event.action == "run" and \
        4 * elements * traffic.REDUCE_SHARE <= traffic.small_limit(size, one_node)
    if small and w.sync in ("ring", "shared"):
        return traffic.together_sends(4 * elements, size, event.words)
    if event.half == "reduce":
        return traffic.reduce_sends(bounds, rank, w.wire, event.words)
    return traffic.gather_sends(bounds, rank, w.wire)


def _served_bytes(w: Workload, event: Transfer, rank: int) -> int:
    """A push of the servers' slices, or a pull of one's own by all others."""
    if w.served_on_node:
        return 0
    if event.half == "sum":     # everybody's number to the server that owns it, and back
        return 8 * (w.ranks - 1 if rank == w.servers - 1 else 1)
    bounds = 4 * part_bounds(event.elements, w.servers)
    own = int(bounds[rank + 1] - bounds[rank]) if rank < w.servers else 0
    if event.half == "gather":
        return own * (w.ranks - 1)
    trains = w.workers == w.ranks or rank >= w.servers
    return (4 * event.elements - own) * trains


def _sliced_bytes(w: Workload, rank: int) -> int:
    """Layers gathered as forward and backward read them, and their gradients reduced, of each micro-batch."""
    needs_pre, total = w.spec.activation in NEEDS_PRE, 0
    order = w.spec.entries(w.spec.segments(needs_pre) if w.recompute else [0, w.spec.num_layers], needs_pre)
    entered = [layer for before, layer in zip([-1, *order], order, strict=False) if layer != before]
    for layer, (start, stop) in enumerate(w.spec.layer_spans()):
        bounds = part_bounds(stop - start, w.ranks).tolist()
        reduced, last = (Transfer("start", "reduce", bounds=bounds, words=words) for words in (0, 9 * (layer == 0)))
        gathered = entered.count(layer) * w.accumulate * _transfer_bytes(w, Transfer("start", "gather", bounds=bounds),
                                                                         rank)
        total += gathered + (w.accumulate - 1) * _transfer_bytes(w, reduced, rank) + _transfer_bytes(w, last, rank)
    return total + (_transfer_bytes(w, Transfer("run", "sum"), rank) if w.clip_norm is not None else 0)


def summary(w: Workload, recording: Recording, found: Memory, data_on_disk: int) -> dict[str, Any]:
    """Return all of it as plain values, for JSON. Local."""
    layers, total = count_params(w)
    moved = moved_bytes(recording)
    step = recording.flops * w.workers
    return {"parameters": total, "parameters_per_layer": layers, "flops_per_sample": recording.flops / w.local_rows,
            "flops_per_step": step, "flops_per_epoch": step * w.steps_per_epoch, "flops_per_run": step * w.steps,
            "inference_flops_per_sample": forward_flops(w), "intensity_flops_per_byte": recording.flops / moved,
            "memory_bytes_per_rank": found.rank_bytes, "memory_parts": found.rank, "memory_bytes_per_node": found.node,
            "memory_copy_bytes": found.copy,
            "memory_moment_bytes": found.moment, "storage_bytes": storage(w, data_on_disk),
            "sent_bytes_per_rank_and_step": sent_bytes(w, recording),
            "buckets": len(recording.planned.buckets), "overlap": recording.planned.overlap}
