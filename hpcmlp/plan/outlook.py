"""A run foretold as a whole: demand, time, energy, curves and advice as plain values, which text and JSON both show."""

from typing import Any

from hpcmlp.plan import demand, scaling
from hpcmlp.plan.events import evaluation_s, step_time
from hpcmlp.plan.machine import Machine
from hpcmlp.plan.record import record
from hpcmlp.plan.workload import Workload

INFERENCE_ROWS = 4096   # that predict and evaluate take through the network at once
TIME_MARGIN = 1.3       # of a time limit over the foretold time, and
TIME_MARGIN_S = 300.0   # what is added for a queue's slow start, and for saving at the end


def outlook(w: Workload, machine: Machine | None, data_on_disk: int = 0, watts: float | None = None) -> dict[str, Any]:
    """Return what a run of `w` needs, and on a known machine how long it takes.

    Local. Raises ConfigError when the machine file lacks what the ranks' places need.
    """
    recording = record(w, links=machine.links if machine else None)
    found = demand.memory(w, recording, machine.process if machine else None)
    values = {"network": list(w.spec.sizes), "ranks": w.ranks, "ranks_per_node": min(w.ranks, w.ranks_per_node),
              "nodes": w.nodes, "sync": w.sync, "wire": w.wire, "global_batch_size": w.global_batch_size,
              "local_batch_size": w.local_rows, "steps": w.steps, "steps_per_epoch": w.steps_per_epoch,
              **demand.summary(w, recording, found, data_on_disk), "inference": _inference(w, machine)}
    if machine is None:
        return values
    found_time = step_time(w, machine, recording)
    run_s = _run_s(w, machine, found_time.step_s, values["storage_bytes"]["checkpoint"])
    values |= {"machine": machine.name, "machine_source": machine.source, "step_s": found_time.step_s,
               "step_parts_s": found_time.parts, "bound": found_time.bound, "hidden_s": found_time.hidden_s,
               "epoch_s": found_time.step_s * w.steps_per_epoch, **run_s,
               "samples_per_s": w.batch_rows / found_time.step_s}
    units = w.ranks * (1 if w.device == "gpu" else machine.threads)
    values["gpu_hours" if w.device == "gpu" else "core_hours"] = units * values["run_s"] / 3600
    power = watts or machine.watts
    values["energy_kwh"] = None if power is None else power * units * values["run_s"] / 3.6e6
    return values


def curves(w: Workload, machine: Machine, per_node: int, up_to: int, efficiency: float) -> dict[str, Any]:
    """Return strong and weak scaling, the best rank counts, and what would help most. Local."""
    counts = scaling.rank_counts(up_to, w.ranks)
    strong = scaling.curve(w, machine, counts, per_node, weak=False)
    weak = scaling.curve(w, machine, counts, per_node, weak=True)
    return {"strong": [vars(p) for p in strong], "weak": [vars(p) for p in weak],
            "best": scaling.best(strong, efficiency), "advice": scaling.advice(w, machine, step_time(w, machine))}


def _run_s(w: Workload, machine: Machine, step_s: float, checkpoint_bytes: int) -> dict[str, float]:
    """Seconds of the whole run and of its parts: start with reading, steps, validations, saves."""
    epochs = w.steps / w.steps_per_epoch
    start = machine.start_s + demand.data_bytes(w) * machine.read_s_per_byte
    validations = max(0.0, epochs // w.validate_every) * evaluation_s(w, machine, w.rows[1]) if w.rows[1] else 0.0
    test = evaluation_s(w, machine, w.rows[2]) if w.rows[2] else 0.0
    every = w.checkpoint_every or w.steps_per_epoch
    saves = -(-w.steps // every) * checkpoint_bytes * machine.write_s_per_byte
    parts = {"start_s": start, "steps_s": w.steps * step_s, "validation_s": validations + test, "saves_s": saves}
    return {"run_s": sum(parts.values()), "run_parts_s": parts,
            "time_limit_s": TIME_MARGIN * sum(parts.values()) + TIME_MARGIN_S}


def _inference(w: Workload, machine: Machine | None) -> dict[str, Any]:
    """What using the model needs: on one rank, rows as `predict` takes them."""
    _, params = demand.count_params(w)
    rows = INFERENCE_ROWS
    process = machine and machine.process or demand.PROCESS
    held = 4 * params + 4 * rows * sum(w.spec.sizes) + process.own + process.code
    values: dict[str, Any] = {"flops_per_sample": demand.forward_flops(w), "model_bytes": 4 * params,
                              "memory_bytes": int(held)}
    if machine is not None:
        alone = scaling.on_ranks(w, 1, 1, rows)
        seconds = evaluation_s(alone, machine, rows)
        values |= {"samples_per_s_per_rank": rows / seconds, "s_per_million": 1e6 * seconds / rows}
    return values
