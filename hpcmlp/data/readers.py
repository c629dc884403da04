"""Any file, directory, glob or list of files as a table, by its format."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcmlp.data.arrays import open_arrays
from hpcmlp.data.csv_reader import CsvTable
from hpcmlp.data.hdf5_reader import Hdf5File
from hpcmlp.data.idx_reader import IdxFile, IdxTable, labels_of
from hpcmlp.data.layouts import split_of_file
from hpcmlp.data.manifest import FILE_NAME
from hpcmlp.data.npz_reader import NpzFile
from hpcmlp.data.parquet_reader import ParquetTable
from hpcmlp.data.probe import probe
from hpcmlp.data.tables import Chain, Table
from hpcmlp.errors import DataError, InputMissing

_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", ".hdf": "hdf5",
             ".parquet": "parquet", ".pq": "parquet", ".idx": "idx"}
_LIST_LIMIT_BYTES = 1 << 22


@dataclass(frozen=True)
class SourcePart:
    """Rows of a source that belong to one split, or (None) are still to be split."""

    split: str | None
    table: Table


def probe_strangers(path: str | os.PathLike) -> None:
    """Let a child process open the HDF5 files that `path` stands for (`data.probe`), before any rank does.

    Local: one rank calls it, before all call `open_table` or `open_parts`. Raises DataError, InputMissing.
    """
    probe([file for file in expand(path) if _format(file) == "hdf5"])


def open_table(path: str | os.PathLike, x: str | None = None, y: str | None = None, weight: str | None = None,
               text: Sequence[str] = ()) -> Table:
    """Open files as one table, whatever splits they speak of.

    Local: every rank opens for itself and reads its range of rows.

    Parameters
    ----------
    path : a file, a directory, a glob pattern, or a text file that lists one path per line
    x, y, weight : names of arrays in NPZ and HDF5 files, where habit does not find them
    text : columns to read as texts even where they look like numbers (`Preprocessor.text_columns`)
    """
    parts = open_parts(path, x, y, weight)
    if len(parts) > 1 and len({part.split for part in parts}) > 1:
        names = ", ".join(str(part.split) for part in parts)
        raise DataError(f"{path}: holds several splits ({names}); name one file, or one array with --x.")
    table = parts[0].table if len(parts) == 1 else Chain([part.table for part in parts])
    if text:
        table.set_text(text)
    return table


def open_parts(path: str | os.PathLike, x: str | None = None, y: str | None = None,
               weight: str | None = None) -> list[SourcePart]:
    """Open files as one table per split they speak of, in the order train, val, test; or as one with split None.

    Local. Splits come from the names of arrays (x_train, test/x) or of files (train-images, test.csv). They count only
    when every file speaks of one and there are training rows among them.
    """
    files = expand(path)
    found: list[tuple[str | None, Table]] = []
    for file in files:
        for split, table in _open_file(file, x, y, weight):
            found.append((split or (split_of_file(file.name.split(".")[0]) if len(files) > 1 else None), table))
    splits = {split for split, _ in found}
    if None in splits or "train" not in splits:
        return [SourcePart(None, Chain([table for _, table in found]))]
    parts = [SourcePart(split, Chain([table for s, table in found if s == split]))
             for split in ("train", "val", "test") if split in splits]
    Chain([part.table for part in parts])              # alike across the splits too
    return parts


def expand(path: str | os.PathLike) -> list[Path]:
    """Return the data files that `path` stands for: itself, those in a directory, a glob's, a list file's.

    Local. Raises InputMissing that names every file that is not there.
    """
    place = Path(path)
    if place.is_dir():
        if (place / FILE_NAME).exists():
            raise DataError(f"{path}: is a prepared data set already; give it to train with --data.")
        files = sorted(f for f in place.iterdir() if f.is_file() and not f.name.startswith(".") and _known(f))
        if not files:
            raise InputMissing(f"{path}: no data files (CSV, NPZ, idx, HDF5, Parquet) in this directory.")
    elif place.exists():
        files = _listed(place) or [place]
    elif glob.has_magic(str(path)):
        files = sorted(Path(name) for name in glob.glob(str(path)))
        if not files:
            raise InputMissing(f"{path}: no file matches this pattern.")
    else:
        raise InputMissing(f"{path}: no such file, directory or named data set.")
    missing = [str(f) for f in files if not f.is_file() or not os.access(f, os.R_OK)]
    if missing:
        raise InputMissing(f"{', '.join(missing)}: cannot be read.")
    images = [f for f in files if _format(f) != "idx" or len(IdxFile(f).shape) >= 2]
    return images or files                             # labels come with their images


def _known(file: Path) -> bool:
    return file.suffix in _SUFFIXES or _format(file) == "idx"


def _listed(file: Path) -> list[Path]:
    """The files named line by line in a list file (.txt, .list); empty when it is none."""
    if file.suffix not in (".txt", ".list") or file.stat().st_size > _LIST_LIMIT_BYTES:
        return []
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (UnicodeDecodeError, OSError):
        return []
    files = [file.parent / line for line in lines]
    looks_so = files and (files[0].exists() or files[0].suffix in _SUFFIXES)
    return files if looks_so and "," not in lines[0] else []


def _format(file: Path) -> str:
    """The format by suffix, else by the first bytes."""
    if file.suffix in _SUFFIXES:
        return _SUFFIXES[file.suffix]
    try:
        with open(file, "rb") as handle:
            head = handle.read(8)
    except OSError as error:
        raise InputMissing(f"{file}: cannot read this file ({error.strerror}).") from None
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if head.startswith(b"PK\x03\x04"):
        return "npz"
    if head.startswith(b"PAR1"):
        return "parquet"
    if (len(head) >= 4 and head[:2] == b"\0\0" and 8 <= head[2] <= 14) or \
            (head[:2] == b"\x1f\x8b" and ("idx" in file.name or "ubyte" in file.name)):
        return "idx"
    return "csv"


def _open_file(file: Path, x: str | None, y: str | None, weight: str | None) -> list[tuple[str | None, Table]]:
    kind = _format(file)
    if kind == "csv":
        return [(None, CsvTable(file))]
    if kind == "parquet":
        return [(None, ParquetTable(file))]
    if kind == "idx":
        return [(None, IdxTable(file, labels_of(file)))]
    return open_arrays(NpzFile(file) if kind == "npz" else Hdf5File(file), x, y, weight)
