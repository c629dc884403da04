"""CSV: numbers equal Python's float to the bit, any range of rows reads alike, and each fault names its place."""

import csv
import io
import random

import numpy as np
import pytest

from hpcmlp.data import csv_reader
from hpcmlp.data.csv_numbers import parse_block, parse_values
from hpcmlp.data.csv_reader import CsvTable
from hpcmlp.errors import DataError, InputMissing

ODD_NUMBERS = ["+5", "-0", "-0.0", "5.", ".5", "-.5", "1e5", "1E-7", "0001", "00000000000000000001", "1e400", "1e-400",
               "123456789012345", "1234567890123456", "9007199254740993", "0.00000000000000000000001", "4.9e-324"]
BAD_NUMBERS = ["-", "+", ".", "1-2", "--1", "1.2.3", "e", "1e", "a", "1 2", "-.", "+-1", "1e+", "1_0", "0x1", '"1"',
               "1e1.5", "\u0661", "-e5", "5e"]


def number_text(chosen):
    kind = chosen.random()
    if kind < 0.1:
        return ""
    if kind < 0.4:
        return repr(chosen.uniform(-1e3, 1e3))
    if kind < 0.5:
        return repr(chosen.uniform(-1, 1) * 10.0 ** chosen.randint(-30, 30))
    if kind < 0.7:
        return str(chosen.randint(-10 ** chosen.randint(0, 16), 10 ** chosen.randint(0, 20)))
    if kind < 0.85:
        return f"{chosen.uniform(-1, 1):.{chosen.randint(0, 14)}f}"
    return chosen.choice(ODD_NUMBERS)


def test_blocks_of_numbers_equal_float_to_the_bit_and_odd_ones_are_left_to_the_slow_path():
    chosen = random.Random(7)
    for _ in range(150):
        columns, rows = chosen.randint(1, 6), chosen.randint(1, 20)
        cells = [[number_text(chosen) for _ in range(columns)] for _ in range(rows)]
        text = "".join(",".join(row) + chosen.choice(["\n", "\r\n"]) for row in cells)
        got = parse_block(text.encode(), ",", columns)
        want = np.array([[float(v) if v else np.nan for v in row] for row in cells])
        assert got.shape == want.shape
        same = (got.view(np.int64) == want.view(np.int64)) | (np.isnan(got) & np.isnan(want))
        assert same.all(), cells
        cells[chosen.randrange(rows)][chosen.randrange(columns)] = chosen.choice(BAD_NUMBERS)
        assert parse_block("".join(",".join(row) + "\n" for row in cells).encode(), ",", columns) is None


def test_values_read_one_by_one_are_numbers_missing_or_text():
    got = parse_values([" 1.5 ", "NA", "", "?", "inf", "-Infinity", "nan", "3"])
    np.testing.assert_array_equal(got, [1.5, np.nan, np.nan, np.nan, np.inf, -np.inf, np.nan, 3])
    for bad in BAD_NUMBERS[:-5] + ["9" * 500]:
        assert parse_values(["1", bad]) is None or bad == '"1"'
    assert parse_values([]).shape == (0,)


@pytest.fixture
def table_of(tmp_path):
    def make(text, name="t.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return CsvTable(path)
    return make


MIXED = 'size, kind ,note\n1.5,red,"a, b"\n2,blue,"two\nlines"\n,NA,"say ""x"""\n-3e2,red,\n'


def test_mixed_columns_quotes_and_missing_values(table_of):
    for text in (MIXED, MIXED.replace("\n", "\r\n"), "\ufeff" + MIXED, MIXED.removesuffix("\n"), MIXED + "\n\n",
                 MIXED.replace("\n-3e2", "\n\n-3e2")):
        table = table_of(text)
        assert table.columns == ("size", "kind", "note") and table.num_rows == 4
        rows = table.read(0, 4)
        np.testing.assert_array_equal(rows["size"], [1.5, 2, np.nan, -300])
        assert rows["kind"].tolist() == ["red", "blue", None, "red"]
        assert [v and v.replace("\r", "") for v in rows["note"]] == ["a, b", "two\nlines", 'say "x"', None]


@pytest.mark.parametrize("block_bytes", [1, 60, 10**6])
def test_any_range_equals_the_whole_and_the_standard_reader(table_of, monkeypatch, block_bytes):
    monkeypatch.setattr(csv_reader, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(csv_reader, "_SCAN_BYTES", 31)
    chosen = random.Random(1)
    out = io.StringIO()
    writer = csv.writer(out)
    cells = [[number_text(chosen), chosen.choice(["a", 'b"b', "c,c", "d\nd", "e"]), chosen.randint(0, 9)]
             for _ in range(40)]
    writer.writerows([["n", "t", "k"], *cells])
    table = table_of(out.getvalue())
    whole = table.read(0, 40)
    assert whole["t"].tolist() == [row[1] for row in cells] and whole["k"].tolist() == [row[2] for row in cells]
    want = np.array([float(row[0]) if row[0] else np.nan for row in cells])
    np.testing.assert_array_equal(whole["n"], want)
    for start, stop in ((0, 0), (0, 1), (39, 40), (7, 23), (40, 40)):
        part = table.read(start, stop)
        for name, values in whole.items():
            assert np.array_equal(part[name], values[start:stop], equal_nan=name == "n")


def test_a_column_with_one_text_is_text_throughout_as_it_stands_in_the_file(table_of, monkeypatch):
    monkeypatch.setattr(csv_reader, "_BLOCK_BYTES", 8)
    table = table_of("a,b\n" + "01,1\n" * 20 + "x,2\n" + "1.0,3\n" * 5)
    rows = table.read(0, 26)
    assert rows["a"].tolist() == ["01"] * 20 + ["x"] + ["1.0"] * 5 and rows["b"].dtype == np.float64
    assert table.read(0, 3)["a"].dtype == np.float64
    table.set_text(["a"])
    assert table.read(0, 3)["a"].tolist() == ["01"] * 3


def test_headers_delimiters_and_single_columns(table_of):
    assert table_of("1,2\n3,4\n").columns == ("column0", "column1")
    assert table_of("1,2\n3,4\n").num_rows == 2 and "no header" in table_of("1,2\n3,4\n").notes[0]
    for delimiter in ";\t":
        assert table_of(f"a{delimiter}b\n1{delimiter}2\n").read(0, 1)["b"].tolist() == [2]
    single = table_of("a\n1\n\n3\n\n")
    np.testing.assert_array_equal(single.read(0, single.num_rows)["a"], [1, np.nan, 3])
    assert table_of("a,b\n").num_rows == 0 and table_of("a,b\n").read(0, 0)["a"].shape == (0,)
    np.testing.assert_array_equal(table_of("u\x0cv,b\n1,2\n").read(0, 1)["u\x0cv"], [1])


MALFORMED = {
    "empty": ("", "empty"), "blank": ("\n\n\r\n", "empty"), "utf-16": ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
    "gzip": (b"\x1f\x8b\x08\0aaaa", "gzip"), "zip": (b"PK\x03\x04aaaa", "zip"), "hdf5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "latin-1": (b"a,b\n1,2\n3,caf\xe9\n", "line 3, byte 13"), "nul": (b"a,b\n1,\0\n", "line 2 holds a NUL"),
    "short row": ("a,b,c\n1,2,3\n1,2\n", r"row 1 \(line 3\) has 2 fields; the header has 3"),
    "long row": ("a,b\n1,2\n3,4\n5,6,7\n", r"row 2 \(line 4\) has 3 fields"),
    "open quote": ('a,b\n1,2\n3,"4\n5,6\n', "quote opened at line 3 is never closed"),
    "text after quote": ('a,b\n1,"x"y\n', "line 2"), "quote inside": ('a,b\n1,5" tall and 6"\n2,"x\ny"\n3,a"b\n5,6\n',
                                                                      "quote"),
    "no name": ("a,,c\n1,2,3\n", "column 1 has no name"), "same name": ("a,b,a\n1,2,3\n", "two columns.*'a'"),
    "header not text": (b"a\xff,b\n1,2\n", "line 1"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_one_sentence_with_its_place(table_of, case):
    text, words = MALFORMED[case]
    with pytest.raises(DataError, match=words) as error:
        table = table_of(text)
        table.read(0, table.num_rows)
    assert "t.csv" in str(error.value) and "\n" not in str(error.value)


def test_a_line_without_end_is_refused(table_of, monkeypatch):
    monkeypatch.setattr(csv_reader, "_LINE_LIMIT_BYTES", 1000)
    with pytest.raises(DataError, match="line 2 has 2002 bytes"):
        table_of("a,b\n1," + "9" * 1999 + "\n")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputMissing, match="nothere.csv"):
        CsvTable(tmp_path / "nothere.csv")
