"""Files of named arrays (NPZ, HDF5) as tables: a matrix with targets, or one column per array or field."""

from typing import Protocol

import numpy as np

from hpcmlp.data.layouts import Layout, Shapes, describe, find_layouts
from hpcmlp.data.tables import Rows, Table, numbered, width_of
from hpcmlp.errors import DataError


class ArrayFile(Protocol):
    """What a file of named arrays offers: its shapes, and ranges of rows of one array."""

    name: str
    shapes: Shapes

    def read(self, array: str, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop as a new array in native byte order. Local."""


def open_arrays(file: ArrayFile, x: str | None = None, y: str | None = None,
                weight: str | None = None) -> list[tuple[str | None, Table]]:
    """Return (split or None, table) for each part of a file of named arrays.

    Local. A matrix when inputs are named or found by habit, else a column table of the fields of the one compound array
    (`x` may name it) or of the one-dimensional arrays of equal length. Raises DataError that lists what was found.
    """
    shapes = file.shapes
    compound = [n for n, (shape, dtype) in shapes.items() if dtype.names and len(shape) == 1]
    if x in compound or (x is None and len(compound) == 1):
        return [(None, Fields(file, x or compound[0]))]
    plain = {n: value for n, value in shapes.items() if not value[1].names}
    if x is None and y is not None and y not in plain:
        y = None                                       # a column's name
    layouts = find_layouts(file.name, plain, x, y, weight if weight in plain else None)
    if layouts:
        return [(layout.split, Matrix(file, layout)) for layout in layouts]
    columns = [n for n, (shape, _) in plain.items() if len(shape) == 1]
    lengths = {plain[n][0][0] for n in columns}
    if len(columns) >= 2 and len(lengths) == 1:
        return [(None, Columns(file, columns))]
    raise DataError(f"{file.name}: cannot tell inputs from targets among {describe(shapes)}; name them with --x and "
                    "--y.")


class Matrix(Table):
    """Inputs as one array, with targets and weights beside it; further dimensions of x are flattened."""

    matrix = True

    def __init__(self, file: ArrayFile, layout: Layout):
        self._file, self._layout = file, layout
        self.name = file.name
        shape, _ = file.shapes[layout.x]
        self.num_rows = int(shape[0])
        self._width = width_of(self.name, shape)
        self.columns = numbered("x", self._width)
        if layout.y is not None:
            y_shape = file.shapes[layout.y][0]
            k = width_of(self.name, y_shape)
            self.target_names = ("y",) if k == 1 else numbered("y", k)

    def read(self, start: int, stop: int) -> Rows:
        rows = {"x": self._file.read(self._layout.x, start, stop).reshape(-1, self._width)}
        if rows["x"].dtype == bool:
            rows["x"] = rows["x"].astype(np.uint8)
        if self._layout.y is not None:
            y = self._file.read(self._layout.y, start, stop)
            rows["y"] = decoded(y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y, self.name)
        if self._layout.weight is not None:
            rows["weight"] = self._file.read(self._layout.weight, start, stop).reshape(-1)
        return rows

    def where(self, row: int) -> str:
        return f"{self.name}: array {self._layout.x}: row {row}"


class Columns(Table):
    """One-dimensional arrays of one length as columns."""

    def __init__(self, file: ArrayFile, arrays: list[str]):
        self._file = file
        self.name, self.columns = file.name, tuple(arrays)
        self.num_rows = int(file.shapes[arrays[0]][0][0])

    def read(self, start: int, stop: int) -> Rows:
        return {name: as_column(self._file.read(name, start, stop), self.name) for name in self.columns}


class Fields(Table):
    """The fields of a compound array as columns; fields that are no plain numbers or texts are left out, and named."""

    def __init__(self, file: ArrayFile, array: str):
        self._file, self._array = file, array
        self.name = file.name
        (self.num_rows,), dtype = file.shapes[array]
        kinds = {name: dtype[name] for name in dtype.names}
        self.columns = tuple(n for n, kind in kinds.items() if kind.kind in "fiubSU")
        left_out = [n for n in kinds if n not in self.columns]
        if left_out:
            self.notes = (f"{self.name}: fields left out because they hold no plain values: {', '.join(left_out)}",)
        if not self.columns:
            raise DataError(f"{self.name}: array {array!r} has no field of plain numbers.")

    def read(self, start: int, stop: int) -> Rows:
        rows = self._file.read(self._array, start, stop)
        return {name: as_column(rows[name], self.name) for name in self.columns}


def decoded(values: np.ndarray, name: str) -> np.ndarray:
    """Return texts of fixed length as an object array of str, numbers as they are. Local."""
    if values.dtype.kind not in "SU":
        return values
    out = np.empty(values.shape, object)
    try:
        out[...] = [v.decode("utf-8") if isinstance(v, bytes) else v for v in values.ravel().tolist()]
    except UnicodeDecodeError:
        raise DataError(f"{name}: holds texts that are not UTF-8.") from None
    return out


def as_column(values: np.ndarray, name: str) -> np.ndarray:
    """Return a column of a table: float64, or an object array of str. Local."""
    values = decoded(values, name)
    return values if values.dtype == object else values.astype(np.float64)
