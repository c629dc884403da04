"""Malformed inputs: random damage to bytes, and damage by what the format means.

`malformed(kind, number, seed)` is the whole interface: the same arguments give the same bytes.
"""

import functools
import gzip
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import corpus
import numpy as np

KINDS = ("hdf5", "csv", "npz", "idx", "toml", "json", "parquet")
LIMIT_BYTES = 1 << 19
_EDGES = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63,
          2**64 - 1)
_CELLS = ("", " ", "?", "NA", "nan", "inf", "-Infinity", "1e999", "1e-999", "-0", "+5", "1_000", "0x1f", "1,5", "1.5.5",
          "--1", "9" * 40, "9" * 5000, "1e", ".", "\u0663", "\xbd", "true", "None", "2026-11-27",
          "a\tb", '"', '""', "'", "\\",
          "\x00", "\x1b[31m", "\u2028", "\x0b", "\x0c", "\x85", "\ufeff", "\xe9", "\U0001f642", "=1+1",
          "#c", "a" * 70_000)
_TEXTS = ("", "a", "a\nb", "\x00", "\x1b[2J", "\ud800", "../x", "/etc/passwd", "\xe9" * 3, "x" * 300, "train.h5", "nan",
          "\u202e")
_NUMBERS = ("0", "-1", "1", "1.5", "1e999", "-1e999", "1e-999", "NaN", "Infinity", "-Infinity", "9" * 400, "9" * 5000,
            "2147483648", "9223372036854775808", "1E+2", "-0")


def malformed(kind: str, number: int, seed: int) -> tuple[str, bytes]:
    """Return (what the file is to be, its bytes) of case `number` of a kind.

    Local. What it is to be: a kind, or for json one of manifest, summary, metrics; for hdf5 also shard.
    """
    random = np.random.default_rng([seed, KINDS.index(kind), number])
    use, data = _MAKERS[kind](random)
    if random.random() < _RANDOM_SHARE[kind]:
        for _ in range(int(random.integers(1, 4))):
            data = damaged(data, random, _places(kind, data, random))
    return use, data[:LIMIT_BYTES]


@functools.cache
def _valid(kind: str) -> list[bytes]:
    return getattr(corpus, kind)(np.random.default_rng(0))


def _pick(random: Any, values: Any) -> Any:
    return values[int(random.integers(len(values)))]


def damaged(data: bytes, random: Any, place: Callable[[], int]) -> bytes:
    """Damage some bytes at places: flips, edge values, cuts, insertions, repetitions."""
    out = bytearray(data)
    if not out:
        return bytes(random.integers(0, 256, 20).astype(np.uint8))
    at = min(place(), len(out) - 1)
    act = int(random.integers(9))
    if act <= 1:
        for _ in range(int(random.integers(1, 9))):
            out[min(place(), len(out) - 1)] ^= 1 << int(random.integers(8))
    elif act == 2:
        out[at] = int(random.integers(256))
    elif act == 3:
        width = int(_pick(random, (1, 2, 4, 8)))
        value = (_pick(random, _EDGES) % 256**width).to_bytes(width, _pick(random, ("little", "big")))
        out[at:at + width] = value
    elif act == 4:
        out = out[:at]
    elif act == 5:
        out[at:at] = bytes(random.integers(0, 256, int(random.integers(1, 40))).astype(np.uint8))
    elif act == 6:
        del out[at:at + int(random.integers(1, 40))]
    elif act == 7:
        piece = bytes(out[at:at + int(random.integers(1, 200))])
        out[at:at] = piece * int(random.integers(1, 4))
    else:
        length = int(random.integers(1, 30))
        out[at:at + length] = bytes([_pick(random, (0, 255, 32))]) * length
    return bytes(out)


def _places(kind: str, data: bytes, random: Any) -> Callable[[], int]:
    """Where damage tells most: headers and footers, seldom the values."""
    size = max(1, len(data))
    marks = {"hdf5": (b"OHDR", b"TREE", b"HEAP", b"SNOD", b"FRHP", b"BTHD", b"\x01\x00\x0a", b"\x01\x01\x00\x00"),
             "npz": (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\x93NUMPY", b"descr"),
             "parquet": (b"PAR1",)}.get(kind, ())
    near = [data.find(mark, int(random.integers(size))) for mark in marks]
    near = [n for n in near if n >= 0]

    def place() -> int:
        chance = random.random()
        if near and chance < 0.5:
            return max(0, _pick(random, near) + int(random.integers(-8, 90)))
        if chance < 0.75:
            end = min(size, 64 if kind == "idx" else 2048)
            return int(random.integers(end)) if kind != "parquet" else size - 1 - int(random.integers(end))
        return int(random.integers(size))
    return place


def _hdf5(random: Any) -> tuple[str, bytes]:
    if random.random() < 0.25:
        return "hdf5", corpus.hostile_hdf5(random)
    data = _pick(random, _valid("hdf5"))
    return ("shard" if random.random() < 0.3 else "hdf5"), data


def _csv(random: Any) -> tuple[str, bytes]:
    data = _pick(random, _valid("csv"))
    if random.random() < 0.6:
        lines = [line.split(",") for line in data.decode("utf-8").split("\n")]
        for _ in range(int(random.integers(1, 8))):
            fields = lines[int(random.integers(len(lines)))]
            act = int(random.integers(4))
            if act == 0:
                fields.append(_pick(random, _CELLS))
            elif act == 1 and len(fields) > 1:
                fields.pop()
            else:
                fields[int(random.integers(len(fields)))] = _pick(random, _CELLS)
        text = _pick(random, ("\n", "\n", "\n", "\r\n", "\r", "\n\n")).join(
            _pick(random, (",", ",", ",", ";", "\t")).join(fields) for fields in lines)
        data = text.encode(_pick(random, ("utf-8",) * 6 + ("utf-16", "latin-1", "utf-8-sig", "utf-32")), "replace")
    return "csv", data


def _npz(random: Any) -> tuple[str, bytes]:
    if random.random() < 0.5:
        return "npz", _pick(random, _valid("npz"))
    members = []
    for name in ("x", "y", "weight")[:int(random.integers(1, 4))]:
        descr = _pick(random, ("'<f4'", "'<f8'", "'>i4'", "'|u1'", "'|b1'", "'|O'", "'<U3'", "'|S4'", "'<c16'", "'|V8'",
                               "'<M8[s]'", "'<U1000000000'", "[('a','<f4'),('b','<i4',(2,))]", "('<f4',(3,))", "None",
                               "'<f4\\x00'", "'f'", "[]", "'<f16'", "''", "('<f4',)", "[('a','|O')]", "'|V0'", "'<f2'",
                               "[('','<f4'),('','<f4')]", "{'names':['a'],'formats':['<f4']}"))
        shape = _pick(random, ("(24, 3)", "(24,)", "()", "(-1, 3)", "(24, 0)", "(0, 3)", "(2.0, 3)", "(True, 3)", "24",
                               "(4611686018427387904, 4)", f"({'9' * 400},)", "[24, 3]", "('a',)", "(24L, 3)",
                               "(" * 50 + ")" * 50, "(1," * 40 + ")" * 40, "(24, 3, 1, 1)", "(1,) * 3", "(1_2, 3)"))
        order = _pick(random, ("False", "True", "False", "False", "1", "None", "'a'"))
        version = _pick(random, ((1, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 0)))
        header = corpus.npy_header(descr, order, shape, version)
        if random.random() < 0.2:
            size = len(header)
            header = damaged(header, random, lambda size=size: int(random.integers(size)))
        values = random.integers(0, 3, 72).astype("<f4").tobytes()
        members.append((_pick(random, (name,) * 9 + ("../x", "/x", "x\x00y", "\xe9", "x" * 300)) + ".npy",
                        header + values[:int(_pick(random, (288, 288, 288, 96, 24, 0, 287)))]))
    if random.random() < 0.1:
        members.append(_pick(random, members))
    if random.random() < 0.05:
        members.append(("x.npy", corpus.npy_header("'|u1'", "False", "(4000000, 1)") + bytes(4_000_000)))
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                # doubled names
        data = corpus.zipped(members, _pick(random, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return "npz", data


def _idx(random: Any) -> tuple[str, bytes]:
    data = bytearray(_pick(random, _valid("idx")))
    if random.random() < 0.5 and data[:2] == b"\0\0":
        dims = int(_pick(random, (0, 1, 2, 3, 4, 30, 255)))
        code = int(_pick(random, (8, 9, 11, 12, 13, 14, 0, 10, 255)))
        sizes = [int(_pick(random, (0, 1, 2, 24, 2**16, 2**31, 2**32 - 1))) for _ in range(dims)]
        data = bytearray(struct.pack(f">HBB{dims}I", int(_pick(random, (0, 0, 0, 1))), code, dims, *sizes)) + data[16:]
        if random.random() < 0.6:                      # lengths that fit
            want = {8: 1, 9: 1, 11: 2, 12: 4, 13: 4, 14: 8}.get(code, 1)
            for size in sizes:
                want *= size
            data = data[:4 + 4 * dims] + bytes(random.integers(0, 256, min(want, 100_000)).astype(np.uint8))
    if random.random() < 0.25:
        data = bytearray(gzip.compress(bytes(data), mtime=0))
        if random.random() < 0.3:
            data += gzip.compress(bytes(200_000_000 if random.random() < 0.02 else 2_000_000), mtime=0)
    return "idx", bytes(data)


def _number_text(random: Any) -> str:
    return _pick(random, _NUMBERS)


def _toml(random: Any) -> tuple[str, bytes]:
    lines = _pick(random, _valid("toml")).decode("utf-8-sig").splitlines()
    keys = ("hidden", "lr", "epochs", "seed", "data", "sync", "resume", "quantiles", "class_weights", "momentum",
            "nokey", "hidden.a", '"a b"', "a" * 200, '"\\u0000"', "clip_norm", "staleness", "bucket_mb", "loss")
    values = ("true", '"x"', "'''\n'''", "[]", "{}", "{a=1}", "[[1],[2]]", "1979-05-27T07:32:00Z", "07:32:00", "nan",
              "-inf", "1e999", "9" * 400, "9" * 5000, "0x7fffffffffffffffff", "[" * 200 + "]" * 200, '"\\ud800"',
              '"' + "x" * 5000 + '"', "[1, 'a', 2.0]", "-1", "0", "[1.0]", '"auto"', "[true]", '"\\u001b[2J"',
              "[" + "1," * 3000 + "]", ".".join(["a"] * 500), "{" + ",".join(f"k{k}=1" for k in range(300)) + "}")
    for _ in range(int(random.integers(1, 5))):
        line = f"{_pick(random, keys)} = {_pick(random, values)}"
        act = random.random()
        if act < 0.1:
            line = ".".join(["a"] * int(random.integers(2, 30_000))) + " = 1"
        elif act < 0.2:
            line = "[" * int(random.integers(1, 3)) + _pick(random, keys) + "]"
        lines.insert(int(random.integers(len(lines) + 1)), line)
    return "toml", "\n".join(lines).encode("utf-8", "replace")


def _json(random: Any) -> tuple[str, bytes]:
    use = _pick(random, ("manifest", "manifest", "summary", "metrics"))
    data = getattr(corpus, use)(random)
    if random.random() < 0.7:
        lines = data.decode().splitlines() if use == "metrics" else [data.decode()]
        k = int(random.integers(len(lines)))
        lines[k] = _mutated_json(json.loads(lines[k]), random)
        data = ("\n".join(lines) + ("\n" if random.random() < 0.9 else "")).encode("utf-8", "surrogatepass")
    return use, data


def _mutated_json(value: Any, random: Any) -> str:
    """The text of a JSON value in which some members are of another type, missing, doubled, unknown or absurd."""
    spots: list[tuple[Any, Any]] = []

    def visit(item: Any) -> None:
        pairs = item.items() if isinstance(item, dict) else enumerate(item)
        for key, member in list(pairs):
            spots.append((item, key))
            if isinstance(member, dict | list):
                visit(member)
    visit(value)
    raw: dict[str, str] = {}
    for n in range(int(random.integers(1, 4))):
        item, key = _pick(random, spots)
        if isinstance(item, list) and key >= len(item):
            continue
        act = int(random.integers(8))
        if act == 0 and isinstance(item, dict):
            item.pop(key, None)
        elif act == 1 and isinstance(item, dict):
            item[_pick(random, _TEXTS)] = 1
        elif act == 2:
            raw[f"@{n}@"] = _number_text(random)
            item[key] = f"@{n}@"
        elif act == 3:
            item[key] = _pick(random, _TEXTS)
        elif act == 4:
            depth = int(_pick(random, (3, 300, 100_000)))
            raw[f"@{n}@"] = "[" * depth + "]" * depth
            item[key] = f"@{n}@"
        else:
            item[key] = _pick(random, (None, True, False, [], {}, 0, -1, 1.5, [1, "a", None], {"a": [1]}, "text",
                                       [None] * 5, ["a"] * 3, 2**70))
        if isinstance(item, list) and random.random() < 0.2 and item:
            item.pop()
    text = json.dumps(value)
    for mark, replacement in raw.items():
        text = text.replace(f'"{mark}"', replacement)
    if random.random() < 0.1 and text.startswith("{"):
        text = '{"name": 1, "name": 2, ' + text[1:]
    return text


_MAKERS = {"hdf5": _hdf5, "csv": _csv, "npz": _npz, "idx": _idx, "toml": _toml, "json": _json,
           "parquet": lambda random: ("parquet", _pick(random, _valid("parquet")))}
_RANDOM_SHARE = {"hdf5": 0.85, "csv": 0.5, "npz": 0.6, "idx": 0.5, "toml": 0.3, "json": 0.3, "parquet": 1.0}
