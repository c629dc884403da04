"""NPZ archives: every member judged by its header before any of it is inflated, then held in memory once read."""

import os
import tokenize
import warnings
import zipfile
import zlib

import numpy as np

from hpcmlp.data.layouts import Shapes
from hpcmlp.data.tables import physical_bytes
from hpcmlp.errors import DataError, InputMissing

# deflate inflates at most 1032 times; the other methods without bound
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError, KeyError,
           TypeError, SyntaxError, OverflowError, LookupError, tokenize.TokenError)


class NpzFile:
    """The arrays of an NPZ archive, by name. Memory: an array is held whole by each rank that reads any of it."""

    def __init__(self, path: str | os.PathLike):
        self.name = str(path)
        self.shapes: Shapes = {}
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._held: dict[str, np.ndarray] = {}
        try:
            self._archive = zipfile.ZipFile(path)
        except FileNotFoundError as error:
            raise InputMissing(f"{path}: cannot read this file ({error.strerror}).") from None
        except PermissionError as error:
            raise InputMissing(f"{path}: cannot read this file ({error.strerror}).") from None
        except _DAMAGE as error:
            raise DataError(f"{path}: is no sound NPZ archive ({_plain(error)}).") from None
        for info in self._archive.infolist():
            self._judge(info)

    def _judge(self, info: zipfile.ZipInfo) -> None:
        name = info.filename.removesuffix(".npy")
        if name == info.filename:
            return                                     # no array
        if name in self._members:
            raise DataError(f"{self.name}: two arrays are called {name!r}.")
        if info.compress_type not in _METHODS:
            raise DataError(f"{self.name}: array {name!r} is compressed by method {info.compress_type}; only stored "
                            "and deflated ones are read.")
        try:
            with self._archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else \
                    np.lib.format.read_array_header_2_0
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")    # that Python 2 wrote it: not the user's concern
                    shape, _, dtype = read(member)
                header = member.tell()
        except _DAMAGE as error:
            raise DataError(f"{self.name}: array {name!r} is damaged ({_plain(error)}).") from None
        if dtype.hasobject:
            raise DataError(f"{self.name}: array {name!r} holds Python objects; save plain numbers or texts.")
        size = dtype.itemsize
        for extent in shape:
            size *= int(extent)
        if size + header != info.file_size:
            raise DataError(f"{self.name}: array {name!r} declares {size} bytes and holds {info.file_size - header}.")
        if info.file_size > physical_bytes():
            raise DataError(f"{self.name}: array {name!r} needs {info.file_size} bytes; this machine has "
                            f"{physical_bytes()}: use HDF5, which is read by ranges.")
        self._members[name] = info
        self.shapes[name] = (tuple(int(n) for n in shape), dtype)

    def read(self, array: str, start: int, stop: int) -> np.ndarray:
        if array not in self._held:
            self._held[array] = self._load(array)
        return self._held[array][start:stop].copy()

    def _load(self, array: str) -> np.ndarray:
        try:
            with self._archive.open(self._members[array]) as member:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    values = np.lib.format.read_array(member, allow_pickle=False)
                if member.read(1):
                    raise ValueError("bytes after its end")
        except MemoryError:
            raise
        except _DAMAGE as error:
            raise DataError(f"{self.name}: array {array!r} is damaged ({_plain(error)}).") from None
        return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
