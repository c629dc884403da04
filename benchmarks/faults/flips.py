"""Single bit flips and truncations of checkpoints and shards: every one is noticed, and answered as promised.

Checkpoints: one of two is damaged (its state, its manifest, or the record of both); the reader must return the values
that were saved, of the newest where only a small file is damaged, else of the one before, and say what it found.
Shards: opened as training opens them, with the digests of the manifest; the damage must end in one sentence.

    python benchmarks/faults/campaign.py flips --count 10000
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpcmlp.data.manifest import read_manifest
from hpcmlp.data.samples import open_shard
from hpcmlp.errors import HpcmlpError
from hpcmlp.run import checkpoint
from hpcmlp.run.state_file import State


def damaged(content: bytes, chance: random.Random, cut: bool) -> bytes:
    """One bit flipped, or the end cut off."""
    if cut:
        return content[:chance.randrange(len(content))]
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1:]


def make_run(run: Path) -> dict[int, State]:
    values, states = np.random.default_rng(0), {}
    for step in (1, 2):
        arrays = {f"{group}/layers.{k}.{name}": values.standard_normal(shape).astype(np.float32)
                  for group in ("params", "optimizer/m", "optimizer/v") for k in range(2)
                  for name, shape in (("weight", (12, 9)), ("bias", (12,)))}
        states[step] = State({"step": step, "text": "x" * 50}, arrays)
        checkpoint.save(run, step, states[step])
    return states


def equal(one: State, other: State) -> bool:
    return one.meta == other.meta and one.arrays.keys() == other.arrays.keys() and all(
        np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def flip_checkpoint(run: Path, states: dict[int, State], chance: random.Random, cut: bool) -> str | None:
    """Damage one file and read; return what is wrong with the answer, or None."""
    name = chance.choice(("state.h5",) * 4 + ("manifest.json", "record.json"))
    path = run / "checkpoints" / ("" if name == "record.json" else "step-00000002") / name
    whole = path.read_bytes()
    changed = damaged(whole, chance, cut)
    path.write_bytes(changed)
    try:
        found, notes = checkpoint.newest_good(run)
    except HpcmlpError as error:
        return f"{name}: {error}"
    finally:
        path.write_bytes(whole)
    step = 1 if name == "state.h5" else 2
    if found.meta.get("step") != step or not equal(found, states[step]):
        return f"{name}: step {found.meta.get('step')} came back, or other values"
    if not notes:
        return f"{name}: nothing is said"
    return None


def flip_shard(data: Path, manifest: Any, chance: random.Random, cut: bool) -> str | None:
    split = chance.choice(sorted(manifest.splits))
    number = chance.randrange(len(manifest.splits[split]))
    path = data / manifest.splits[split][number].file
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, chance, cut))
    try:
        with open_shard(data, manifest, split, number, True):
            return f"{path.name}: opened without a word"
    except HpcmlpError as error:
        return None if str(error).count("\n") == 0 else f"{path.name}: more than a sentence"
    finally:
        path.write_bytes(whole)


def make_data(folder: Path) -> Path:
    values = np.random.default_rng(0)
    np.savez(folder / "table.npz", x=values.standard_normal((200, 4)).astype(np.float32), y=values.integers(0, 3, 200))
    subprocess.run([sys.executable, "-m", "hpcmlp", "prepare", str(folder / "table.npz"), "--out", str(folder / "data"),
                    "--shards", "2"], check=True, stdout=subprocess.DEVNULL)
    return folder / "data"


def rows(count: int | None, seed: int) -> Iterator[dict[str, Any]]:
    """Flips and truncations, of checkpoints and of shards; `count` is that of all four together."""
    count = count or 10_000
    chance = random.Random(seed)
    place = Path(tempfile.mkdtemp(prefix="hpcmlp-flips-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        states = make_run(place / "run")
        data = make_data(place)
        manifest = read_manifest(data)
        for what, share, cut in (("bit flip in a checkpoint", 0.5, False), ("truncated checkpoint", 0.1, True),
                                 ("bit flip in a shard", 0.3, False), ("truncated shard", 0.1, True)):
            wrong, times = [], []
            number = max(1, round(share * count))
            for _ in range(number):
                begin = time.perf_counter()
                problem = flip_checkpoint(place / "run", states, chance, cut) if "checkpoint" in what else \
                    flip_shard(data, manifest, chance, cut)
                times.append(time.perf_counter() - begin)
                if problem:
                    wrong.append(problem)
            yield {"fault": what, "injected": number, "completed": number - len(wrong),
                   "identical": number - len(wrong) if "checkpoint" in what else None,
                   "recover_s": float(np.median(times)), "note": wrong[0] if wrong else
                   "the one before taken, or the digests inside" if "checkpoint" in what else "one sentence"}
    finally:
        shutil.rmtree(place)
