"""The manifest of a data set directory: `dataset.json`, what the shards hold and how raw rows became x and y."""

import hashlib
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

from hpcmlp.data.files import write_atomically
from hpcmlp.errors import DataError, InputMissing

FILE_NAME = "dataset.json"
FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
TASKS = ("classification", "regression", "multilabel")
X_DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "float16", "float32", "float64")
_LIMIT_BYTES = 1 << 28
_MOST_DIGITS = 20                                      # of a whole number: they stay below 2^67
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.h5")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest knows it: file name, rows, bytes and sha256 of the whole file."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a prepared data set but the samples themselves.

    `load_shift`, `load_scale`: (num_features,) lists, only for integer `x`: x_float = (x - shift) * scale.
    `target_shift`, `target_scale`: (k,) lists for regression: y_physical = y * scale + shift.
    `preprocessing` is what `data.preprocess.Preprocessor.from_dict` takes.
    """

    name: str
    task: str
    num_features: int
    x_dtype: str
    feature_names: list[str]
    splits: dict[str, tuple[ShardEntry, ...]]
    classes: list[str] | None = None
    target_names: list[str] = field(default_factory=list)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    load_shift: list[float] | None = None
    load_scale: list[float] | None = None
    target_shift: list[float] | None = None
    target_scale: list[float] | None = None
    class_counts: dict[str, list[int]] | None = None
    weighted: bool = False
    format_version: int = FORMAT_VERSION

    @property
    def num_outputs(self) -> int:
        """Width of the network's last layer: classes of a classification, else targets."""
        return len(self.classes) if self.task == "classification" else len(self.target_names)

    def rows(self, split: str) -> int:
        """Return how many rows a split has; 0 when there is no such split. Local."""
        return sum(entry.rows for entry in self.splits.get(split, ()))

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as JSON-able values. Local."""
        values = asdict(self)
        return {**values, "splits": {split: list(entries) for split, entries in values["splits"].items()}}

    def digest(self) -> str:
        """Return the sha256 over the whole manifest, hence over the digests of all shards too. Local."""
        return _digest(self.to_dict())

    def preprocessing_digest(self) -> str:
        """Return the sha256 over what turns raw rows into inputs and outputs into units and names. Local."""
        keys = ("task", "num_features", "x_dtype", "feature_names", "classes", "target_names", "preprocessing",
                "load_shift", "load_scale", "target_shift", "target_scale")
        return _digest({key: getattr(self, key) for key in keys})


def _digest(value: Any) -> str:
    import json  # where a file is read or written: ranks that are given the manifest do without
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(directory: str | os.PathLike, manifest: Manifest) -> None:
    """Write `dataset.json` into `directory`, atomically. Local; raises CannotWrite."""
    import json
    text = json.dumps(manifest.to_dict(), indent=1, allow_nan=False, ensure_ascii=True)
    write_atomically(os.path.join(directory, FILE_NAME), text.encode() + b"\n")


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """Read and check `dataset.json` of a data set directory.

    Local. Raises InputMissing when it is not there, DataError when it is not a sound manifest.
    """
    import json
    path = os.path.join(directory, FILE_NAME)
    try:
        with open(path, "rb") as file:
            data = file.read(_LIMIT_BYTES + 1)
        if len(data) > _LIMIT_BYTES:
            raise DataError(f"{path}: more than {_LIMIT_BYTES} bytes; a manifest has at most that many.")
    except OSError as error:
        what = "is no data set directory made by 'hpcmlp prepare'" if os.path.isdir(directory) else "cannot be read"
        raise InputMissing(f"{directory}: {what}: {FILE_NAME}: {error.strerror}.") from None
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant,
                            parse_float=_finite_number, parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: this is not a manifest: {str(error) or 'nested too deeply'}.") from None
    try:
        return manifest_from_dict(values)
    except _Unsound as error:
        raise DataError(f"{path}: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return values


def _finite_number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _whole_number(text: str) -> int:
    return int(text) if len(text) <= _MOST_DIGITS else _refuse_constant(text[:_MOST_DIGITS] + "...")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number that is read here")


class _Unsound(Exception):
    """What is wrong with the values of a manifest, without the file name."""


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise _Unsound(text)


def manifest_from_dict(values: Any) -> Manifest:
    """Return the Manifest with these JSON values, all types, names and lengths checked. Local."""
    _require(type(values) is dict, "a manifest is a JSON object.")
    version = values.get("format_version")
    _require(version == FORMAT_VERSION and type(version) is int,
             f"format_version is {version!r}; this program reads {FORMAT_VERSION}: prepare the data set again.")
    known = {f.name for f in fields(Manifest)}
    odd = sorted(known.symmetric_difference(values))
    _require(not odd, f"keys missing or unknown: {', '.join(map(repr, odd[:5]))}.")
    _require(values["task"] in TASKS, f"task is {values['task']!r}; it is one of {', '.join(TASKS)}.")
    _require(values["x_dtype"] in X_DTYPES, f"x_dtype is {values['x_dtype']!r}; it is one of {', '.join(X_DTYPES)}.")
    _require(type(values["name"]) is str and type(values["weighted"]) is bool and type(values["preprocessing"]) is dict,
             "name, weighted and preprocessing must be a text, true or false, and an object.")
    width = values["num_features"]
    _require(type(width) is int and width >= 1, f"num_features is {width!r}; it must be at least 1.")
    _check_lists(values, width)
    counts = values["class_counts"]
    _require(counts is None or (type(counts) is dict and all(
        type(v) is list and all(type(n) is int and n >= 0 for n in v) for v in counts.values())),
        "class_counts must hold a list of counts per split.")
    splits = values["splits"]
    _require(type(splits) is dict and set(splits) <= set(SPLITS), f"splits must be among {', '.join(SPLITS)}.")
    entries = {split: tuple(_shard_entry(split, e) for e in _list(splits[split])) for split in splits}
    files = [e.file for shards in entries.values() for e in shards]
    _require(len(set(files)) == len(files), "one shard file is listed twice.")
    return Manifest(**{**values, "splits": entries})


def _list(value: Any) -> list:
    return value if type(value) is list else []


def _check_lists(values: dict[str, Any], width: int) -> None:
    k = len(_list(values["target_names"]))
    for key, length, kind in (("feature_names", width, str), ("classes", None, str), ("target_names", None, str),
                              ("load_shift", width, float), ("load_scale", width, float),
                              ("target_shift", k, float), ("target_scale", k, float)):
        value = values[key]
        if value is None and key not in ("feature_names", "target_names"):
            continue
        legal = (str,) if kind is str else (int, float)
        _require(type(value) is list and all(type(v) in legal for v in value), f"{key} must be a list.")
        _require(kind is str or all(math.isfinite(v) for v in value), f"{key} must hold finite numbers.")
        _require(length is None or len(value) == length, f"{key} has {len(value)} entries; it must have {length}.")
    if values["task"] == "classification":
        _require(bool(values["classes"]), "a classification needs its classes.")
    else:
        _require(k >= 1, "target_names is empty.")


def _shard_entry(split: str, value: Any) -> ShardEntry:
    kinds = {"file": str, "rows": int, "bytes": int, "sha256": str}
    sound = (type(value) is dict and set(value) == set(kinds) and all(type(value[k]) is t for k, t in kinds.items())
             and _SHARD_NAME.fullmatch(value["file"]) and _SHA256.fullmatch(value["sha256"])
             and value["rows"] >= 0 and value["bytes"] >= 0)
    _require(bool(sound), f"an entry of split {split!r} is not a shard (file, rows, bytes, sha256).")
    return ShardEntry(**value)
