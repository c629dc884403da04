"""Tables: rows of raw data, read by ranges, whatever file they stand in.

Two forms. A column table reads as named 1-D arrays: float64 with NaN for a missing number, or object arrays of str with
None for a missing text. A matrix table reads as `x` (n, d) of the file's own type, with `y` (n,) or (n, k) and `weight`
(n,) where the file has them.
"""

import os
from collections.abc import Sequence

import numpy as np

from hpcmlp.errors import DataError

COLUMN_LIMIT = 1 << 22
Rows = dict[str, np.ndarray]


class Table:
    """Rows of raw data; subclasses implement `read`.

    Attributes
    ----------
    name : what error messages call it, usually the file
    num_rows : number of rows
    columns : names of the columns; of a matrix table x0, x1, ... or the file's own
    matrix : whether `read` gives `x`, `y`, `weight` instead of columns
    target_names : of a matrix table, names of the columns of y; empty when there is no y
    nan_is_missing : NaN means "not given" (text formats) and not "went wrong" (binary formats)
    notes : sentences about choices made while opening, for the user
    """

    name = "table"
    num_rows = 0
    columns: tuple[str, ...] = ()
    matrix = False
    target_names: tuple[str, ...] = ()
    nan_is_missing = False
    notes: tuple[str, ...] = ()

    def read(self, start: int, stop: int) -> Rows:
        """Return rows start..stop as new arrays. Local; raises DataError with file, row and column."""
        raise NotImplementedError

    def set_text(self, names: Sequence[str]) -> None:
        """Read these columns as texts even where they look like numbers (column tables). Local."""

    def where(self, row: int) -> str:
        """Return how to name `row` to the user: file and row in it. Local."""
        return f"{self.name}: row {row}"


class Memory(Table):
    """A matrix table of arrays that are in memory already."""

    matrix = True

    def __init__(self, name: str, x: np.ndarray, y: np.ndarray | None = None, weight: np.ndarray | None = None,
                 columns: Sequence[str] = (), target_names: Sequence[str] = ()):
        self.name = name
        self.num_rows = x.shape[0]
        self.columns = tuple(columns) or numbered("x", x.shape[1])
        self.target_names = tuple(target_names) or target_columns(y)
        self._arrays = {"x": x, "y": y, "weight": weight}

    def read(self, start: int, stop: int) -> Rows:
        return {key: a[start:stop].copy() for key, a in self._arrays.items() if a is not None}


class Part(Table):
    """The first `limit` rows of a table."""

    def __init__(self, table: Table, limit: int):
        self._table = table
        self.num_rows = min(limit, table.num_rows)
        for key in ("name", "columns", "matrix", "target_names", "nan_is_missing", "notes"):
            setattr(self, key, getattr(table, key))

    def read(self, start: int, stop: int) -> Rows:
        return self._table.read(start, min(stop, self.num_rows))

    def set_text(self, names: Sequence[str]) -> None:
        self._table.set_text(names)

    def where(self, row: int) -> str:
        return self._table.where(row)


class Chain(Table):
    """Tables of the same columns, one after the other.

    A column that reads as text in one of them is text in all: give it to `set_text` once that is known.
    """

    def __init__(self, tables: Sequence[Table]):
        first = tables[0]
        for table in tables[1:]:
            _check_alike(first, table)
        self.tables = tuple(tables)
        self.name = first.name if len(tables) == 1 else f"{first.name} and {len(tables) - 1} more"
        self.starts = np.concatenate([[0], np.cumsum([t.num_rows for t in tables])]).astype(np.int64)
        self.num_rows = int(self.starts[-1])
        self.columns, self.matrix = first.columns, first.matrix
        self.target_names = first.target_names
        self.nan_is_missing = all(t.nan_is_missing for t in tables)
        self.notes = tuple(note for t in tables for note in t.notes)

    def read(self, start: int, stop: int) -> Rows:
        parts = []
        for table, first in zip(self.tables, self.starts[:-1].tolist(), strict=True):
            low, high = max(start, first), min(stop, first + table.num_rows)
            if low < high or (not parts and low <= high and table is self.tables[-1]):
                parts.append(table.read(low - first, high - first))
        if not parts:
            return self.tables[0].read(0, 0)
        return parts[0] if len(parts) == 1 else join(parts)

    def set_text(self, names: Sequence[str]) -> None:
        for table in self.tables:
            table.set_text(names)

    def where(self, row: int) -> str:
        k = int(np.searchsorted(self.starts, row, side="right")) - 1
        k = min(max(k, 0), len(self.tables) - 1)
        return self.tables[k].where(row - int(self.starts[k]))


def join(parts: Sequence[Rows]) -> Rows:
    """Return the rows of `parts` one after the other; a column that is text in one is text in all. Local."""
    out = {}
    for key in parts[0]:
        arrays = [part[key] for part in parts]
        if any(a.dtype == object for a in arrays):
            arrays = [as_text(a) for a in arrays]
        out[key] = np.concatenate(arrays)
    return out


def as_text(column: np.ndarray) -> np.ndarray:
    """Return a column as an object array of str, missing as None; whole numbers without a point. Local."""
    if column.dtype == object:
        return column
    out = np.empty(column.shape[0], object)
    for row, value in enumerate(column.tolist()):
        out[row] = None if value != value else number_text(value)
    return out


def number_text(value: float | int | bool) -> str:
    """Return a number as the name of a class or level: 3 for 3.0, 0.5 for 0.5, inf as it is. Local."""
    if isinstance(value, float):
        return str(int(value)) if value == value and abs(value) < 2**53 and value == int(value) else repr(value)
    return str(int(value))


def width_of(name: str, shape: Sequence[int]) -> int:
    """Return how many columns rows of this shape have, flattened. Local; raises DataError beyond what is read."""
    width = 1
    for extent in shape[1:]:
        width *= int(extent)
    if width > COLUMN_LIMIT:
        raise DataError(f"{name}: has {width} columns; at most {COLUMN_LIMIT} are read.")
    return width


def physical_bytes() -> int:
    """Return the memory of this machine. Local."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def numbered(prefix: str, count: int) -> tuple[str, ...]:
    """Return prefix0, prefix1, ... Local."""
    return tuple(f"{prefix}{k}" for k in range(count))


def target_columns(y: np.ndarray | None) -> tuple[str, ...]:
    """Return names for the columns of y: none, `y`, or y0, y1, ... Local."""
    if y is None:
        return ()
    return ("y",) if y.ndim == 1 or y.shape[1] == 1 else numbered("y", y.shape[1])


def _check_alike(first: Table, other: Table) -> None:
    if first.matrix != other.matrix or first.target_names != other.target_names:
        raise DataError(f"{other.name}: its arrays are laid out unlike those of {first.name}; files of one data set "
                        "must be alike.")
    if first.columns == other.columns:
        return
    if len(first.columns) != len(other.columns):
        raise DataError(f"{other.name}: has {len(other.columns)} columns; {first.name} has {len(first.columns)}.")
    odd = next(k for k, (a, b) in enumerate(zip(first.columns, other.columns, strict=True)) if a != b)
    raise DataError(f"{other.name}: column {odd} is {other.columns[odd]!r}; in {first.name} it is "
                    f"{first.columns[odd]!r}.")
