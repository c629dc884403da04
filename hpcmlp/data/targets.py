"""Targets: what task they make, which classes they name, and how they stand in the shards."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcmlp.data.csv_numbers import parse_values
from hpcmlp.data.tables import Table, number_text
from hpcmlp.errors import ConfigError, DataError

_FEW = 100
_CLASS_LIMIT = 100_000


@dataclass(frozen=True)
class TargetFacts:
    """What the targets of some rows look like; merged over ranks before the task is chosen.

    `values`: distinct values of a single column in order, None when there are more than a class list may have.
    """

    rows: int
    width: int
    text: bool
    whole: bool
    binary: bool
    values: tuple | None

    def to_list(self) -> list[Any]:
        """Return JSON-able values for the way to other ranks. Local."""
        values = None if self.values is None else list(self.values)
        return [self.rows, self.width, self.text, self.whole, self.binary, values]

    @classmethod
    def merged(cls, parts: list[list[Any]]) -> "TargetFacts":
        """Return the facts of all ranks together, from their `to_list`. Local."""
        held = [p for p in parts if p[0]] or parts[:1]
        text = any(p[2] for p in held)
        values = None
        if all(p[5] is not None for p in held):
            union = set().union(*([_as_name(v) for v in p[5]] if text else p[5] for p in held))
            values = tuple(sorted(union)) if len(union) <= _CLASS_LIMIT else None
        return cls(sum(p[0] for p in parts), max(p[1] for p in parts), text, all(p[3] for p in held),
                   all(p[4] for p in held), values)


def _as_name(value: Any) -> str:
    return value if isinstance(value, str) else number_text(value)


def as_matrix(y: np.ndarray) -> np.ndarray:
    """Return targets as (n, k), also where n is 0. Local."""
    return y[:, None] if y.ndim == 1 else y


def missing_targets(y: np.ndarray) -> np.ndarray:
    """Return which rows have no target or NaN: (n,) bool. Local."""
    if y.dtype == object:
        lost = np.array([v is None for v in y.ravel()], bool).reshape(y.shape)
    elif y.dtype.kind == "f":
        lost = np.isnan(y)
    else:
        return np.zeros(y.shape[0], bool)
    return lost if y.ndim == 1 else lost.any(axis=1)


def describe_targets(y: np.ndarray) -> TargetFacts:
    """Return the facts of targets (n,) or (n, k) without missing ones. Local."""
    width = 1 if y.ndim == 1 else y.shape[1]
    if y.dtype == object:
        values = set(y.ravel().tolist())
        return TargetFacts(len(y), width, True, False, False, tuple(sorted(values)) if width == 1 else None)
    numbers = y.astype(np.float64) if y.dtype.kind != "f" else y
    whole = bool((np.isfinite(numbers) & (numbers == np.floor(numbers))).all())
    binary = bool(((numbers == 0) | (numbers == 1)).all())
    values = None
    if width == 1:
        distinct = np.unique(numbers)
        if distinct.size <= _CLASS_LIMIT and np.isfinite(distinct).all():
            values = tuple(distinct.tolist())
    return TargetFacts(len(y), width, False, whole, binary, values)


def choose_task(facts: TargetFacts) -> str:
    """Return the task that targets suggest: text or few whole numbers are classes, columns of 0 and 1 are labels.

    Local. Few: at most 100 values, and at most half as many as rows.
    """
    if facts.text:
        return "classification"
    if facts.width > 1:
        return "multilabel" if facts.binary else "regression"
    few = facts.values is not None and len(facts.values) <= min(_FEW, max(2, facts.rows // 2))
    return "classification" if facts.whole and few else "regression"


@dataclass(frozen=True)
class Targets:
    """How targets are encoded: int32 class numbers, or float32 (n, k) standardised numbers or labels 0 and 1.

    `classes` are names in the order of their numbers; numeric ones in numeric order. `shift`, `scale` (k,) are for
    regression: y_physical = y * scale + shift.
    """

    task: str
    names: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    shift: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None

    def encode(self, y: np.ndarray, table: Table, rows: np.ndarray | int = 0) -> np.ndarray:
        """Return (n,) int32 or (n, k) float32.

        Local. `rows`: numbers of the rows in `table`, or of the first. Raises DataError with row, value and range.
        """
        rows = np.arange(rows, rows + len(y)) if isinstance(rows, int) else rows
        lost = missing_targets(y)
        if lost.any():
            row = rows[int(lost.argmax())]
            raise DataError(f"{table.where(int(row))}: target {', '.join(self.names)} is missing or NaN; fill it, "
                            "remove the row, or prepare with --missing drop.")
        if self.task == "classification":
            return self._encode_classes(y, table, rows)
        if y.dtype == object:
            y = _target_numbers(y, self.task, table, rows)
        values = as_matrix(y).astype(np.float64)
        if values.shape[1] != len(self.names):
            raise DataError(f"{table.name}: has {values.shape[1]} targets; {len(self.names)} are expected.")
        wrong = ~np.isfinite(values) if self.task == "regression" else (values != 0) & (values != 1)
        if wrong.any():
            row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
            legal = "finite" if self.task == "regression" else "0 or 1"
            raise DataError(f"{table.where(int(rows[row]))}: target {self.names[column]} is {values[row, column]:g}; "
                            f"it must be {legal}.")
        if self.shift is not None:
            values = (values - np.array(self.shift)) / np.array(self.scale)
        return values.astype(np.float32)

    def _encode_classes(self, y: np.ndarray, table: Table, rows: np.ndarray) -> np.ndarray:
        if y.ndim != 1:
            raise DataError(f"{table.name}: has {y.shape[1]} target columns; a classification has one.")
        index = {name: k for k, name in enumerate(self.classes)}
        if y.dtype == object:
            codes = np.array([index.get(v, -1) for v in y], np.int32)
        else:
            distinct, inverse = np.unique(y, return_inverse=True)
            codes = np.array([index.get(number_text(v), -1) for v in distinct.tolist()], np.int32)[inverse]
            codes = codes.reshape(len(y)).astype(np.int32)
        if codes.size and codes.min() < 0:
            row = int((codes < 0).argmax())
            value = y[row] if isinstance(y[row], str) else number_text(y[row].item())
            raise DataError(f"{table.where(int(rows[row]))}: target {self.names[0]} is {value!r}; the classes are "
                            f"{name_some(self.classes)}.")
        return codes


def _target_numbers(y: np.ndarray, task: str, table: Table, rows: np.ndarray) -> np.ndarray:
    """Targets that read as texts, as float64; refuses the first that is no number."""
    out = np.empty(y.shape)
    for place, value in np.ndenumerate(y):
        number = parse_values([str(value)])
        if number is None:
            raise DataError(f"{table.where(int(rows[place[0]]))}: target {value!r} is no number; a {task} needs "
                            "numbers.")
        out[place] = number[0]
    return out


def name_some(names: tuple[str, ...], most: int = 12) -> str:
    """Return names for a sentence: all of a few, else the first and the last. Local."""
    shown = names if len(names) <= most else (*names[:most - 2], "...", names[-1])
    return ", ".join(shown)


def class_names(facts: TargetFacts, y: np.ndarray, table: Table, rows: np.ndarray,
                legal: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Return the classes of a classification after checking that these targets can be classes.

    Local, and alike on all ranks but for a fault in this rank's own rows, which is raised as DataError: a fraction, an
    infinity, a negative number (but for -1 and 1 as the two classes). `legal`: what a named data set has.
    """
    if legal is not None:
        return legal
    if not facts.text and y.dtype != object and y.size:
        values = y.astype(np.float64)
        wrong = ~np.isfinite(values) | (values != np.floor(values))
        if facts.values != (-1.0, 1.0):
            wrong |= values < 0
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(f"{table.where(int(rows[row]))}: target is {values[row]:g}; classes are whole numbers from "
                            "0, or texts (for a number to predict, use --task regression).")
    if facts.values is None:
        raise DataError(f"{table.name}: more than {_CLASS_LIMIT} classes; is this a regression?")
    return tuple(_as_name(v) for v in facts.values)


def check_task(task: str, facts: TargetFacts, table: Table) -> None:
    """Raise an error when targets cannot make the task that the user names. Local, alike on all ranks."""
    if task == "classification" and facts.width > 1:
        raise ConfigError(f"{table.name}: a classification has one target column, not {facts.width}; use --task "
                          "multilabel for several labels a row.")
