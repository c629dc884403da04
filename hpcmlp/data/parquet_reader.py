"""Parquet files as column tables, through the optional package pyarrow."""

import os
from typing import Any

import numpy as np

from hpcmlp.data.tables import Rows, Table
from hpcmlp.errors import DataError, InputMissing, Unavailable


class ParquetTable(Table):
    """A Parquet file: numbers and truth values as float64 (null is missing), texts and categories as str.

    Only the row groups that a range touches are read.
    """

    nan_is_missing = True

    def __init__(self, path: str | os.PathLike):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise Unavailable(f"{path}: reading Parquet needs pyarrow; install hpcmlp[parquet].") from None
        self.name = str(path)
        self._damage = (pyarrow.ArrowException, OSError, ValueError)
        if not os.path.isfile(path) or not os.access(path, os.R_OK):
            raise InputMissing(f"{path}: cannot read this file.")
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except self._damage as error:
            raise DataError(f"{path}: no sound Parquet file ({_plain(error)}).") from None
        meta = self._file.metadata
        self.num_rows = meta.num_rows
        sizes = [meta.row_group(k).num_rows for k in range(meta.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        fields = list(self._file.schema_arrow)
        usable = [f for f in fields if _kind(f.type) is not None]
        self.columns = tuple(f.name for f in usable)
        if len(set(self.columns)) != len(self.columns):
            raise DataError(f"{path}: two columns have the same name; names must differ.")
        left_out = [f"{f.name} ({f.type})" for f in fields if f not in usable]
        if left_out:
            self.notes = (f"{path}: columns left out because of their type: {', '.join(left_out)}",)

    def read(self, start: int, stop: int) -> Rows:
        stop = min(stop, self.num_rows)
        groups = [k for k in range(len(self._starts) - 1)
                  if self._starts[k] < stop and self._starts[k + 1] > start]
        try:
            if not groups:
                table = self._file.schema_arrow.empty_table().select(list(self.columns))
            else:
                table = self._file.read_row_groups(groups, columns=list(self.columns), use_threads=False)
                table = table.slice(start - int(self._starts[groups[0]]), stop - start)
            return {name: _column(table.column(name)) for name in self.columns}
        except self._damage as error:
            raise DataError(f"{self.name}: rows {start} to {stop} cannot be read ({_plain(error)}).") from None


def _kind(kind: Any) -> str | None:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind):
        return "number"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    return None


def _column(column: Any) -> np.ndarray:
    if _kind(column.type) == "number":
        values = column.to_pylist()
        if column.null_count == 0 and hasattr(column.type, "bit_width") and not _is_dictionary(column.type):
            return np.asarray(column.to_numpy(), np.float64)
        return np.array([np.nan if v is None else float(v) for v in values], np.float64)
    out = np.empty(len(column), object)
    out[:] = column.to_pylist()
    return out


def _is_dictionary(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_dictionary(kind)


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
