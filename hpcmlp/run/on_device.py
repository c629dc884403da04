"""Which runs are planned for a GPU as a list of launches, and the parts of such a run."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from hpcmlp.comm import open_direct, open_exchange
from hpcmlp.comm.agreement import agreed, alike
from hpcmlp.errors import ConfigError
from hpcmlp.nn.layout import PaddedLayout, pad
from hpcmlp.nn.optimizers import HYPER
from hpcmlp.nn.planned import RULES, PlannedNetwork
from hpcmlp.ops import open_planned
from hpcmlp.ops.device import DirectOps
from hpcmlp.run.session import Session
from hpcmlp.sync import STAGED_MB, Plan, make_strategy
from hpcmlp.sync.buckets import cut, cut_evenly
from hpcmlp.sync.device_step import AloneStep, StagedStep, TogetherStep
from hpcmlp.sync.planned import DeviceSamples, FedSamples, PlannedSteps


def why_not(config: Any, spec: Any) -> str:
    """Return what of the options keeps a run from being planned for a device, or an empty text. Local."""
    reasons = {"--layer-norm": spec.layer_norm, "--residual": spec.residual,
               f"--optimizer {config.optimizer}": config.optimizer not in RULES,
               "--accumulate": config.accumulate > 1, "--local-steps": config.local_steps > 1,
               "--outer-optimizer": config.outer_optimizer != "none", "--sync server": config.sync == "server",
               f"--wire {config.wire}": config.wire != "float32", "--overlap": bool(config.overlap),
               "--trace": config.trace, "--elastic": config.elastic, "--shard params": config.shard == "params",
               "--recompute": bool(config.recompute),
               "--on-nonfinite rollback": config.on_nonfinite == "rollback"}
    return next((name for name, holds in reasons.items() if holds), "")


class OnDevice:
    """The device of a run, and what to say about it.

    device : that of this rank. steps : `sync.planned.PlannedSteps`. path : between the ranks, for people.
    """

    def __init__(self, device: Any, steps: PlannedSteps, path: str):
        self.device, self.steps, self._path = device, steps, path

    def describe(self) -> str:
        """Return a few words for the header of a run. Local."""
        network = self.steps.network
        notes = f" ({'; '.join(network.notes)})" if network.notes else ""
        return f"{self.device.name}: planned steps in {network.precision}, {self._path}{notes}"


def plan_on_device(parts: Any) -> OnDevice:
    """Make network, collectives, strategy, step and session of a run on a device, as attributes of `parts`.

    Collective. Raises Unavailable, on all ranks, where the device lacks something.
    """
    c, m, topology = parts.config, parts.manifest, parts.topology
    with agreed(parts.comm):
        device = open_planned(parts.ops)
    layout = parts.spec.layout(PaddedLayout)
    layout.size = pad(layout.size, PaddedLayout.WIDTH * topology.size)     # equal parts
    ops = DirectOps(parts.ops.xp, parts.ops.identity, parts.ops.number)
    path, why = _open_path(parts, device, layout.size, ops)
    bucket_mb = c.bucket_mb or STAGED_MB
    # What nothing is copied beside is one message.
    buckets = cut(layout.size, [0], 1, topology.size) if path == "nccl" or path == "direct" and not c.bucket_mb else \
        cut_evenly(layout.size, bucket_mb, topology.size)
    parts.plan = Plan(buckets, None, False, bucket_mb)
    with agreed(parts.comm):
        target_width = 0 if m.task == "classification" else m.num_outputs
        params, grads = device.zeros(layout.size, np.float32), device.zeros(layout.size, np.float32)
        parts.strategy = make_strategy(c.full_update)(parts.exchange.collective, parts.plan.buckets, topology.size,
                                                      params, grads, ops if path == "direct" else parts.ops,
                                                      (parts.exchange.params, parts.exchange.grads))
        # Of a batch's rows the ranks' shares differ by one at most.
        parts.network = network = PlannedNetwork(
            parts.spec, parts.loss, device, parts.loader.local_rows_max, c.optimizer, HYPER[c.optimizer] | parts.hyper,
            precision=c.precision, target_width=target_width, clip_norm=c.clip_norm, average=c.ema, seed=c.seed,
            ranges=parts.strategy.ranges, params=params, grads=grads, layout=layout)
        samples = _samples(parts, device, target_width)
    gpus = open_collectives(parts.comm, device, layout.size // topology.size) if path == "nccl" else None
    steps = PlannedSteps(network, samples, parts.loader.order, parts.schedule.lr, topology.rank, topology.size,
                         path in ("alone", "nccl"), gpus)
    network.set_params(layout.pack(parts.spec.layout().views(parts.initial_parameters())))

    def due(number: int) -> bool:
        return _is_due(parts, number)

    if path == "alone":
        parts.step, text = AloneStep(steps, due), "whole steps on the device"
    elif path == "nccl":
        parts.step, text = TogetherStep(steps, due, parts.comm, parts.ops), "whole steps on the devices, by NCCL"
        parts.exchange.name = "nccl"
    else:
        parts.step, text = StagedStep(steps, parts.strategy, parts.ops, c.clip_norm), \
            f"gradients {'straight from GPU' if path == 'direct' else 'through host'} memory ({why})"
    text = f"samples {'sent batch by batch' if steps.fed else 'on the device'}, {text}"
    average = None if network.averaged is None else SimpleNamespace(array=network.averaged)
    parts.session = Session(parts.comm, network, parts.strategy, SimpleNamespace(state=network.state), average)
    return OnDevice(device, steps, text)


def _samples(parts: Any, device: Any, target_width: int) -> DeviceSamples | FedSamples:
    """The samples in the device's memory, or where they do not fit, or come in windows, two places for batches."""
    m, resident = parts.manifest, parts.loader.resident
    if resident is not None and resident.samples.nbytes <= device.free_bytes:
        return DeviceSamples(device, resident.samples, resident.shards, m.load_shift, m.load_scale)
    return FedSamples(device, parts.network.capacity, np.dtype(m.x_dtype), m.num_features, target_width, m.weighted,
                      m.load_shift, m.load_scale)


def _open_path(parts: Any, device: Any, size: int, ops: DirectOps) -> tuple[str, str]:
    """Open the collectives of vectors of `size` elements; return "alone", "nccl", "direct" or "host", and why that.

    Collective; raises ConfigError where what was asked for cannot be. The first in this order is taken.
    """
    c, topology = parts.config, parts.topology
    why = _why_not_nccl(c, parts.comm, device, ops.identity) if topology.size > 1 else ""
    if why and c.sync in ("auto", "direct"):
        said = _open_direct(parts, device, size, ops)
        if parts.exchange is not None:
            return "direct", f"{why}; {said}"
        if c.sync == "direct":
            raise alike(ConfigError(f"--sync direct cannot work here: {said}; use --sync auto."))
        why += f"; {said}" if said else ""
    own = "ring" if c.sync in ("nccl", "direct") or not why and topology.size > 1 else parts.sync_name()
    parts.exchange = open_exchange(own, topology, size, np.float32, own_params=c.full_update, overlap=False)
    return ("alone" if topology.size == 1 else "host" if why else "nccl"), why


def _open_direct(parts: Any, device: Any, size: int, ops: DirectOps) -> str:
    """Open the ring over device memory, where that is proven, else None, as the exchange; return why. Collective."""
    from hpcmlp.run.device_messages import may_send, why_wrong
    topology, parts.exchange = parts.topology, None
    good, why = may_send(parts.comm, topology.num_nodes, ops.number, parts.config.sync == "direct")
    if good:
        exchange = open_direct(topology, size, np.float32, ops.sums)
        wrong = why_wrong(exchange.collective, device)
        if wrong:
            exchange.collective.free()
            return f"not straight from GPU memory: {why}, but {wrong} between the ranks"
        parts.exchange = exchange
    return why


def _why_not_nccl(config: Any, comm: Any, device: Any, identity: str) -> str:
    """Return why not, "" where steps go by NCCL. Collective; raises ConfigError where it was asked for."""
    sync = config.sync
    if sync not in ("auto", "nccl") or config.full_update:
        return "--full-update" if config.full_update else f"--sync {sync}"
    from hpcmlp.comm.nccl import own_gpus
    why = own_gpus(comm, identity, device.has_nccl)
    if why and sync == "nccl":
        raise alike(ConfigError(f"--sync nccl cannot work here: {why}; start one rank per GPU, or use --sync auto."))
    if sync == "auto" and not device.prefers_nccl:
        return "the device is emulated"
    return why


def open_collectives(comm: Any, device: Any, part: int) -> Any:
    """Return the collectives that are captured into steps: NCCL's, on the emulated device their stand-in.

    Collective over `comm`. part : elements of a rank's part of the flat vectors.
    """
    from hpcmlp.comm.nccl import Nccl, OverHost
    return Nccl(comm, device.stream, part) if device.prefers_nccl else OverHost(comm, part)


def _is_due(parts: Any, number: int) -> bool:
    """Whether the results of step `number` are wanted right after it."""
    c, done = parts.config, number + 1
    return (done % c.log_every == 0 or done % parts.steps_per_epoch == 0 or done == parts.total_steps
            or done % (c.checkpoint_every or parts.steps_per_epoch) == 0
            or bool(c.print_every) and done % c.print_every == 0)
