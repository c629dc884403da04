"""Which runs are planned for a GPU as a list of launches, and the parts of such a run."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from hpcmlp.comm import open_exchange
from hpcmlp.comm.agreement import agreed, alike
from hpcmlp.errors import ConfigError
from hpcmlp.nn.layout import PaddedLayout, pad
from hpcmlp.nn.optimizers import HYPER
from hpcmlp.nn.planned import RULES, PlannedNetwork
from hpcmlp.ops import open_planned
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
    path, why = _path(c, parts.comm, device, parts.ops.identity)
    layout = parts.spec.layout(PaddedLayout)
    layout.size = pad(layout.size, PaddedLayout.WIDTH * topology.size)     # equal parts
    parts.exchange = open_exchange("ring" if path == "nccl" else parts.sync_name(), topology, layout.size, np.float32,
                                   own_params=c.full_update, overlap=False)
    bucket_mb = c.bucket_mb or STAGED_MB
    buckets = cut(layout.size, [0], 1, topology.size) if path == "nccl" else \
        cut_evenly(layout.size, bucket_mb, topology.size)
    parts.plan = Plan(buckets, None, False, bucket_mb)
    with agreed(parts.comm):
        target_width = 0 if m.task == "classification" else m.num_outputs
        params, grads = device.zeros(layout.size, np.float32), device.zeros(layout.size, np.float32)
        parts.strategy = make_strategy(c.full_update)(parts.exchange.collective, parts.plan.buckets, topology.size,
                                                      params, grads, parts.ops,
                                                      (parts.exchange.params, parts.exchange.grads))
        # Of a batch's rows the ranks' shares differ by one at most.
        parts.network = network = PlannedNetwork(
            parts.spec, parts.loss, device, parts.loader.local_rows_max, c.optimizer, HYPER[c.optimizer] | parts.hyper,
            precision=c.precision, target_width=target_width, clip_norm=c.clip_norm, average=c.ema, seed=c.seed,
            ranges=parts.strategy.ranges, params=params, grads=grads, layout=layout)
        samples = _samples(parts, device, target_width)
    gpus = open_collectives(parts.comm, device, layout.size // topology.size) if path == "nccl" else None
    steps = PlannedSteps(network, samples, parts.loader.order, parts.schedule.lr, topology.rank, topology.size,
                         path != "host", gpus)
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
            f"gradients through host memory ({why}{_not_used()})"
    text = f"samples {'sent batch by batch' if steps.fed else 'on the device'}, {text}"
    average = None if network.averaged is None else SimpleNamespace(array=network.averaged)
    parts.session = Session(parts.comm, network, parts.strategy, SimpleNamespace(state=network.state), average)
    return OnDevice(device, steps, text)


def _not_used() -> str:
    """Who claims that messages could go straight from GPU memory: see `run.device_messages` for why they do not."""
    from hpcmlp.run.device_messages import claims, mapped_mpi
    said = claims(mapped_mpi())
    return f"; not straight from GPU memory, though {', '.join(said)} claims that MPI can" if said else ""


def _samples(parts: Any, device: Any, target_width: int) -> DeviceSamples | FedSamples:
    """The samples in the device's memory, or where they do not fit, or come in windows, two places for batches."""
    m, resident = parts.manifest, parts.loader.resident
    if resident is not None and resident.samples.nbytes <= device.free_bytes:
        return DeviceSamples(device, resident.samples, resident.shards, m.load_shift, m.load_scale)
    return FedSamples(device, parts.network.capacity, np.dtype(m.x_dtype), m.num_features, target_width, m.weighted,
                      m.load_shift, m.load_scale)


def _path(config: Any, comm: Any, device: Any, identity: str) -> tuple[str, str]:
    """Return "alone", "nccl" or "host", and why not by NCCL. Collective; raises ConfigError where it was asked for."""
    if comm.size == 1:
        return "alone", ""
    sync = config.sync
    if sync not in ("auto", "nccl") or config.full_update:
        return "host", "--full-update" if config.full_update else f"--sync {sync}"
    from hpcmlp.comm.nccl import own_gpus
    why = own_gpus(comm, identity, device.has_nccl)
    if why and sync == "nccl":
        raise alike(ConfigError(f"--sync nccl cannot work here: {why}; start one rank per GPU, or use --sync auto."))
    if sync == "auto" and not device.prefers_nccl:
        return "host", "the device is emulated"
    return ("host", why) if why else ("nccl", "")


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
