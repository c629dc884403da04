"""Shards with one bit flipped or cut at any length: all are noticed when a run opens them, and named.

    python benchmarks/faults/campaign.py shards [--count N]
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import corpus  # noqa: E402  (beside this file)

FULL = 10_000
FORMS = {"plain": None, "gzip": "gzip", "lzf": "lzf"}


def flipped(data: bytes, random: Any) -> bytes:
    """One bit of the file is another."""
    out = bytearray(data)
    out[int(random.integers(len(out)))] ^= 1 << int(random.integers(8))
    return bytes(out)


def cut(data: bytes, random: Any) -> bytes:
    """The file ends early."""
    return data[:int(random.integers(len(data)))]


def swapped(data: bytes, random: Any) -> bytes:
    """Two blocks of 64 bytes stand in each other's place: the same length, no bit lost."""
    blocks = len(data) // 64
    a, b = (int(k) * 64 for k in random.choice(blocks, 2, replace=False))
    out = bytearray(data)
    out[a:a + 64], out[b:b + 64] = data[b:b + 64], data[a:a + 64]
    return bytes(out)


def rows(count: int | None, seed: int) -> Iterator[dict[str, Any]]:
    """One row a kind of damage, over shards of all forms."""
    folder = Path(tempfile.mkdtemp(prefix="hpcmlp-shards-"))
    try:
        for name, damage in (("one bit flipped", flipped), ("cut", cut), ("two blocks swapped", swapped)):
            yield row(folder, name, damage, FULL if count is None else count, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def row(folder: Path, name: str, damage: Callable, count: int, seed: int) -> dict[str, Any]:
    """Damage a shard `count` times and open it as a run does."""
    from hpcmlp.data.shards import ShardReader, write_shard
    from hpcmlp.errors import HpcmlpError
    random = np.random.default_rng(seed)
    x, y = corpus.arrays(random)
    entries = {form: write_shard(folder / f"{form}.h5", x, y, compression=way) for form, way in FORMS.items()}
    sound = {form: (folder / entry.file).read_bytes() for form, entry in entries.items()}
    noticed, unchanged, times, first = 0, 0, [], ""
    for k in range(count):
        form = list(FORMS)[k % len(FORMS)]
        path = folder / entries[form].file
        data = damage(sound[form], random)
        path.write_bytes(data)
        begin = time.perf_counter()
        try:
            with ShardReader(path, entries[form]) as shard:
                shard.verify_sha256()
                shard.check()
                shard.read(0, corpus.ROWS)
            if data == sound[form]:
                unchanged += 1                         # two blocks of equal bytes
            else:
                first = first or f"; FIRST: case {k} ({form}) is read in silence"
        except HpcmlpError as error:
            named = path.name in str(error)
            noticed += named
            first = first or ("" if named else f"; FIRST: case {k}: {error}")
        except Exception as error:
            first = first or f"; FIRST: case {k}: {type(error).__name__}: {error}"
        times.append(time.perf_counter() - begin)
    return {"fault": f"shard: {name}", "injected": count, "completed": noticed + unchanged, "identical": None,
            "recover_s": statistics.median(times), "note": f"{noticed} noticed and named, {unchanged} without "
                                                           f"effect{first}"}
