"""Foretell what a training run needs and how long it takes, before it is submitted; needs no MPI."""

import json
import os
from dataclasses import fields
from typing import Any

from hpcmlp.config import PlanConfig, TrainConfig, flag
from hpcmlp.data.files import write_atomically
from hpcmlp.data.manifest import Manifest, ShardEntry, read_manifest
from hpcmlp.errors import ConfigError, Unavailable
from hpcmlp.nn.network import NetworkSpec
from hpcmlp.nn.optimizers import HYPER
from hpcmlp.plan import fit, job, text
from hpcmlp.plan.events import step_time
from hpcmlp.plan.machine import Machine
from hpcmlp.plan.outlook import curves, outlook
from hpcmlp.plan.profiles import find_machine
from hpcmlp.plan.workload import Workload, from_options
from hpcmlp.run.options import check_fits, chosen, make_loss

MADE_UP_SHARDS = 8
MADE_UP_CLASSES = 10
ROW_BYTES_ON_DISK = 4   # of an input
NOT_OF_A_JOB = {"data", "out", "resume", "machine", "network", "time_limit"}    # options that a script sets by itself


def main(config: PlanConfig, comm: Any) -> int:
    """Print the plan of the run that `config` describes. Local, without `comm`; returns 0, or raises HpcmlpError."""
    manifest, on_disk = _data(config)
    check_fits(config, manifest, config.ranks)
    machine = find_machine(config.machine, config.network)
    per_node = config.ranks_per_node or (max(1, machine.cores // machine.threads) if machine else config.ranks)
    workload = _workload(config, manifest, machine, per_node)
    found = outlook(workload, machine, on_disk, config.watts)
    scaling = curves(workload, machine, per_node, config.up_to, config.efficiency) if machine else None
    missing = fit.shortage(workload, machine.memory_bytes, "a node", machine.process) \
        if machine and machine.memory_bytes else ""
    found["fits"] = None if machine is None else not missing
    if config.json:
        print(json.dumps({**found, **({"scaling": scaling} if scaling else {})}))
    else:
        print("\n".join(text.lines(found) + (text.curve_lines(scaling) if scaling else [])))
    for line in _files(config, machine, found, scaling):
        if not config.json:
            print(line)
    if missing:
        raise Unavailable(f"This run does not fit: {missing}")
    return 0


def _data(config: PlanConfig) -> tuple[Manifest, int]:
    """Return the manifest of the data set, or one as --rows and --features make it up, and its bytes on disk."""
    given = [name for name in ("rows", "features", "classes") if getattr(config, name) is not None]
    if config.data is not None and config.rows is None and config.features is None:
        if given:
            raise ConfigError(f"{flag(given[0])} has no effect beside --data; give --rows and --features instead.")
        manifest = read_manifest(config.data)
        return manifest, sum(entry.bytes for entries in manifest.splits.values() for entry in entries)
    if config.rows is None or config.features is None:
        raise ConfigError("plan needs a data set (--data DIR), or --rows and --features (and --classes).")
    count = min(max(MADE_UP_SHARDS, config.ranks), config.rows)     # so that ranks need not hold each other's rows
    bounds = [config.rows * k // count for k in range(count + 1)]
    bytes_a_row = ROW_BYTES_ON_DISK * (config.features + 1)
    shards = tuple(ShardEntry(f"train-{k:05d}-of-{count:05d}.h5", bounds[k + 1] - bounds[k],
                              bytes_a_row * (bounds[k + 1] - bounds[k]), "0" * 64) for k in range(count))
    classes = [str(k) for k in range(config.classes or MADE_UP_CLASSES)]
    counts = {"train": [max(1, config.rows // len(classes))] * len(classes)}
    manifest = Manifest("made up", "classification", config.features, "float32", [], {"train": shards}, classes,
                        class_counts=counts)
    return manifest, config.rows * bytes_a_row


def _workload(config: PlanConfig, manifest: Manifest, machine: Machine | None, per_node: int) -> Workload:
    """The workload, with "auto" resolved as the run will, or between nodes by the times foretold."""
    loss = make_loss(config, manifest)
    spec = NetworkSpec((manifest.num_features, *config.hidden, loss.num_outputs(manifest.task, manifest.num_outputs)),
                       config.activation, config.dropout, config.layer_norm, config.residual)
    hyper = chosen(config, f"--optimizer {config.optimizer}", HYPER[config.optimizer], HYPER)

    def with_sync(sync: str) -> Workload:
        return from_options(config, manifest, spec, loss.kind, hyper, config.ranks, per_node, sync)

    if config.sync != "auto":
        return with_sync(config.sync)
    first = with_sync("shared" if min(config.ranks, per_node) > 1 else "ring")
    if first.nodes == 1 or machine is None or config.wire != "float32" or first.sync == "ring":
        return first
    return min(first, with_sync("ring"), key=lambda w: step_time(w, machine).step_s)


def _files(config: PlanConfig, machine: Machine | None, found: dict, scaling: dict | None) -> list[str]:
    """Write what was asked for, and return the lines that say so."""
    lines = []
    if config.picture:
        from hpcmlp.plan.picture import draw
        if scaling is None:
            raise ConfigError("--picture draws times, which need --machine.")
        sentence = draw(scaling, found, config.picture)
        if sentence:
            raise ConfigError(sentence)
        lines.append(f"wrote {config.picture}")
    if config.write_job:
        threads = machine.threads if machine else 1
        script = job.fill_in(job.template(config.device), found, threads, config.device, config.data, config.out,
                             _options(config))
        write_atomically(config.write_job, script.encode())
        os.chmod(config.write_job, 0o755)
        lines.append(f"wrote {config.write_job}: sbatch {config.write_job}")
    return lines


def _options(config: PlanConfig) -> list[str]:
    """The options of train that differ from their defaults, as words of a command line."""
    words = []
    for f in fields(TrainConfig):
        value = getattr(config, f.name)
        if f.name in NOT_OF_A_JOB or value == f.default or value is None:
            continue
        if f.metadata["kind"] is bool:
            words.append(flag(f.name) if value else flag("no_" + f.name))
        else:
            words.append(f"{flag(f.name)} {','.join(map(str, value)) or 'none' if isinstance(value, tuple) else value}")
    return words
