"""Predict for new rows, in input order, into one HDF5 file."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import hpcmlp
from hpcmlp.comm.agreement import agreed
from hpcmlp.comm.messages import broadcast_bytes, gather_bytes
from hpcmlp.comm.topology import Topology
from hpcmlp.config import PredictConfig
from hpcmlp.data.loader import Loader
from hpcmlp.data.manifest import FILE_NAME, read_manifest
from hpcmlp.data.preprocess import Preprocessor, Report
from hpcmlp.data.readers import open_table, probe_strangers
from hpcmlp.data.row_file import Field, RowWriter, check_new_file, lay_out, publish
from hpcmlp.errors import printable
from hpcmlp.launch import end_all
from hpcmlp.nn.losses import Loss
from hpcmlp.run.checkpoint import Model
from hpcmlp.run.evaluation import Inputs, check_fits, open_model, open_network
from hpcmlp.run.gpus import open_arithmetic
from hpcmlp.run.watchdog import Watchdog

MEMORY_BYTES = 1 << 30  # of a rank's samples of a data set directory; more are streamed


def main(config: PredictConfig, comm: Any) -> int:
    """Write the predictions of a run's model for INPUT. Collective over `comm`; returns 0, or raises HpcmlpError.

    The file appears whole under its name, or not at all.
    """
    topology = Topology(comm)
    with Watchdog(topology, config.watchdog, None, partial(end_all, comm)):
        _predict(config, comm)
    topology.free()
    return 0


def _predict(config: PredictConfig, comm: Any) -> None:
    with agreed(comm):
        if comm.rank == 0:
            check_new_file(config.out, config.force)
            if not (Path(config.input) / FILE_NAME).is_file():
                probe_strangers(config.input)
    model, flat = open_model(config.run, config.which, comm)
    with agreed(comm):
        rows = Rows(config, model, comm)
        outputs = Outputs(model)
    ops, note = open_arithmetic(config.device, comm)
    with agreed(comm):
        network = open_network(model, flat, ops, max(1, min(config.rows_per_batch, rows.own[1] - rows.own[0])))
    inputs = Inputs(network, ops, model.load_shift, model.load_scale)
    temporary, place = None, b""
    try:
        with agreed(comm):
            if comm.rank == 0:
                temporary, offsets = lay_out(config.out, outputs.fields(rows.num_rows), *describe(config, model))
                place = json.dumps([str(temporary), offsets]).encode()
        file, offsets = json.loads(broadcast_bytes(comm, place))
        with agreed(comm), RowWriter(file, config.out, offsets) as writer:
            for first, source, index in rows.blocks():
                _, logits = inputs.forward(source, index)
                for name, values in outputs.compute(logits):
                    writer.write(name, first, values)
            writer.sync()
        notes = gather_bytes(comm, json.dumps([rows.report.filled, rows.report.unknown, outputs.not_finite]).encode())
        with agreed(comm):
            if comm.rank == 0:
                publish(temporary, config.out, config.force)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    if comm.rank == 0:
        say(config, rows.num_rows, outputs, notes, note)


class Rows:
    """This rank's contiguous rows of the input, as blocks ready for `Inputs.forward`.

    Local. A data set directory is read through its loader (it must fit the model), files through the model's own
    preprocessing. `num_rows` counts the whole input, `own` is this rank's range of it, `report` what was filled.
    """

    def __init__(self, config: PredictConfig, model: Model, comm: Any):
        self.report = Report()
        self._block = config.rows_per_batch
        self._loader: Loader | None = None
        if (Path(config.input) / FILE_NAME).is_file():
            manifest = read_manifest(config.input)
            check_fits(model, manifest, config.input, config.run)
            self._loader = Loader(config.input, manifest, config.split, comm.rank, comm.size,
                                  memory_limit=MEMORY_BYTES)
            self.num_rows = self._loader.num_rows
        else:
            self._preprocessor = Preprocessor.from_dict(model.preprocessing)
            self._table = open_table(config.input, x=config.x, text=self._preprocessor.text_columns)
            self.num_rows = self._table.num_rows
        self.own = tuple(self.num_rows * r // comm.size for r in (comm.rank, comm.rank + 1))

    def blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (first row, source, index) in order. Local; raises DataError with row and column."""
        if self._loader is not None:
            for batch in self._loader.sequential(self._block):
                yield batch.first, batch.source, batch.index
            return
        for start in range(*self.own, self._block):
            raw = self._table.read(start, min(start + self._block, self.own[1]))
            x = self._preprocessor.transform(raw, self._table, start, self.report)
            yield start, x, np.arange(len(x))


class Outputs:
    """What logits become in the file: class names, probabilities or physical units.

    Local. `not_finite` counts rows whose outputs are not finite numbers.
    """

    def __init__(self, model: Model):
        self.loss, self.task, self.width = Loss(**model.loss), model.task, len(model.target_names)
        self.not_finite = 0
        self.levels = np.array(self.loss.options.get("quantiles", (0.5,)))
        names = [name.encode() for name in model.classes or ()]
        self._names = np.array(names, f"S{max(map(len, names), default=1) or 1}")
        scale, shift = model.target_scale or [1.0], model.target_shift or [0.0]
        self._scale, self._shift = (np.array(v, np.float64)[:, None] for v in (scale, shift))

    def fields(self, n: int) -> list[Field]:
        """Return name, shape and dtype of the data sets for n rows. Local."""
        k, number = self.width, np.dtype("<f4")
        if self.task == "classification":
            return [("label", (n,), np.dtype("<i4")), ("probability", (n, len(self._names)), number),
                    ("label_name", (n,), self._names.dtype)]
        if self.task == "multilabel":
            return [("probability", (n, k), number)]
        # physical units may stand far from 0, where float32 has few digits
        fields = [("prediction", (n, k), np.dtype("<f8"))]
        if self.loss.kind == "quantile":
            fields.append(("quantile", (n, k, len(self.levels)), np.dtype("<f8")))
        return fields

    def compute(self, logits: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Return the rows of every data set. Local. logits : (n, outputs) on the host."""
        self.not_finite += len(logits) - int(np.isfinite(logits).all(axis=1).sum())
        with np.errstate(invalid="ignore", over="ignore"):  # such rows are counted, and said at the end
            made = self._make(logits)
        return [(name, np.asarray(values, dtype)) for (name, _, dtype), values in
                zip(self.fields(0), made, strict=True)]

    def _make(self, logits: np.ndarray) -> list[np.ndarray]:
        outputs = self.loss.prediction(logits, self.task)
        if self.task == "multilabel":
            return [outputs]
        if self.task == "classification":
            # by the logits, as in the evaluation: probabilities may round to a tie
            label = logits.argmax(axis=1) if logits.shape[1] > 1 else (logits[:, 0] > 0).astype(np.int32)
            return [label, outputs, self._names[label]]
        values = outputs.reshape(len(logits), self.width, -1) * self._scale + self._shift  # (n, k, quantiles)
        middle = values[:, :, int(np.abs(self.levels - 0.5).argmin())]
        return [middle, values] if self.loss.kind == "quantile" else [middle]


def describe(config: PredictConfig, model: Model) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return the attributes of the file (where the predictions come from) and its small data sets of names. Local."""
    attributes = {"hpcmlp_version": hpcmlp.__version__, "run": os.path.abspath(config.run), "step": model.step,
                  "parameters_sha256": model.parameters_sha256, "task": model.task,
                  "input": os.path.abspath(config.input)}
    if model.loss["kind"] == "quantile":
        attributes["quantiles"] = np.array(model.loss["quantiles"], np.float64)
    if model.task == "classification":
        return attributes, {"classes": model.classes}
    return attributes, {"target_names": model.target_names}


def say(config: PredictConfig, num_rows: int, outputs: Outputs, notes: list[bytes], gpu_note: str) -> None:
    """Print what was written and what the user should know about it. Local."""
    names = ", ".join(name for name, _, _ in outputs.fields(0))
    print(printable(f"{config.out}: {num_rows:,} rows in input order: {names}"))
    if gpu_note:
        print(f"note: {gpu_note}")
    report, not_finite = Report(), 0
    for filled, unknown, bad in map(json.loads, notes):
        not_finite += bad
        for total, part in ((report.filled, filled), (report.unknown, unknown)):
            for key, count in part.items():
                total[key] = total.get(key, 0) + count
    for sentence in report.sentences():
        print(printable(f"note: {sentence}"))
    if not_finite:
        print(f"note: {not_finite} rows have outputs that are not finite numbers")
