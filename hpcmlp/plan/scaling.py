"""Scaling curves over rank counts, the best of them, and what would help most: the event model asked many times."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hpcmlp.errors import ConfigError
from hpcmlp.plan.events import StepTime, step_time
from hpcmlp.plan.machine import Machine
from hpcmlp.plan.workload import Workload

LEAST_GAIN = 0.02       # of a step's time: less is not worth a line


@dataclass(frozen=True)
class Point:
    """One rank count of a curve: seconds a step, samples/s, and efficiency against one rank."""

    ranks: int
    global_batch_size: int
    step_s: float
    samples_per_s: float
    efficiency: float
    bound: str


def rank_counts(up_to: int, also: int = 1) -> list[int]:
    """Return the powers of two up to `up_to`, and `also`. Local."""
    counts = {1 << k for k in range(up_to.bit_length()) if 1 << k <= up_to}
    return sorted(counts | {also})


def on_ranks(w: Workload, ranks: int, per_node: int, weak_rows: int | None = None) -> Workload:
    """Return `w` on `ranks` ranks; with `weak_rows` samples for each rank instead of the given global batch. Local."""
    placed = replace(w, ranks=ranks, ranks_per_node=min(ranks, per_node), servers=min(w.servers, ranks))
    if weak_rows is not None:
        placed = replace(placed, global_batch_size=weak_rows * ranks, rows=(0, 0, 0), shard_rows=())
    return placed


def curve(w: Workload, machine: Machine, counts: list[int], per_node: int, weak: bool) -> list[Point]:
    """Return the curve over `counts`: strong (one global batch) or weak (one local batch). Local.

    Counts that the machine file says nothing about, and that leave ranks without samples, are left out.
    """
    points: list[Point] = []
    alone: StepTime | None = None
    local = w.local_rows
    for ranks in counts:
        placed = on_ranks(w, ranks, per_node, local if weak else None)
        if placed.batch_rows < ranks:
            break
        try:
            found = step_time(placed, machine)
        except ConfigError:
            continue
        alone = alone or found
        ideal = alone.step_s if weak else alone.step_s / ranks
        points.append(Point(ranks, placed.global_batch_size, found.step_s, placed.batch_rows / found.step_s,
                            ideal / found.step_s, found.bound))
    return points


def best(points: list[Point], efficiency: float) -> dict[str, Any]:
    """Return the rank counts of the shortest step, and the greatest that keeps `efficiency`. Local."""
    fast = min(points, key=lambda p: (p.step_s, p.ranks))
    good = [p for p in points if p.efficiency >= efficiency]
    return {"shortest": fast.ranks, "shortest_step_s": fast.step_s,
            "efficient": max(good, key=lambda p: p.ranks).ranks if good else 1, "efficiency": efficiency}


def changes(w: Workload) -> Iterator[tuple[str, str, Workload]]:
    """Yield (option, what it costs, the workload with it) for what might shorten the run. Local."""
    many = w.ranks > 1
    messages = many and (w.nodes > 1 or w.sync == "ring")
    if messages and w.wire == "float32" and w.sync in ("ring", "shared"):
        yield "--wire bf16", "gradients and parameters rounded on the wire", replace(w, wire="bf16")
        yield "--wire int8", "coarser rounding on the wire", replace(w, wire="int8")
    if many and w.full_update:
        yield "--no-full-update", "", replace(w, full_update=False)
    if many and w.sync in ("ring", "native", "server") and w.ranks_per_node > 1:
        yield "--sync shared", "room in /dev/shm", replace(w, sync="shared", servers=1)
    if many and w.sync == "server":
        yield "--sync ring", "", replace(w, sync="ring", servers=1)
    if many and not w.is_local and w.sync != "server":
        yield "--local-steps 8", "replicas drift apart between meetings", replace(w, local_steps=8)
    double = 2 * w.global_batch_size
    if not w.rows[0] or double <= w.rows[0]:
        yield f"--global-batch-size {double}", "half as many updates an epoch", replace(w, global_batch_size=double)
    if many and w.ranks // 2 >= 1:
        yield f"--ranks {w.ranks // 2}", "fewer ranks", on_ranks(w, w.ranks // 2, w.ranks_per_node)


def advice(w: Workload, machine: Machine, now: StepTime) -> list[dict[str, Any]]:
    """Return what would shorten an epoch, most first, as plain values; `gain` is the share of the time saved. Local."""
    found = []
    for option, cost, changed in changes(w):
        try:
            then = step_time(changed, machine)
        except ConfigError:
            continue
        before, after = now.step_s / w.batch_rows, then.step_s / changed.batch_rows
        gain = 1.0 - after / before
        core_gain = 1.0 - after * changed.ranks / (before * w.ranks)
        if gain >= LEAST_GAIN or (option.startswith("--ranks") and gain > -LEAST_GAIN):
            found.append({"option": option, "gain": gain, "core_hours_gain": core_gain, "cost": cost})
    return sorted(found, key=lambda entry: -entry["gain"])
