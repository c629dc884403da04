"""Compute exact metrics over every sample of a split once."""

import sys
from functools import partial
from typing import Any

from hpcmlp.comm.agreement import agreed
from hpcmlp.comm.topology import Topology
from hpcmlp.config import EvaluateConfig
from hpcmlp.data.loader import Loader
from hpcmlp.launch import end_all
from hpcmlp.nn.losses import Loss
from hpcmlp.run.coordinator import open_dataset
from hpcmlp.run.directory import to_json
from hpcmlp.run.evaluation import check_fits, evaluate_split, open_model, open_network
from hpcmlp.run.gpus import open_arithmetic
from hpcmlp.run.watchdog import Watchdog

MEMORY_BYTES = 1 << 30  # of a rank's samples; more are streamed
CONFUSION_SHOWN = 20  # classes; a larger table is only in the JSON


def main(config: EvaluateConfig, comm: Any) -> int:
    """Evaluate the model of a run. Collective over `comm`; returns 0, or raises HpcmlpError. Writes no file."""
    topology = Topology(comm)
    with Watchdog(topology, config.watchdog, None, partial(end_all, comm)):
        _evaluate(config, comm)
    topology.free()
    return 0


def _evaluate(config: EvaluateConfig, comm: Any) -> None:
    model, flat = open_model(config.run, config.which, comm)
    directory = config.data or model.data
    manifest = open_dataset(comm, directory)
    with agreed(comm):
        check_fits(model, manifest, directory, config.run)
        loader = Loader(directory, manifest, config.split, comm.rank, comm.size, memory_limit=MEMORY_BYTES)
        loss = Loss(**model.loss)
    ops, note = open_arithmetic(config.device, comm)
    if note and comm.rank == 0:
        print(f"note: {note}", file=sys.stderr)
    max_rows = max(1, min(config.rows_per_batch, -(-loader.num_rows // comm.size)))
    with agreed(comm):
        network = open_network(model, flat, ops, max_rows)
    figures = evaluate_split(network, ops, loss, loader, comm, manifest, top_k=config.top_k)
    if comm.rank == 0:
        result = {"split": config.split, **figures, "run": config.run, "data": str(directory), "step": model.step,
                  "parameters_sha256": model.parameters_sha256}
        print(to_json(result) if config.json else table(result, manifest.name), flush=True)


def table(result: dict[str, Any], name: str) -> str:
    """Return the figures as text for people. Local."""
    lines = [f"{result['rows']:,} samples of {name}, split {result['split']}; model of {result['run']}, step "
             f"{result['step']}"]
    skipped = ("split", "rows", "run", "data", "step", "parameters_sha256", "confusion")
    plain = {k: v for k, v in result.items() if k not in skipped and not isinstance(v, dict)}
    width = max(map(len, plain))
    lines += [f"  {key.replace('_', ' '):<{width}}  {_number(value)}" for key, value in plain.items()]
    for what in ("classes", "labels", "outputs"):
        if what in result:
            lines += ["", *_columns(what, result[what])]
    if 0 < len(result.get("confusion", ())) <= CONFUSION_SHOWN:
        lines += ["", *_confusion(list(result["classes"]), result["confusion"])]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _columns(what: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """One line per class, label or output; quantiles in columns of their own."""
    flat = {name: _flatten(values) for name, values in rows.items()}
    keys = list(next(iter(flat.values())))
    cells = [[what, *(key.replace("_", " ") for key in keys)]]
    cells += [[name, *(_number(values[key]) for key in keys)] for name, values in flat.items()]
    return _aligned(cells)


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
    for level, figures in values.get("quantiles", {}).items():
        flat |= {f"{key} {level}": value for key, value in figures.items()}
    return flat


def _confusion(names: list[str], counts: list[list[int]]) -> list[str]:
    cells = [["target \\ prediction", *names]]
    cells += [[name, *map(str, row)] for name, row in zip(names, counts, strict=True)]
    return _aligned(cells)


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    return ["  " + "  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in
                             enumerate(zip(row, widths, strict=True))) for row in cells]
