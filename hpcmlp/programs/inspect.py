"""Show what a shard, data set, run or checkpoint holds, and whether it is whole."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcmlp.comm.agreement import agreed
from hpcmlp.comm.messages import all_gather_bytes, broadcast_bytes
from hpcmlp.config import InspectConfig, load_toml
from hpcmlp.data.describe import describe_shard
from hpcmlp.data.manifest import FILE_NAME, Manifest, read_manifest
from hpcmlp.data.probe import probe
from hpcmlp.data.samples import allocate, open_shard, read_rows, row_bytes
from hpcmlp.errors import ConfigError, DataError, HpcmlpError, InputMissing, printable_lines
from hpcmlp.run import checkpoint
from hpcmlp.run.directory import to_json

_BLOCK_BYTES = 1 << 23
_LOG_LIMIT_BYTES = 1 << 30
_META_SHOWN = ("step", "network", "loss", "data", "dataset_digest", "progress", "best", "versions",
               "server")


def main(config: InspectConfig, comm: Any) -> int:
    """Inspect one path. Collective over `comm`: the ranks share the reading, rank 0 speaks. Writes no file.

    Returns 0 when all of it is whole, 65 when something is damaged, 66 when something is missing. What cannot be told
    apart as a shard, data set, run or checkpoint at all is raised as a HpcmlpError.
    """
    found = None
    with agreed(comm):
        if comm.rank == 0:
            found = _survey(config.path)
    found = json.loads(broadcast_bytes(comm, to_json(found).encode() if comm.rank == 0 else None))
    with agreed(comm):
        checks = _checks(found, config.verify)
    # every rank takes each size-th part, so that the reading is shared and the order of the table known
    mine = {str(i): _judge(checks[i]) for i in range(comm.rank, len(checks), comm.size)}
    judged: dict[str, Any] = {}
    for part in all_gather_bytes(comm, to_json(mine).encode()):
        judged |= json.loads(part)
    parts = found["parts"] = [judged[str(i)] for i in range(len(checks))]
    codes = {part["code"] for part in parts}
    code = next((c for c in (DataError.code, InputMissing.code) if c in codes), 0)
    found |= {"whole": code == 0, "verified": config.verify, "code": code}
    if comm.rank == 0:
        print(to_json(found) if config.json else printable_lines(_table(found)), flush=True)
    return code


def _judge(check: tuple[dict[str, Any], Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Run the check of one part; what it raises becomes its status."""
    part, body = check
    try:
        return {**part, "status": "whole", "code": 0, **body()}
    except HpcmlpError as error:
        status = "missing" if error.code == InputMissing.code else "damaged"
        return {**part, "status": status, "code": InputMissing.code if status == "missing" else DataError.code,
                "problem": str(error)}


def _survey(path: str) -> dict[str, Any]:
    """Return what kind of thing `path` is, what its small files say, and the names of its parts."""
    place = Path(path)
    if place.name in (FILE_NAME, "state.h5", "manifest.json") and place.is_file():
        place = place.parent
    if not os.path.lexists(place):
        raise InputMissing(f"{path}: there is no such file or directory.")
    if not place.is_dir():
        return _survey_shard(place)
    if (place / FILE_NAME).exists():
        return _survey_data(place)
    if (place / "state.h5").exists() or place.parent.name == "checkpoints":
        return {"kind": "checkpoint", "path": str(place), "names": [str(place)]}
    if any((place / name).exists() for name in ("config.toml", "checkpoints", "summary.json", "metrics.jsonl")):
        return _survey_run(place)
    raise InputMissing(f"{path}: is neither a data set (no {FILE_NAME}), nor a run, nor a checkpoint.")


def _survey_shard(place: Path) -> dict[str, Any]:
    found = {"kind": "shard", "path": str(place), "names": [place.name]}
    probe([place])
    try:
        manifest = read_manifest(place.parent)
    except HpcmlpError:
        return found
    for split, entries in manifest.splits.items():
        for number, entry in enumerate(entries):
            if entry.file == place.name:
                found |= {"data_set": manifest.name, "split": split, "number": number}
    return found


def _survey_data(place: Path) -> dict[str, Any]:
    manifest = read_manifest(place)
    listed = {entry.file for entries in manifest.splits.values() for entry in entries}
    probe([place / name for name in sorted(listed) if (place / name).exists()])
    return {"kind": "data set", "path": str(place), "name": manifest.name, "task": manifest.task,
            "num_features": manifest.num_features, "x_dtype": manifest.x_dtype, "num_outputs": manifest.num_outputs,
            "classes": manifest.classes, "target_names": manifest.target_names, "weighted": manifest.weighted,
            "class_counts": manifest.class_counts, "digest": manifest.digest(),
            "rows": {split: manifest.rows(split) for split in manifest.splits},
            "unlisted": sorted(name for name in os.listdir(place) if name.endswith(".h5") and name not in listed)}


def _survey_run(place: Path) -> dict[str, Any]:
    return {"kind": "run", "path": str(place), "in_use": (place / "lock").exists(),
            "files": [name for name in ("config.toml", "metrics.jsonl", "summary.json") if (place / name).exists()],
            "names": [str(path) for path in checkpoint.list_checkpoints(place)]}


def _checks(found: dict[str, Any], verify: bool) -> list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Return the parts of what was found, each with the function that checks it: the same list on all ranks."""
    place = Path(found["path"])
    if found["kind"] == "data set" or "data_set" in found:
        directory = place if found["kind"] == "data set" else place.parent
        manifest = read_manifest(directory)
        only = found.get("split"), found.get("number")
        return [({"file": entry.file, "split": split, "rows": entry.rows, "bytes": entry.bytes},
                 lambda split=split, number=number: _check_shard(directory, manifest, split, number, verify))
                for split, entries in manifest.splits.items() for number, entry in enumerate(entries)
                if only in ((None, None), (split, number))]
    if found["kind"] == "shard":
        return [({"file": place.name}, lambda: describe_shard(place, verify))]
    checks = [({"checkpoint": os.path.basename(name)}, lambda name=name: _check_checkpoint(name, verify))
              for name in found["names"]]
    if found["kind"] == "run":
        readers = {"config.toml": _check_config, "metrics.jsonl": _check_log, "summary.json": _check_summary}
        checks = [({"file": name}, lambda name=name: readers[name](place / name)) for name in found["files"]] + checks
    return checks


def _check_shard(directory: Path, manifest: Manifest, split: str, number: int, verify: bool) -> dict[str, Any]:
    """Compare one shard with the manifest; with `verify` hash it and look at every row."""
    with open_shard(directory, manifest, split, number, verify) as reader:
        if verify:
            rows = manifest.splits[split][number].rows
            block = max(1, _BLOCK_BYTES // row_bytes(manifest))
            scratch = allocate(min(block, rows), manifest)
            for start in range(0, rows, block):
                read_rows(reader, manifest, start, min(start + block, rows), scratch, 0)
    return {}


def _check_checkpoint(name: str, verify: bool) -> dict[str, Any]:
    if not verify:
        path = Path(name, "state.h5")
        try:
            return {"bytes": path.stat().st_size, "status": "not read"}
        except OSError as error:
            raise InputMissing(f"{path}: cannot read this file ({error.strerror}).") from None
    facts = checkpoint.describe(name)
    arrays = facts["arrays"]
    params = sum(a["bytes"] // 4 for path, a in arrays.items() if path.startswith("params/"))
    return {"bytes": facts["bytes"], "num_params": params, "arrays": arrays,
            "meta": {key: facts["meta"][key] for key in _META_SHOWN if key in facts["meta"]}}


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LOG_LIMIT_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes; at most {_LOG_LIMIT_BYTES} are read.")
        return path.read_bytes()
    except OSError as error:
        raise InputMissing(f"{path}: cannot read this file ({error.strerror}).") from None


def _check_config(path: Path) -> dict[str, Any]:
    try:
        return {"options": len(load_toml(str(path)))}
    except ConfigError as error:
        raise DataError(str(error)) from None


def _check_log(path: Path) -> dict[str, Any]:
    """Count the records of metrics.jsonl; a last line cut off by a kill is told, and no damage."""
    lines = _read(path).split(b"\n")
    torn = lines.pop()
    last = 0
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            last = max(last, record.get("step") or 0)
        except (ValueError, RecursionError, AttributeError, TypeError):
            raise DataError(f"{path}: line {number} is no JSON object.") from None
    return {"records": len(lines), "last_step": last, **({"torn_bytes": len(torn)} if torn else {})}


def _check_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(_read(path))
        return {"summary": {key: summary[key] for key in ("status", "steps", "ranks", "test", "parameters_sha256")
                            if key in summary}}
    except (ValueError, RecursionError, TypeError):
        raise DataError(f"{path}: this is not a JSON object.") from None


def _table(found: dict[str, Any]) -> str:
    """Return the findings as text for people."""
    about = {"data set": _about_data, "shard": _about_shard}.get(found["kind"], _about_run)(found)
    lines = [f"{found['kind']} {found['path']}", *(f"  {line}" for line in about)]
    rows = [(part.get("file") or part.get("checkpoint") or "", _amount(part), part["status"])
            for part in found["parts"]]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    lines += [f"  {name:<{widths[0]}}  {amount:>{widths[1]}}  {status}" for name, amount, status in rows]
    lines += [part["problem"] for part in found["parts"] if "problem" in part]
    sound = sum(part["code"] == 0 for part in found["parts"])
    depth = "" if found["verified"] else " (contents not read: --no-verify)"
    lines.append(f"whole{depth}" if found["whole"] else
                 f"not whole: {len(rows) - sound} of {len(rows)} parts damaged or missing")
    return "\n".join(lines)


def _amount(part: dict[str, Any]) -> str:
    told = []
    for key, word in (("rows", "rows"), ("options", "options"), ("records", "records"), ("num_params", "parameters")):
        if key in part:
            told.append(f"{part[key]:,} {word}")
    if "last_step" in part:
        told.append(f"to step {part['last_step']}")
    if "torn_bytes" in part:
        told.append("last line cut off")
    if "summary" in part:
        told.append(str(part["summary"].get("status", "")))
    if "bytes" in part:
        told.append(f"{part['bytes'] / 2**20:.2f} MiB")
    return ", ".join(told)


def _about_data(found: dict[str, Any]) -> list[str]:
    names = found["classes"] or found["target_names"]
    shown = ", ".join(names[:12]) + (", .." if len(names) > 12 else "")
    lines = [f"{found['name']}: {found['task']}, {found['num_features']} features ({found['x_dtype']}), "
             f"{found['num_outputs']} {'classes' if found['classes'] else 'targets'}: {shown}",
             "rows: " + ", ".join(f"{split} {rows:,}" for split, rows in found["rows"].items())
             + (", weighted" if found["weighted"] else ""), f"digest {found['digest']}"]
    if found["unlisted"]:
        lines.append("not in the manifest: " + ", ".join(found["unlisted"]))
    return lines


def _about_shard(found: dict[str, Any]) -> list[str]:
    if "data_set" in found:
        return [f"of data set {found['data_set']}, split {found['split']}"]
    part = found["parts"][0]
    lines = []
    for name, facts in part.get("arrays", {}).items():
        compression = f", {facts['compression']}" if facts["compression"] else ""
        lines.append(f"{name} {tuple(facts['shape'])} {facts['dtype']}, {facts['layout']}{compression}")
    for key in ("attributes", "class_counts", "y_mean", "y_std", "sha256"):
        if part.get(key):
            lines.append(f"{key} {part[key]}")
    return lines


def _about_run(found: dict[str, Any]) -> list[str]:
    lines = ["in use: there is a lock"] if found.get("in_use") else []
    metas = [part["meta"] for part in found["parts"] if "meta" in part]
    if metas:
        meta = metas[0]
        lines.append(f"step {meta.get('step')}, network {meta.get('network', {}).get('sizes')}")
        lines.append(f"trained on {meta.get('data')}")
        lines += _about_servers(meta.get("server"))
    elif not found["names"]:
        lines.append("no checkpoint yet")
    return lines


def _about_servers(told: dict[str, Any] | None) -> list[str]:
    """Return a line per server of a run with --sync server: its slice, version and bytes; nothing for other runs."""
    if not told:
        return []
    workers = told["workers"]
    lines = [f"{told['servers']} server(s), staleness {told['staleness']}; samples are loaded and gradients made by "
             f"ranks {workers[0]} to {workers[-1]}"]
    return lines + [f"rank {s['rank']} stores elements {s['start']:,} to {s['stop']:,} at version {s['version']}: "
                    f"{s['bytes']:,} bytes, {s['optimizer_bytes']:,} of optimizer state" for s in told["slices"]]
