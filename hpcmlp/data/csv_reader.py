"""CSV files as column tables: rows are indexed once, then any range of them is parsed by itself.

Opening maps the file and notes where each row starts (8 bytes a row, about 0.1 s per 100 MB), so that ranks parse
disjoint ranges. A newline between quotes does not end a row: a newline ends a row when an even number of quotes stands
before it. Blocks of plain numbers go through `csv_numbers.parse_block`; all else through Python's strict `csv.reader`.
"""

import csv
import mmap
import os
from collections.abc import Sequence

import numpy as np

from hpcmlp.data.csv_numbers import MISSING, NUMBER, parse_block, parse_values
from hpcmlp.data.tables import Rows, Table
from hpcmlp.errors import DataError, InputMissing

_SCAN_BYTES = 1 << 22
_BLOCK_BYTES = 1 << 18
_LINE_LIMIT_BYTES = 1 << 24
_COLUMN_LIMIT = 1 << 20
_NEWLINE, _QUOTE = b'\n"'


class CsvTable(Table):
    """A CSV file with one header line (or none, when its first line holds numbers only).

    Fields are separated by comma, semicolon or tab, whichever the first line holds most of. Empty fields, NA, NaN,
    null, ? and the like are missing. Each row must have the header's number of fields. Encoding: UTF-8, with or without
    a mark.
    """

    nan_is_missing = True

    def __init__(self, path: str | os.PathLike):
        self.name = str(path)
        self._text: frozenset[str] = frozenset()
        self._data = _map(path)
        self._check_encoding()
        self._starts = self._index()
        self._read_header()

    def _check_encoding(self) -> None:
        head = bytes(self._data[:4])
        for mark, what in ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"), (b"\x1f\x8b", "gzip-compressed"),
                           (b"PK\x03\x04", "a zip archive"), (b"\x89HDF", "HDF5")):
            if head.startswith(mark):
                raise DataError(f"{self.name}: is {what}; a CSV file is plain UTF-8 text.")

    def _index(self) -> np.ndarray:
        """Offsets of the rows, the header first, and the end; blank lines belong to nobody."""
        begin = 3 if self._data[:3] == b"\xef\xbb\xbf" else 0
        size = len(self._data)
        quoted = self._data.find(b'"') >= 0
        ends, inside = [], 0
        for start in range(0, size, _SCAN_BYTES):
            block = np.frombuffer(self._data[start:start + _SCAN_BYTES], np.uint8)
            newlines = np.flatnonzero(block == _NEWLINE)
            if quoted:
                quotes = np.flatnonzero(block == _QUOTE)
                before = np.searchsorted(quotes, newlines) + inside
                newlines = newlines[before % 2 == 0]
                inside = (inside + quotes.size) % 2
            ends.append(newlines + start)
        if inside:
            where = int(ends_of_rows[-1]) if (ends_of_rows := np.concatenate(ends)).size else begin
            quote = self._data.find(b'"', where)
            raise DataError(f"{self.name}: the quote opened at line {self._line(quote)} is never closed.")
        stops = np.concatenate(ends).astype(np.int64) + 1
        if not stops.size or stops[-1] < size:
            stops = np.append(stops, size)
        starts = np.concatenate([[begin], stops[:-1]])
        if (stops - starts).max() > _LINE_LIMIT_BYTES:
            row = int((stops - starts).argmax())
            raise DataError(f"{self.name}: line {self._line(int(starts[row]))} has {int((stops - starts)[row])} bytes; "
                            f"at most {_LINE_LIMIT_BYTES} are read.")
        self._stops = stops
        return starts

    def _line(self, offset: int) -> int:
        return sum(self._data[k:min(k + _SCAN_BYTES, offset)].count(b"\n")
                   for k in range(0, offset, _SCAN_BYTES)) + 1

    def _read_header(self) -> None:
        keep = np.ones(len(self._starts), bool)
        for k in np.flatnonzero(self._stops - self._starts <= 2).tolist():
            keep[k] = bool(self._data[self._starts[k]:self._stops[k]].strip(b"\r\n"))
        if not keep.any():
            raise DataError(f"{self.name}: is empty; a header line and rows are needed.")
        first = int(keep.argmax())
        line = self._decode(bytes(self._data[self._starts[first]:self._stops[first]]), int(self._starts[first]))
        self._delimiter = max(",;\t", key=line.count)
        names = [name.strip() for name in self._split(line, int(self._starts[first]))[0]]
        if len(names) > _COLUMN_LIMIT:
            raise DataError(f"{self.name}: has {len(names)} columns; at most {_COLUMN_LIMIT} are read.")
        if len(names) == 1:                            # a blank line is then a missing value, but for the last ones
            keep[first:len(keep) - int(keep[::-1].argmax())] = True
        self._starts, self._stops = self._starts[keep], self._stops[keep]
        if all(NUMBER.fullmatch(name) for name in names):
            self.columns = tuple(f"column{k}" for k in range(len(names)))
            self.notes = (f"{self.name} has no header line; its columns are called {self.columns[0]} to "
                          f"{self.columns[-1]}",)
        else:
            _check_header(self.name, names)
            self.columns = tuple(names)
            self._starts, self._stops = self._starts[1:], self._stops[1:]
        self.num_rows = len(self._starts)

    def set_text(self, names: Sequence[str]) -> None:
        self._text = self._text | frozenset(names)

    def where(self, row: int) -> str:
        line = self._line(int(self._starts[row])) if 0 <= row < self.num_rows else 0
        return f"{self.name}: row {row} (line {line})"

    def read(self, start: int, stop: int) -> Rows:
        text = self._text
        while True:
            columns, found = self._read(start, min(stop, self.num_rows), text)
            if found <= text:
                return columns
            text = text | found                        # text in one block is text in all of them: once more

    def _read(self, start: int, stop: int, text: frozenset[str]) -> tuple[Rows, frozenset[str]]:
        if start >= stop:
            return {name: np.empty(0, object if name in text else float) for name in self.columns}, text
        blocks: list[np.ndarray | list] = []
        whole = None                                   # numbers go straight to their place; columns are views of it
        row = start
        while row < stop:
            limit = int(self._starts[row]) + _BLOCK_BYTES
            end = min(stop, max(row + 1, int(np.searchsorted(self._stops, limit, side="right"))))
            block = self._read_block(row, end, text)
            if isinstance(block, np.ndarray):
                if whole is None:
                    whole = np.empty((stop - start, len(self.columns)))
                whole[row - start:end - start] = block
                block = whole[row - start:end - start]
            blocks.append(block)
            row = end
        if all(isinstance(b, np.ndarray) for b in blocks):
            return {name: whole[:, k] for k, name in enumerate(self.columns)}, text
        columns: Rows = {}
        for k, name in enumerate(self.columns):
            parts = [b[:, k] if isinstance(b, np.ndarray) else b[k] for b in blocks]
            kinds = {p.dtype.kind for p in parts}
            if len(kinds) > 1:
                continue                               # read again, as text
            columns[name] = np.concatenate(parts)
        mixed = frozenset(name for name in self.columns if name not in columns)
        return columns, text | mixed

    def _read_block(self, start: int, stop: int, text: frozenset[str]) -> np.ndarray | list:
        base = int(self._starts[start])
        data = bytes(self._data[base:int(self._stops[stop - 1])])
        if not data.endswith(b"\n"):
            data += b"\n"
        if not text:
            block = parse_block(data, self._delimiter, len(self.columns))
            if block is not None and len(block) == stop - start:
                return block
        rows = self._split(self._decode(data, base), base)
        if len(self.columns) > 1:
            rows = [row for row in rows if row]
        else:
            rows = [row or [""] for row in rows]
        for k, fields in enumerate(rows):
            if len(fields) != len(self.columns):
                raise DataError(f"{self.where(start + k)} has {len(fields)} fields; the header has "
                                f"{len(self.columns)}.")
        if len(rows) != stop - start:
            raise DataError(f"{self.where(start)} and after: a quote stands inside an unquoted field; quote the whole "
                            "field and double the quote.")
        return [_column(list(values), name in text) for name, values in zip(self.columns, zip(*rows, strict=True),
                                                                            strict=True)]

    def _decode(self, data: bytes, base: int) -> str:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name}: line {self._line(base + error.start)}, byte {base + error.start} is not "
                            "UTF-8; save the file as UTF-8.") from None
        if "\0" in text:
            raise DataError(f"{self.name}: line {self._line(base + data.index(0))} holds a NUL byte; this is no text.")
        return text

    def _split(self, text: str, base: int) -> list[list[str]]:
        # not splitlines(), which also ends lines at form feeds and other scripts' separators
        lines = [line + "\n" for line in text.removesuffix("\n").split("\n")]
        reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
        try:
            return list(reader)
        except csv.Error as error:
            raise DataError(f"{self.name}: line {self._line(base) + max(reader.line_num - 1, 0)}: {error}.") from None


def _column(values: list[str], text: bool) -> np.ndarray:
    numbers = None if text else parse_values(values)
    if numbers is not None:
        return numbers
    out = np.empty(len(values), object)
    out[:] = [None if (v := value.strip()) in MISSING else v for value in values]
    return out


def _check_header(name: str, names: list[str]) -> None:
    seen: set[str] = set()
    for k, column in enumerate(names):
        if not column:
            raise DataError(f"{name}: column {k} has no name in the header line; give it one.")
        if column in seen:
            raise DataError(f"{name}: two columns are called {column!r} in the header line; names must differ.")
        seen.add(column)


def _map(path: str | os.PathLike) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as handle:
            if not os.fstat(handle.fileno()).st_size:
                raise DataError(f"{path}: is empty; a header line and rows are needed.")
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputMissing(f"{path}: cannot read this file ({error.strerror}).") from None
