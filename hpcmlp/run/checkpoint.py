"""The checkpoints of a run: written beside, synced, renamed, named in a record; found again newest first, verified.

A checkpoint is a directory `checkpoints/step-00001000` with `state.h5` (see `run.state_file`) and `manifest.json`,
which holds its size and digest (see `run.pieces`); `checkpoints/record.json` names those that are on disk for certain.
The order of a save: both files written into a hidden directory and synced, that directory synced, renamed to a name
that was never used, `checkpoints/` synced; the record replaced in the same way; then only is it acknowledged, and older
ones deleted, but for the last `keep` and the best. So whenever the power fails, the last acknowledged one is whole,
under its name. A reader trusts no pointer: it takes the newest that passes its digests, and says what it passes over.
When a manifest is lost the arrays' own digests decide.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcmlp.data.files import (
    discard_directory,
    publish_directory,
    sync_directory,
    write_atomically,
    write_failure,
    write_new,
)
from hpcmlp.errors import CannotWrite, ConfigError, DataError, InputMissing
from hpcmlp.nn.network import NetworkSpec
from hpcmlp.run import pieces
from hpcmlp.run.sealed import Damaged, read_sealed, seal
from hpcmlp.run.state_file import FORMAT_VERSION, State, Streamed, UnknownFormat, file_pieces, parse, write_streamed
from hpcmlp.run.writer import Saved

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_TEMPORARY = re.compile(r"\.step-\d{8,}(-\d+)?\.[0-9a-f]+\.partial")
_RECORD = "record.json"
_DIGEST = "sha256_of_pieces"
_LOOKS = 3  # at a directory that changes while it is read


def _path(path: str | os.PathLike) -> "Path":
    """A Path, whose module is imported on the one rank that saves and reads: it costs 40 calls to the file system."""
    from pathlib import Path
    return Path(path)


def checkpoint_name(step: int, number: int = 1) -> str:
    """Return the name of the directory of the `number`-th checkpoint of `step`. Local."""
    return f"step-{step:08d}" if number == 1 else f"step-{step:08d}-{number}"


# ---- writing


def save(run_dir: str | os.PathLike, step: int, state: State | Streamed, keep: int = 2) -> "Path":
    """Write a checkpoint, make it durable, name it in the record, and delete the oldest beyond `keep` and the best.

    Local: one rank calls it, one call at a time. Raises CannotWrite; then all earlier checkpoints are as they were.
    """
    parent = _path(run_dir) / "checkpoints"
    make_room(run_dir)
    final = parent / _unused_name(parent, step)
    temporary = _hidden(final)
    try:
        temporary.mkdir()
    except OSError as error:
        raise CannotWrite(f"{parent}: cannot make a checkpoint here ({error.strerror}).") from None
    try:
        facts = _write_state(temporary / "state.h5", state)
        manifest = {"format_version": FORMAT_VERSION, "step": step, **facts}
        _write(temporary / "manifest.json", [seal(manifest)])
        publish_directory(temporary, final)
    except BaseException:
        discard_directory(temporary)
        raise
    best = state.meta.get("best", {}).get("step") if state.meta.get("has_best") else None
    kept, old = _sort_out(parent, keep, best)
    _write_record(parent, kept, {final.name: facts})
    for path in old:
        _delete(path)
    return final


def save_timed(run_dir: str | os.PathLike, state: State | Streamed, keep: int, copied_s: float) -> Saved:
    """As `save`, for a `run.writer.Writer`: tell what was saved and how long it took. Local."""
    begin = time.monotonic()
    path = save(run_dir, state.meta["step"], state, keep)
    return Saved(state.meta["step"], path.name, copied_s, time.monotonic() - begin)


def make_room(run_dir: str | os.PathLike) -> None:
    """Make the directory `checkpoints` in `run_dir`, durably, unless it is there. Local; raises CannotWrite."""
    run_dir = _path(run_dir).absolute()
    parent = run_dir / "checkpoints"
    if parent.is_dir():
        return
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for path in (run_dir, run_dir.parent):
            sync_directory(path)
    except OSError as error:
        raise CannotWrite(f"{parent}: cannot make a checkpoint here ({error.strerror}).") from None


def _write_state(path: "Path", state: State | Streamed) -> dict[str, Any]:
    if isinstance(state, Streamed):
        try:
            write_streamed(path, state)
            image, digest = pieces.read(path, mapped=True)
            return {"bytes": image.size, _DIGEST: digest}
        except OSError as error:
            raise CannotWrite(write_failure(path, error, state.num_bytes)) from None
    digest = pieces.PieceDigest()
    size = _write(path, file_pieces(state), digest, sum(a.nbytes for a in state.arrays.values()))
    return {"bytes": size, _DIGEST: digest.hexdigest()}


def _write(path: "Path", buffers: Any, digest: Any = None, about: int = 0) -> int:
    try:
        return write_new(path, buffers, digest)
    except OSError as error:
        raise CannotWrite(write_failure(path, error, about)) from None


def _hidden(path: "Path") -> "Path":
    """A new name beside `path` that no reader looks at."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")


def _unused_name(parent: "Path", step: int) -> str:
    """The same step is saved again after falling back: under a name of its own, so that nothing is ever replaced."""
    number = max((n for _, s, n in _names(parent) if s == step), default=0) + 1
    return checkpoint_name(step, number)


def _sort_out(parent: "Path", keep: int, best: int | None) -> "tuple[list[Path], list[Path]]":
    """Return the checkpoints to keep and those to delete: of each step the last, of these the newest and the best."""
    seen: set[int] = set()
    kept, old = [], []
    for path, step in ((parent / name, step) for name, step, _ in _names(parent)):
        fresh = step not in seen and (len(seen) < keep or step == best)
        seen.add(step)
        (kept if fresh else old).append(path)
    return kept, old


def _write_record(parent: "Path", kept: "list[Path]", new: dict[str, Any]) -> None:
    try:
        known = (read_sealed(parent / _RECORD) or {}).get("saved", {})
    except Damaged:
        known = {}
    saved = {path.name: new.get(path.name) or known.get(path.name) or {} for path in kept}
    write_atomically(parent / _RECORD, seal({"format_version": FORMAT_VERSION, "saved": saved}))


def _delete(path: "Path") -> None:
    # Out of the readers' sight first: a half-deleted checkpoint must not look like a damaged one.
    hidden = _hidden(path)
    try:
        os.rename(path, hidden)
    except OSError as error:
        raise CannotWrite(f"{path}: cannot delete this old checkpoint ({error.strerror}).") from None
    discard_directory(hidden)


def set_aside(run_dir: str | os.PathLike, after: "Path | None") -> list[str]:
    """Rename the checkpoints newer than the one at `after` (all for None) so that none is taken again or counted.

    Local; only the owner of the run's lock may call it, when a run goes on from `after`. Nothing is deleted: they are
    called `aside-step-...` then, which is returned. Raises CannotWrite.
    """
    parent = _path(run_dir) / "checkpoints"
    newest = list_checkpoints(run_dir)
    newer = newest[:newest.index(after)] if after is not None else newest
    if not newer:
        return []
    _write_record(parent, newest[len(newer):], {})
    names = []
    try:
        for path in newer:
            number = 1
            while (parent / (name := f"aside-{path.name}" + f".{number}" * (number > 1))).exists():
                number += 1
            os.rename(path, parent / name)
            names.append(name)
        sync_directory(parent)
    except OSError as error:
        raise CannotWrite(f"{parent}: cannot set a checkpoint aside ({error.strerror}).") from None
    return names


def remove_leftovers(run_dir: str | os.PathLike) -> None:
    """Remove unfinished checkpoints of a killed run, and make certain what it has left of finished ones.

    Local; only the owner of the run's lock may call it. Raises CannotWrite.
    """
    parent = _path(run_dir) / "checkpoints"
    if not parent.is_dir():
        return
    try:
        sync_directory(parent)  # one that was renamed and not yet acknowledged is gone on from
    except OSError as error:
        raise CannotWrite(f"{parent}: cannot sync this directory ({error.strerror}).") from None
    for path in parent.glob(".step-*"):
        if _TEMPORARY.fullmatch(path.name) or path.name.endswith(".old"):
            discard_directory(path)
    for path in parent.glob(f".{_RECORD}.*.partial"):
        path.unlink(missing_ok=True)


# ---- reading


def _names(parent: "Path") -> list[tuple[str, int, int]]:
    """Return (name, step, number) of the checkpoints in `parent`, newest first."""
    try:
        names = os.listdir(parent)
    except OSError:
        return []
    found = [(name, int(m.group(1)), int(m.group(2) or 1)) for name in names if (m := _NAME.fullmatch(name))]
    return sorted(found, key=lambda entry: entry[1:], reverse=True)


def list_checkpoints(run_dir: str | os.PathLike) -> "list[Path]":
    """Return the checkpoint directories of a run, newest step first. Local."""
    parent = _path(run_dir) / "checkpoints"
    return [parent / name for name, _, _ in _names(parent)]


def read(path: str | os.PathLike) -> State:
    """Read one checkpoint and verify every byte of it.

    Local. The arrays are views of one block of memory. Raises DataError naming what is wrong, InputMissing when its
    files are not there, ConfigError for a format that this program does not know.
    """
    return _read(_path(path))[0]


def _read(path: "Path", mapped: bool = False) -> tuple[State, list[str]]:
    """Return the state, and what is wrong beside it."""
    notes, manifest = [], None
    try:
        manifest = read_sealed(path / "manifest.json")
        why = "is not there"
    except Damaged as damage:
        why = str(damage)
    try:
        image, digest = pieces.read(path / "state.h5", mapped)
    except OSError as error:
        raise InputMissing(f"{path / 'state.h5'}: cannot read this file ({error.strerror}).") from None
    try:
        if manifest is None:
            notes.append(f"{path / 'manifest.json'} {why}; the digests of the arrays themselves are right.")
        elif manifest.get("bytes") != image.size:
            raise ValueError(f"{image.size} bytes, {manifest.get('bytes')} expected")
        elif _DIGEST not in manifest:  # of before there were pieces
            if manifest.get("sha256") != hashlib.sha256(image).hexdigest():
                raise ValueError("sha256 differs")
        elif manifest[_DIGEST] != digest:
            raise ValueError("sha256 differs")
        return parse(image, check_arrays=manifest is None), notes
    except ValueError as error:
        raise DataError(f"{path}: state.h5 is damaged ({error}).") from None
    except UnknownFormat as error:
        if manifest is None:  # then it may as well be a damaged number
            raise DataError(f"{path}: state.h5 is damaged, or of another program ({error}).") from None
        raise ConfigError(f"{path}: {error}.") from None


def newest_good(run_dir: str | os.PathLike, accept: Callable[[State], str | None] | None = None,
                ) -> tuple[State | None, list[str]]:
    """Return the newest checkpoint that is whole, and a sentence for all that is not as it was saved.

    Local. (None, []) when the run has no checkpoint at all. `accept` returns why a whole one will not do, or None.
    Raises DataError when there are some, or were by the record, and none is good: a run never starts afresh in silence.
    """
    path, state, notes = find_newest(run_dir, accept)
    return state, notes


def find_newest(run_dir: str | os.PathLike, accept: Callable[[State], str | None] | None = None,
                mapped: bool = False) -> "tuple[Path | None, State | None, list[str]]":
    """As `newest_good`, with the path of what it found first. Local.

    mapped : the state's arrays are views of the mapped file, which takes no memory that the system could not take back.
    """
    for _ in range(_LOOKS):
        found = list_checkpoints(run_dir)
        notes = []
        for path in found:
            try:
                state, remarks = _read(path, mapped)
            except (DataError, InputMissing) as error:
                notes.append(str(error))
                continue
            reason = accept(state) if accept is not None else None
            if reason is None:
                notes += _gone(run_dir, found, path)
                return path, state, [*notes, *[f"{path} is taken instead."] * bool(notes), *remarks]
            notes.append(f"{path}: {reason}.")
        # A run that is still writing may have deleted what was listed, and saved a newer one.
        if list_checkpoints(run_dir) == found:
            break
    notes += _gone(run_dir, found, None)
    if notes:
        raise DataError(f"{run_dir}: no checkpoint is whole: {' '.join(notes)}")
    return None, None, []


def _gone(run_dir: str | os.PathLike, found: "list[Path]", taken: "Path | None") -> list[str]:
    """Return what the record says and the directory lacks, of checkpoints newer than the one taken."""
    parent = _path(run_dir) / "checkpoints"
    try:
        record = read_sealed(parent / _RECORD) or {}
        names = set(record.get("saved", {}))
    except (Damaged, TypeError) as error:
        return [f"{parent / _RECORD} {error}."]
    newest = _key(taken.name) if taken is not None else (-1, 0)
    lost = sorted(name for name in names - {path.name for path in found} if _key(name) > newest)
    return [f"{parent / name} was saved and is not there." for name in lost if not (parent / name).exists()]


def _key(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(name)
    return (int(match.group(1)), int(match.group(2) or 1)) if match else (-1, 0)


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


# ---- using


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
    # Before anything in it is read: of a name that no directory can have nothing is damaged.
    state = newest_good(run_dir)[0] if os.path.isdir(run_dir) else None
    if state is None:
        what = "has no checkpoint yet" if os.path.isdir(run_dir) else "is no run directory"
        raise InputMissing(f"{run_dir}: {what}; give the --out of a 'hpcmlp train'.")
    meta = state.meta
    params = state.group("best") if which == "best" else {}
    step = meta["best"]["step"] if params else meta["step"]
    params = params or state.group("average") or state.group("params")
    params = {name: array.copy() for name, array in params.items()}  # the state's memory may go
    spec = NetworkSpec(**{**meta["network"], "sizes": tuple(meta["network"]["sizes"])})
    layout = spec.layout()
    return Model(spec=spec, params=params, step=step, loss=meta["loss"], data=meta["data"],
                 parameters_sha256=layout.sha256(layout.pack(params)), **meta["model"])
