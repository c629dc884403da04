"""HDF5 files of other people: arrays by name, groups, compound data sets, virtual files over their own directory."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from hpcmlp.data.guard import guarded
from hpcmlp.data.layouts import Shapes
from hpcmlp.data.links import Refused, follow, link_kind, open_file
from hpcmlp.errors import DataError, InputMissing

_DEPTH_LIMIT = 8
_ARRAY_LIMIT = 10_000
_DAMAGE = (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, SystemError)


class Hdf5File:
    """The arrays of an HDF5 file, by path. Ranges of rows are read straight from the file.

    Every array is judged (`data.guard`) before it is read; links and virtual sources are followed only to existing
    files inside the file's own directory.
    """

    def __init__(self, path: str | os.PathLike):
        self.name = str(path)
        self._directory = Path(os.path.realpath(path)).parent
        self._guarded: dict[str, Any] = {}
        self._visited: set[int] = set()
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise InputMissing(f"{path}: cannot read this file ({error.strerror}).") from None
        self._file = open_file(path)
        self.shapes: Shapes = {}
        try:
            self._visit(self._file["/"], "", 0)
        except _DAMAGE as error:
            raise DataError(f"{path}: damaged ({_plain(error)}).") from None

    def _visit(self, group: Any, prefix: str, depth: int) -> None:
        import h5py

        address = h5py.h5o.get_info(group.id).addr
        if address in self._visited:                   # a group that holds itself, under any name
            return
        self._visited.add(address)
        for key in group:
            name = prefix + key
            try:
                value = follow(group, key, self._inside)
            except Refused:
                continue
            if isinstance(value, h5py.Group) and link_kind(group, key) == "hard" and depth < _DEPTH_LIMIT:
                self._visit(value, name + "/", depth + 1)
            elif isinstance(value, h5py.Dataset) and value.shape is not None:
                self.shapes[name] = (tuple(int(n) for n in value.shape), value.dtype)
            if len(self.shapes) > _ARRAY_LIMIT:
                raise DataError(f"{self.name}: holds more than {_ARRAY_LIMIT} arrays; this is no table.")

    def _inside(self, path: str) -> bool:
        """Whether a link's or virtual source's file is there, inside the directory of the file itself."""
        target = Path(os.path.realpath(self._directory / path))
        return target.is_file() and target.is_relative_to(self._directory)

    def read(self, array: str, start: int, stop: int) -> np.ndarray:
        try:
            if array not in self._guarded:
                self._guarded[array] = guarded(self._file, array, outside=self._inside, foreign=True)
            dataset = self._guarded[array]
            values = self._plain_fields(dataset)[start:stop] if dataset.dtype.names else dataset[start:stop]
        except Refused as error:
            raise DataError(f"{self.name}: array {array!r} {error}") from None
        except _DAMAGE as error:
            raise DataError(f"{self.name}: array {array!r}: rows {start} to {stop} cannot be read "
                            f"({_plain(error)}).") from None
        return np.ascontiguousarray(values, values.dtype.newbyteorder("="))

    def _plain_fields(self, dataset: Any) -> Any:
        kinds = dataset.dtype
        return dataset.fields([n for n in kinds.names if kinds[n].kind in "fiubSU"])


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
