"""Checkpoints: whole arrays by name, saved atomically, verified when read, opened on any number of ranks.

A checkpoint is a directory `step-00001000` with `state.h5` and `manifest.json`. The HDF5 image is built in
memory and written by plain writes, synced and renamed, so that the HDF5 library never touches a file that has a
final name. The manifest holds sha256 and size of the image; each array carries its own sha256 too, so that a lost
manifest loses nothing. Nothing in a checkpoint is executed: arrays, and JSON for the rest.
"""

import hashlib
import io
import json
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from hpcmlp.data.files import discard_directory, publish_directory, write_atomically
from hpcmlp.errors import CannotWrite, ConfigError, DataError, InputMissing
from hpcmlp.nn.network import NetworkSpec

if TYPE_CHECKING:
    from pathlib import Path

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.step-\d{8,}\.[0-9a-f]+\.partial")
_MANIFEST_LIMIT_BYTES = 1 << 20


@dataclass
class State:
    """What a checkpoint holds: `meta` (JSON values) and `arrays` by path, such as `params/layers.0.weight`."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def group(self, name: str) -> dict[str, np.ndarray]:
        """Return the arrays below `name`, by the rest of their path. Local."""
        return {path[len(name) + 1:]: a for path, a in self.arrays.items() if path.startswith(name + "/")}


def _path(path: str | os.PathLike) -> "Path":
    """A Path, whose module is imported on the one rank that saves and reads: it costs 40 calls to the file system."""
    from pathlib import Path
    return Path(path)


def finite(value: Any) -> Any:
    """Return JSON-able `value` with None in place of numbers that are not finite. Local."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint of `step`. Local."""
    return f"step-{step:08d}"


def save(run_dir: str | os.PathLike, step: int, state: State, keep: int = 2) -> "Path":
    """Write a checkpoint, make it durable, and delete the oldest beyond `keep`.

    Local: one rank calls it. Raises CannotWrite; then all earlier checkpoints are as they were.
    """
    parent = _path(run_dir) / "checkpoints"
    final = parent / checkpoint_name(step)
    image = _image(state)
    manifest = {"format_version": FORMAT_VERSION, "step": step, "bytes": len(image),
                "sha256": hashlib.sha256(image).hexdigest()}
    temporary = parent / f".{final.name}.{os.urandom(4).hex()}.partial"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise CannotWrite(f"{parent}: cannot make a checkpoint here ({error.strerror}).") from None
    try:
        write_atomically(temporary / "state.h5", image)
        write_atomically(temporary / "manifest.json", json.dumps(manifest).encode() + b"\n")
        if final.exists():  # the same step again, after falling back to an older one
            os.rename(final, temporary.with_name(temporary.name.replace(".partial", ".old")))
        publish_directory(temporary, final)
    except BaseException:
        discard_directory(temporary)
        raise
    _remove_old(parent, keep)
    return final


def _remove_old(parent: "Path", keep: int) -> None:
    for path in list_checkpoints(parent.parent)[keep:]:
        # Out of the readers' sight first: a half-deleted checkpoint must not look like a damaged one.
        hidden = parent / f".{path.name}.{os.urandom(4).hex()}.partial"
        os.rename(path, hidden)
        discard_directory(hidden)
    for path in parent.glob(".step-*.old"):
        discard_directory(path)


def remove_leftovers(run_dir: str | os.PathLike) -> None:
    """Remove unfinished checkpoints of a killed run. Local; only the owner of the run's lock may call it."""
    for path in (_path(run_dir) / "checkpoints").glob(".step-*"):
        if _TEMPORARY.fullmatch(path.name) or path.name.endswith(".old"):
            discard_directory(path)


def _image(state: State) -> bytes:
    """Return the bytes of an HDF5 file with the state; the same state gives the same bytes."""
    with h5py.File("image", "w", driver="core", backing_store=False, block_size=1 << 20) as file:
        file.attrs["format_version"] = FORMAT_VERSION
        meta = json.dumps(finite(state.meta), allow_nan=False, sort_keys=True).encode()
        _write_array(file, "meta.json", np.frombuffer(meta, np.uint8))
        for path, array in state.arrays.items():
            _write_array(file, path, array)
        file.flush()
        return file.id.get_file_image()


def _write_array(file: h5py.File, path: str, array: np.ndarray) -> None:
    array = np.ascontiguousarray(array)
    data = file.create_dataset(path, data=array, track_times=False)
    data.attrs["sha256"] = hashlib.sha256(array).hexdigest()


def list_checkpoints(run_dir: str | os.PathLike) -> "list[Path]":
    """Return the checkpoint directories of a run, newest step first. Local."""
    parent = _path(run_dir) / "checkpoints"
    try:
        found = [(int(m.group(1)), parent / name) for name in os.listdir(parent) if (m := _NAME.fullmatch(name))]
    except OSError:
        return []
    return [path for _, path in sorted(found, reverse=True)]


def read(path: str | os.PathLike) -> State:
    """Read one checkpoint and verify every byte of it.

    Local. Raises DataError naming what is wrong, InputMissing when its files are not there.
    """
    path = _path(path)
    image = _read_image(path)
    try:
        with h5py.File(io.BytesIO(image), "r") as file:
            version = int(file.attrs["format_version"])
            if version != FORMAT_VERSION:
                raise ConfigError(f"{path}: checkpoint format {version}; this program reads {FORMAT_VERSION}.")
            arrays = _read_arrays(path, file)
        meta = json.loads(arrays.pop("meta.json").tobytes())
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: state.h5 is damaged ({type(error).__name__}: {error}).") from None
    return State(meta, arrays)


def _read_image(path: "Path") -> bytes:
    try:
        image = (path / "state.h5").read_bytes()
    except OSError as error:
        raise InputMissing(f"{path}/state.h5: cannot read this file ({error.strerror}).") from None
    try:
        text = (path / "manifest.json").read_bytes()[:_MANIFEST_LIMIT_BYTES]
        manifest = json.loads(text)
        size, digest = manifest["bytes"], manifest["sha256"]
    except OSError:
        return image  # the arrays' own digests decide
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}/manifest.json is damaged.") from None
    if size != len(image):
        raise DataError(f"{path}: state.h5 has {len(image)} bytes, {size} expected.")
    if digest != hashlib.sha256(image).hexdigest():
        raise DataError(f"{path}: state.h5 is damaged (sha256 differs).")
    return image


def _read_arrays(path: "Path", file: h5py.File) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        plain = item.dtype.kind in "fiu" and item.chunks is None and not item.external and not item.is_virtual
        if not plain or item.id.get_storage_size() != item.size * item.dtype.itemsize:
            raise ValueError(f"{name} is no plain array")
        arrays[name] = item[...]
        if hashlib.sha256(np.ascontiguousarray(arrays[name])).hexdigest() != item.attrs["sha256"]:
            raise ValueError(f"sha256 of {name} differs")

    file.visititems(visit)
    return arrays


def newest_good(run_dir: str | os.PathLike) -> tuple[State | None, list[str]]:
    """Return the newest checkpoint that is whole, and one sentence for every damaged one passed over.

    Local. (None, []) when the run has no checkpoint at all. Raises DataError when there are some and all are damaged:
    a run never starts afresh in silence.
    """
    damaged = []
    for path in list_checkpoints(run_dir):
        try:
            return read(path), damaged
        except (DataError, InputMissing) as error:
            damaged.append(str(error))
    if damaged:
        raise DataError(f"{run_dir}: no checkpoint is whole: {' '.join(damaged)}")
    return None, []


def verify(path: str | os.PathLike) -> None:
    """Raise DataError or InputMissing unless the checkpoint is whole. Local."""
    read(path)


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """Return what a checkpoint holds, as JSON-able values: meta, and shape, dtype and bytes of every array. Local."""
    state = read(path)
    arrays = {name: {"shape": list(a.shape), "dtype": str(a.dtype), "bytes": a.nbytes}
              for name, a in state.arrays.items()}
    return {"path": str(path), "meta": state.meta, "arrays": arrays,
            "bytes": os.path.getsize(_path(path) / "state.h5")}


@dataclass
class Model:
    """A trained network with all that is needed to use it on new data.

    `params` maps tensor names to float32 arrays; the other fields are those of the data set's manifest.
    """

    spec: NetworkSpec
    params: dict[str, np.ndarray]
    task: str
    classes: list[str] | None
    target_names: list[str]
    feature_names: list[str]
    x_dtype: str
    preprocessing: dict[str, Any]
    preprocessing_digest: str
    load_shift: list[float] | None
    load_scale: list[float] | None
    target_shift: list[float] | None
    target_scale: list[float] | None
    loss: dict[str, Any]
    data: str
    step: int
    parameters_sha256: str

    @property
    def num_features(self) -> int:
        """Width of the network's input."""
        return self.spec.sizes[0]


def load_model(run_dir: str | os.PathLike, which: str = "best") -> Model:
    """Load the model of a run from its newest good checkpoint.

    Local. `which`: "best" is the best state by validation (the averaged weights where they are kept), or the last
    state when nothing was validated; "last" is the newest state. Raises InputMissing when there is no checkpoint.
    """
    state, _ = newest_good(run_dir)
    if state is None:
        what = "has no checkpoint yet" if _path(run_dir).is_dir() else "is no run directory"
        raise InputMissing(f"{run_dir}: {what}; give the --out of a 'hpcmlp train'.")
    meta = state.meta
    params = state.group("best") if which == "best" else {}
    step = meta["best"]["step"] if params else meta["step"]
    params = params or state.group("average") or state.group("params")
    spec = NetworkSpec(**{**meta["network"], "sizes": tuple(meta["network"]["sizes"])})
    layout = spec.layout()
    return Model(spec=spec, params=params, step=step, loss=meta["loss"], data=meta["data"],
                 parameters_sha256=layout.sha256(layout.pack(params)), **meta["model"])
