"""From raw rows to the network's inputs: the same function in preparation and in prediction.

Numbers are filled where missing, then (x - shift) * scale in float64, rounded once to float32. A category becomes one
0/1 input per level that the training rows hold; a level that they do not hold becomes zeros. 8-bit pixels stay as they
are, and are normalised when a batch is loaded.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hpcmlp.data.csv_numbers import parse_values
from hpcmlp.data.manifest import TASKS
from hpcmlp.data.tables import Rows, Table, as_text, numbered
from hpcmlp.data.targets import Targets
from hpcmlp.errors import DataError

_BLOCK_VALUES = 1 << 18
POLICIES_THAT_FILL = ("median", "mean")


@dataclass
class Report:
    """What happened to raw values, by column; counts add up over calls."""

    filled: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """Return what the user should know, one sentence per column. Local."""
        out = [f"column {name!r}: {count} missing values filled" for name, count in self.filled.items()]
        return out + [f"column {name!r}: {count} values are levels unseen in the training rows; their inputs are "
                      "all 0" for name, count in self.unknown.items()]


@dataclass(frozen=True)
class Preprocessor:
    """Everything that turns raw rows into x, and targets into y.

    Attributes
    ----------
    form : "columns" (by name) or "matrix" (by position)
    inputs : names of the raw columns in order
    levels : of the categorical ones, their levels in order
    fills : what a missing value is taken as, by column; a column without has its missing values refused
    shift, scale : (num_features,) after one-hot
    x_dtype : "float32", or "uint8" for pixels that are normalised on loading
    invalid_is_missing : whether infinities (and NaN in binary files) count as missing
    """

    form: str
    inputs: tuple[str, ...]
    levels: dict[str, tuple[str, ...]]
    fills: dict[str, float | str]
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    x_dtype: str
    invalid_is_missing: bool
    target: Targets

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns that must be read as texts (`readers.open_table(text=...)`)."""
        out = list(self.levels)
        if self.form == "columns" and self.target.classes and not all(_is_number(c) for c in self.target.classes):
            out += self.target.names
        return tuple(out)

    @property
    def feature_names(self) -> list[str]:
        """Names of the network's inputs: column, or column=level."""
        return [name for column in self.inputs for name in
                ([f"{column}={level}" for level in self.levels[column]] if column in self.levels else [column])]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values; `from_dict` gives back the same Preprocessor, to the last bit. Local."""
        return {"version": 1, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessor":
        """Return the Preprocessor of a manifest or a model. Local; raises DataError when it is none."""
        try:
            if values["version"] != 1:
                raise DataError(f"preprocessing has version {values['version']!r}; this program reads 1.")
            target = values["target"]
            given = {k: v for k, v in values.items() if k not in ("version", "target")}
            _check_kinds(values)
            target = {k: tuple(v) if isinstance(v, list) else v for k, v in target.items()}
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
            given["levels"] = {k: tuple(v) for k, v in given["levels"].items()}
            out = cls(**given, target=Targets(**target))
            if len(out.shift) != len(out.feature_names) or len(out.scale) != len(out.shift):
                raise DataError("preprocessing is damaged: shift and scale do not match the inputs.")
            return out
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise DataError(f"preprocessing is damaged ({type(error).__name__}: {error}).") from None

    def transform(self, rows: Rows | Table, table: Table | None = None, first: int | np.ndarray = 0,
                  report: Report | None = None) -> np.ndarray:
        """Return x (n, num_features) of raw rows, float32 (or uint8 as stored).

        Local. Each row's result depends on that row alone.

        Parameters
        ----------
        rows : what `Table.read` gave, or a whole table
        table : where they come from, for error messages and for what NaN means there
        first : number of the first row in `table`, or (n,) row numbers
        report : counts are added here

        Raises
        ------
        DataError : a column is missing, the width is wrong, a value is no number, missing or not finite; with row and
            column
        """
        if isinstance(rows, Table):
            rows, table = rows.read(0, rows.num_rows), rows
        table = table or Table()
        report = report if report is not None else Report()
        source = self._source(rows, table)
        n = source.shape[0] if isinstance(source, np.ndarray) else len(next(iter(source.values())))
        numbers = np.arange(first, first + n) if isinstance(first, int) else np.asarray(first)
        if self.x_dtype == "uint8":
            return _pixels(self._matrix(source, slice(0, n)), self.inputs, table, numbers)
        out = np.empty((n, len(self.shift)), np.float32)
        codes = {name: self._codes(source[name], name, table, numbers, report) for name in self.levels}
        block = max(1, _BLOCK_VALUES // max(1, out.shape[1]))
        for start in range(0, n, block):
            rows_here = slice(start, min(n, start + block))
            self._transform_block(source, codes, rows_here, table, numbers, report, out)
        return out

    def targets(self, rows: Rows | Table, table: Table | None = None, first: int | np.ndarray = 0) -> np.ndarray:
        """Return y of raw rows: (n,) int32 or (n, k) float32. Local; raises DataError with row, value and range."""
        if isinstance(rows, Table):
            rows, table = rows.read(0, rows.num_rows), rows
        return self.target.encode(raw_targets(rows, self.target.names, table or Table()), table or Table(), first)

    def _source(self, rows: Rows, table: Table) -> np.ndarray | Rows:
        """The rows as what this form needs: by position where both allow it, else by name."""
        if "x" in rows and rows["x"].ndim == 2:
            x = rows["x"]
            if x.shape[1] != len(self.inputs):
                raise DataError(f"{table.name}: has {x.shape[1]} columns; the model takes {len(self.inputs)}.")
            if self.levels:
                raise DataError(f"{table.name}: is a matrix; the model takes columns by name, among them the texts "
                                f"{', '.join(self.levels)}.")
            return x
        lost = [name for name in self.inputs if name not in rows]
        if lost:
            if self.inputs == numbered("x", len(self.inputs)) and len(rows) == len(self.inputs):
                return dict(zip(self.inputs, rows.values(), strict=True))
            raise DataError(f"{table.name}: has no column {', '.join(map(repr, lost[:5]))}"
                            f"{' and others' if len(lost) > 5 else ''}; the model takes {len(self.inputs)} columns: "
                            f"{', '.join(self.inputs[:8])}{', ...' if len(self.inputs) > 8 else ''}.")
        return rows

    def _matrix(self, source: np.ndarray | Rows, rows: slice) -> np.ndarray:
        if isinstance(source, np.ndarray):
            return source[rows]
        return np.stack([source[name][rows] for name in self.inputs], axis=1)

    def _transform_block(self, source: np.ndarray | Rows, codes: dict[str, np.ndarray], rows: slice, table: Table,
                         numbers: np.ndarray, report: Report, out: np.ndarray) -> None:
        wide = np.zeros((rows.stop - rows.start, out.shape[1]))
        if isinstance(source, np.ndarray):
            wide[:] = source[rows]
            self._fill(wide, range(wide.shape[1]), table, numbers[rows], report)
        else:
            places, place = [], 0
            for name in self.inputs:
                if name in self.levels:
                    code = codes[name][rows]
                    known = np.flatnonzero(code >= 0)
                    wide[known, place + code[known]] = 1.0
                    place += len(self.levels[name])
                    continue
                values = source[name][rows]
                if values.dtype == object:
                    values = _numbers_of(values, name, table, numbers[rows])
                wide[:, place] = values
                places.append(place)
                place += 1
            self._fill(wide, places, table, numbers[rows], report)
        with np.errstate(over="ignore", invalid="ignore"):
            wide -= np.array(self.shift)
            wide *= np.array(self.scale)
            out[rows] = wide
        if not np.isfinite(out[rows]).all():
            row, column = np.argwhere(~np.isfinite(out[rows]))[0]
            raise DataError(f"{table.where(int(numbers[rows][row]))}, column {self.feature_names[column]!r}: the value "
                            "is too large for float32.")

    def _fill(self, wide: np.ndarray, places: Any, table: Table, numbers: np.ndarray, report: Report) -> None:
        """Replace what is missing in the columns `places` (those of the numeric inputs, in order)."""
        if np.isfinite(wide).all():
            return
        names = [name for name in self.inputs if name not in self.levels]
        for name, place in zip(names, places, strict=True):
            column = wide[:, place]
            bad = ~np.isfinite(column)
            if not bad.any():
                continue
            missing = np.isnan(column) & table.nan_is_missing if not self.invalid_is_missing else bad
            refused = bad & ~missing if name in self.fills else bad
            if refused.any():
                row = int(refused.argmax())
                raise DataError(refusal(table, int(numbers[row]), name, column[row], bool(missing[row])))
            column[missing] = self.fills[name]
            report.filled[name] = report.filled.get(name, 0) + int(missing.sum())

    def _codes(self, values: np.ndarray, name: str, table: Table, numbers: np.ndarray, report: Report) -> np.ndarray:
        """(n,) level numbers of a categorical column, -1 where unknown."""
        values = as_text(values)
        index: dict[str | None, int] = {level: k for k, level in enumerate(self.levels[name])}
        lost = np.array([v is None for v in values], bool)
        if lost.any():
            if name not in self.fills:
                raise DataError(refusal(table, int(numbers[int(lost.argmax())]), name, None, True))
            index[None] = index.get(self.fills[name], -1)
            report.filled[name] = report.filled.get(name, 0) + int(lost.sum())
        codes = np.array([index.get(v, -1) for v in values], np.int64)
        unknown = int((codes < 0).sum())
        if unknown:
            report.unknown[name] = report.unknown.get(name, 0) + unknown
        return codes


def raw_targets(rows: Rows, names: tuple[str, ...], table: Table) -> np.ndarray:
    """Return the raw targets of some rows: (n,), or (n, k) of several columns. Local."""
    if "x" in rows and rows["x"].ndim == 2:
        if "y" not in rows:
            raise DataError(f"{table.name}: has no targets.")
        return rows["y"]
    lost = [name for name in names if name not in rows]
    if lost:
        raise DataError(f"{table.name}: has no target column {', '.join(map(repr, lost))}.")
    if len(names) == 1:
        return rows[names[0]]
    columns = [rows[name] for name in names]
    if any(c.dtype == object for c in columns):
        columns = [as_text(c) for c in columns]
    return np.stack(columns, axis=1)


def spread(inputs: tuple[str, ...], levels: dict[str, tuple[str, ...]], shift: np.ndarray,
           scale: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return shift and scale of the numeric columns at their places among one-hot inputs, which stay 0 and 1. Local."""
    numbers = iter(zip(shift.tolist(), scale.tolist(), strict=True))
    pairs = []
    for name in inputs:
        pairs += [(0.0, 1.0)] * len(levels[name]) if name in levels else [next(numbers)]
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)


def refusal(table: Table, row: int, column: str, value: Any, missing: bool) -> str:
    """Return the sentence for a raw value that is not accepted. Local."""
    if missing:
        return (f"{table.where(row)}, column {column!r}: the value is missing; fill it, or prepare with --missing "
                "median, mean or drop.")
    return (f"{table.where(row)}, column {column!r} is {value}; inputs must be finite: correct it, or prepare with "
            "--invalid drop or missing.")


def _numbers_of(values: np.ndarray, name: str, table: Table, numbers: np.ndarray) -> np.ndarray:
    """A column that should be numbers and reads as texts, as float64; refuses the first that is no number."""
    out = np.empty(len(values))
    for row, value in enumerate(values):
        number = parse_values(["" if value is None else str(value)])
        if number is None:
            raise DataError(f"{table.where(int(numbers[row]))}, column {name!r}: {value!r} is no number.")
        out[row] = number[0]
    return out


def _pixels(x: np.ndarray, names: tuple[str, ...], table: Table, numbers: np.ndarray) -> np.ndarray:
    """Pixels as uint8; refuses what is not 0..255 whole."""
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x)
    if x.dtype == object:
        x = np.stack([_numbers_of(x[:, k], names[k], table, numbers) for k in range(x.shape[1])], axis=1)
    with np.errstate(invalid="ignore"):
        out = x.astype(np.uint8)
        wrong = out != x
    if wrong.any():
        row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
        raise DataError(f"{table.where(int(numbers[row]))}, column {names[column]!r} is {x[row, column]}; the model "
                        "takes pixels, whole numbers from 0 to 255.")
    return out


def _check_kinds(values: dict[str, Any]) -> None:
    """Raise ValueError or TypeError unless what a manifest says of the preprocessing has the right types throughout."""
    target, levels, fills = values["target"], values["levels"], values["fills"]
    texts = [values["inputs"], target["names"], target["classes"] or [], *levels.values()]
    numbers = [values["shift"], values["scale"], target["shift"] or [], target["scale"] or []]
    sound = (values["form"] in ("columns", "matrix") and values["x_dtype"] in ("float32", "uint8")
             and type(values["invalid_is_missing"]) is bool and target["task"] in TASKS
             and type(levels) is dict and type(fills) is dict
             and all(type(part) is list and all(type(v) is str for v in part) for part in texts)
             and all(type(part) is list and all(type(v) in (int, float) and math.isfinite(v) for v in part)
                     for part in numbers)
             and set(levels) | set(fills) <= set(values["inputs"])
             and len(set(values["inputs"])) == len(values["inputs"])
             and all(type(v) is (str if name in levels else float) or (type(v) is int and name not in levels)
                     for name, v in fills.items()))
    if not sound:
        raise ValueError("a value of the wrong type, or a column that is no input")


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdigit()
