"""How long a step takes: an event model of the schedule that was recorded, on a machine's measured rates.

One rank's step is played through, operation by operation, as all ranks do the same: a clock for its computing thread,
one for the link, and when each message that was started has arrived. Buckets are sent in the order in which they were
started and wait for the link; what is waited for counts only as far as it has not arrived. A ring over P ranks takes
P - 1 hops, each of one part of the array; through node memory a node's ranks sum first and every local rank takes its
share between the nodes, all of them over the node's one link. A message that travels behind computing is looked after
every INTERVAL_S, so each of its hops waits half of that, and takes the computing time that moving its bytes costs.
Ranks do not take equally long, and all wait for the last one: by how much is read from the machine's measured spread
and grows with the logarithm of their number (`Machine.wait_s`).

Not in the model: other jobs on the network, contention in its switches.
"""

from dataclasses import dataclass, field

from hpcmlp import traffic
from hpcmlp.errors import ConfigError
from hpcmlp.plan.machine import Machine
from hpcmlp.plan.record import Op, Recording, Transfer, meeting, record
from hpcmlp.plan.workload import Workload
from hpcmlp.sync.overlap import INTERVAL_S

UPDATES = {"adam", "sgd", "momentum", "rmsprop", "ema"}


@dataclass
class StepTime:
    """The seconds of a step, and of its parts.

    `products`, `passes` (everything else over the rows), `update`, `comm`, `wait` (for late ranks), `input`, `fixed`.
    `hidden_s` are messages under way behind computing. `comm` is what the computing thread waits for or works on.
    """

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(
        ("products", "passes", "update", "comm", "wait", "input", "fixed"), 0.0))
    hidden_s: float = 0.0

    @property
    def step_s(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def computing_s(self) -> float:
        """Seconds in which the rank works on its own samples and parameters."""
        return sum(self.parts[name] for name in ("products", "passes", "update", "fixed"))

    @property
    def bound(self) -> str:
        """What most of the step is spent on: compute, memory, network, late ranks, input or fixed cost."""
        groups = {"compute": self.parts["products"], "memory": self.parts["passes"] + self.parts["update"],
                  "network": self.parts["comm"], "late ranks": self.parts["wait"],
                  "input": self.parts["input"], "fixed cost": self.parts["fixed"]}
        return max(groups, key=lambda name: groups[name])


def step_time(workload: Workload, machine: Machine, recording: Recording | None = None) -> StepTime:
    """Return the time of a steady step of `workload` on `machine`.

    Local. Raises ConfigError when the machine file lacks what the ranks' places need.
    """
    w = workload
    _check_levels(w, machine)
    recording = recording or record(w, links=machine.links)
    result = _Player(w, machine).play(recording)
    result.parts["fixed"] = machine.fixed_s(min(w.ranks, w.ranks_per_node))
    result.parts["input"] = machine.input_s + machine.row_s * w.local_rows
    if not w.staleness:     # out of step nobody waits for the last one
        together = w.local_steps if w.is_local else 1
        result.parts["wait"] = machine.wait_s(together * result.computing_s, w.workers) / together
    if w.is_local:
        result.parts["comm"] += sum(transfer_s(w, machine, half) for half in meeting(w)) / w.local_steps
    return result


def _check_levels(w: Workload, machine: Machine) -> None:
    if w.nodes > 1 and not machine.net:
        raise ConfigError(f"{w.ranks} ranks with {w.ranks_per_node} per node need {w.nodes} nodes, and {machine.name} "
                          "says nothing of links between nodes; calibrate on two nodes, or give --network.")
    if min(w.ranks, w.ranks_per_node) > 1 and not machine.node:
        raise ConfigError(f"{machine.name} was measured with one rank on a node and says nothing of several; calibrate "
                          "with as many ranks as a node is to have.")
    if w.sync == "shared" and min(w.ranks, w.ranks_per_node) > 1 and "shared_reduce" not in machine.node:
        raise ConfigError(f"{machine.name} had no room in /dev/shm when it was measured and says nothing of --sync "
                          "shared; give --sync ring, or calibrate again with more.")


class _Player:
    """Plays the events of a recording through."""

    def __init__(self, w: Workload, machine: Machine):
        self.w, self.machine = w, machine
        self.node_ranks = min(w.ranks, w.ranks_per_node)
        self.now = self.link_free = 0.0
        self.arrival: dict[int, float] = {}
        self.result = StepTime()

    def play(self, recording: Recording) -> StepTime:
        for events in (recording.first, recording.events):
            self.result = StepTime()
            for event in events:
                if isinstance(event, Op):
                    self._compute(event)
                else:
                    self._transfer(event)
        return self.result

    def _spend(self, part: str, seconds: float) -> None:
        self.now += seconds
        self.result.parts[part] += seconds

    def _compute(self, op: Op) -> None:
        part = "products" if op.product else "update" if op.name in UPDATES else "passes"
        self._spend(part, self.machine.op_s(op, self.node_ranks))

    def _transfer(self, event: Transfer) -> None:
        if event.action == "wait":
            arrived = self.arrival.pop(event.key, self.now)
            self._spend("comm", max(0.0, arrived - self.now))
            if event.half == "gather" and self._in_memory:
                self._spend("comm", self._meet_s())
        elif event.action == "run":
            self._spend("comm", transfer_s(self.w, self.machine, event))
        else:
            if event.half == "reduce" and self._in_memory:
                self._spend("comm", self.machine.between_s("node", "shared_reduce", 4 * event.elements))
            self._start(event)

    @property
    def _in_memory(self) -> bool:
        return self.w.sync == "shared" and self.node_ranks > 1

    def _meet_s(self) -> float:
        return self.machine.between_s("node", "shared_gather", 4)

    def _start(self, event: Transfer) -> None:
        """Queue a message on the link, and charge the computing that it takes."""
        hops, part, sharers = ring_shape(self.w, event)
        if not hops:
            self.arrival[event.key] = self.now
            return
        level = "net" if self.w.nodes > 1 else "node"
        size = traffic.part_bytes(part, self.w.wire) if event.half == "reduce" else self._gather_bytes(part)
        on_link = hops * _ring_hop_s(self.w, self.machine, event.half, size, sharers)
        cpu = 0.0
        if level == "net":
            cpu = hops * size * self.machine.net["cpu_s_per_byte"] * sharers
            if event.half == "reduce":
                cpu += hops * self.machine.op_s(Op("add", part), self.node_ranks)
        begin = max(self.now, self.link_free)
        self._spend("comm", cpu)
        self.link_free = begin + on_link + hops * INTERVAL_S / 2
        self.arrival[event.key] = self.link_free
        self.result.hidden_s += on_link

    def _gather_bytes(self, part: int) -> int:
        return traffic.part_bytes(part, self.w.wire)


def ring_shape(w: Workload, event: Transfer) -> tuple[int, int, int]:
    """Return (hops, elements of the largest part, ranks that share a link) of a ring collective of `w`. Local."""
    bounds = event.bounds
    part = int(max(bounds[1:] - bounds[:-1])) if bounds is not None else -(-event.elements // w.ranks)
    if w.sync == "shared":
        return w.nodes - 1, part, min(w.ranks, w.ranks_per_node)
    return w.ranks - 1, part, 1


def hop_s(machine: Machine, level: str, half: str, num_bytes: float, sharers: int) -> float:
    """Return the seconds of a hop: as measured, and what the other ranks on the same link take of it. Local."""
    alone = machine.between_s(level, half, max(num_bytes, 4))
    if level == "net" and sharers > 1:
        alone += (sharers - 1) * num_bytes * machine.net["s_per_byte"]
    return alone


def transfer_s(w: Workload, machine: Machine, event: Transfer) -> float:
    """Return the seconds of a collective that is waited for where it is called. Local."""
    if w.ranks == 1:
        return 0.0
    level = "net" if w.nodes > 1 else "node"
    num_bytes = 4 * event.elements
    if event.half == "sum":
        return _together_s(w, machine, level, 8)
    if w.sync == "server":
        return _served_s(w, machine, event, level, num_bytes)
    if w.sync == "shared" and min(w.ranks, w.ranks_per_node) > 1:
        on_node = machine.between_s("node", f"shared_{event.half}", num_bytes)
        if w.nodes == 1:
            return on_node
        return on_node + _ring_s(w, machine, event)
    limit = traffic.small_limit(w.ranks, w.nodes == 1)
    if event.half == "reduce" and w.wire == "float32" and num_bytes * traffic.REDUCE_SHARE <= limit:
        return _together_s(w, machine, level, num_bytes)
    return _ring_s(w, machine, event)


def _ring_s(w: Workload, machine: Machine, event: Transfer) -> float:
    hops, part, sharers = ring_shape(w, event)
    return hops * _ring_hop_s(w, machine, event.half, traffic.part_bytes(part, w.wire), sharers)


def _ring_hop_s(w: Workload, machine: Machine, half: str, num_bytes: float, sharers: int) -> float:
    """All hops of a ring take as long as the slowest: between nodes, or, where the ring passes there, inside one."""
    levels = ["net"] if w.nodes > 1 else []
    if w.nodes == 1 or w.sync != "shared" and w.ranks_per_node > 1:
        levels.append("node")
    return max(hop_s(machine, level, half, num_bytes, sharers) for level in levels)


def _together_s(w: Workload, machine: Machine, level: str, num_bytes: int) -> float:
    """One call of MPI: rounds that double, as measured between two, and everybody's bytes."""
    rounds = max(1, (w.ranks - 1).bit_length())
    small = machine.between_s(level, "together", 8)
    return rounds * small + max(0.0, machine.between_s(level, "together", num_bytes) - small) * (w.ranks - 1)


def _served_s(w: Workload, machine: Machine, event: Transfer, level: str, num_bytes: int) -> float:
    """A push or pull: every worker's numbers pass through each server's link, a slice at a time.

    In node memory a server adds workers x slice as a rank of `shared` adds ranks x its share, and a pull is a meeting.
    """
    if w.served_on_node and "shared_reduce" in machine.node:
        return machine.between_s("node", f"shared_{event.half}", num_bytes * w.workers / w.servers)
    slice_bytes = num_bytes / w.servers
    return w.workers * hop_s(machine, level, "reduce", slice_bytes, 1)


def evaluation_s(w: Workload, machine: Machine, rows: int) -> float:
    """Return the seconds in which the ranks take `rows` samples through the network once (inference). Local."""
    mine = -(-rows // w.ranks)
    ranks = min(w.ranks, w.ranks_per_node)
    at_once = max(1, min(w.network_rows, mine))
    seconds = 0.0
    for d_in, d_out in zip(w.spec.sizes, w.spec.sizes[1:], strict=False):
        seconds += machine.op_s(Op("forward", at_once * d_out, (at_once, d_in, d_out)), ranks)
        seconds += machine.op_s(Op(f"bias_{w.spec.activation}", at_once * d_out), ranks)
    return seconds * mine / at_once
