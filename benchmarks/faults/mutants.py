"""Each guard is taken out, one at a time, in a copy of the tree, and its test must fail there.

A mutant is one replacement of source text, and the test that notices it. The table says of each whether it was noticed;
a mutant whose text is no longer found is an error, so that the list keeps up with the sources.

    python benchmarks/faults/mutants.py [--only WORD]
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`; `test` (a pytest address, with -k words after a blank) must fail then."""

    guard: str
    file: str
    old: str
    new: str
    test: str


GUARD, SHARDS, READERS = "hpcmlp/data/guard.py", "tests/data/test_shards.py", "tests/data/test_readers.py"
LINKS = "hpcmlp/data/links.py"
CSV = "hpcmlp/data/csv_reader.py"
NPZ = "hpcmlp/data/npz_reader.py"
IDX = "hpcmlp/data/idx_reader.py"
MANIFEST = "hpcmlp/data/manifest.py"
FILES = "hpcmlp/data/files.py"
AGREEMENT = "hpcmlp/comm/agreement.py"
CONFIG = "hpcmlp/config.py"
SHARD = "hpcmlp/data/shards.py"
CSV_TEST = "tests/data/test_csv_reader.py"
MANIFEST_TEST = "tests/data/test_manifest.py"
ABSURD = "tests/test_config.py -k absurd"
FAILED_WRITE = "tests/data/test_files.py -k failed_write"
NOT_THERE = "tests/programs/test_names.py -k not_there"
VIRTUAL = "tests/data/test_links.py -k virtual"
SYNC = "        os.fsync(handle)\n    finally:\n        os.close(handle)\n    return"
CHECKPOINT, CHECKPOINT_TEST = "hpcmlp/run/checkpoint.py", "tests/run/test_checkpoint.py"
RENAME = "os.rename(temporary, path)\n        sync_directory(os.path.dirname(path) or"
ATTACK = f"{SHARDS} -k attack_is_refused"
UNSOUND = f"{READERS} -k unsound"
MUTANTS = (
    Mutant("external storage", GUARD, "if plist.get_external_count():", "if False:", ATTACK),
    Mutant("declared size", GUARD, "if size > limit_bytes:", "if False:", ATTACK),
    Mutant("plain types", GUARD, 'if dtype.kind not in "fiub" or dtype.itemsize > 8:', "if False:", ATTACK),
    Mutant("never written", GUARD, "if offset is None or not stored:", "if False:", ATTACK),
    Mutant("all chunks there", GUARD, "if len(records) != (grid if size else 0):", "if False:", ATTACK),
    Mutant("size of a chunk", GUARD, "if room > _CHUNK_LIMIT_BYTES:", "if False:", ATTACK),
    Mutant("inflation", GUARD, "if stored and room * len(records) > _INFLATION_LIMIT * stored:", "if False:", ATTACK),
    Mutant("known filters", GUARD, "if code not in _BUILT_IN_FILTERS and not _filter_available(code):", "if False:",
           f"{SHARDS} -k foreign_filter"),
    Mutant("no values", GUARD, "if dataset.shape is None:", "if False:", ATTACK),
    Mutant("chunk records inside the file", GUARD, "if not (least <= record.size <= 2 * room + 64 and "
           "record.byte_offset + record.size <= file_size):", "if False:", ATTACK),
    Mutant("virtual sources welcome", GUARD, 'if outside is None or (source.file_name != "." and not outside(place)):',
           "if False:", ATTACK),
    Mutant("virtual sources plain", GUARD, "guarded(file, source.dset_name, limit_bytes)", "pass",
           VIRTUAL),
    Mutant("virtual without holes", GUARD, "if mapped < dataset.size:", "if False:", VIRTUAL),
    Mutant("links welcome", LINKS, "outside is None or (file and not outside(place))", "False",
           f"{SHARDS} tests/data/test_links.py -k 'attack or chain or pipe'"),
    Mutant("links that go round", LINKS, "if steps >= _STEPS_LIMIT:", "if False:",
           "tests/data/test_links.py -k round"),
    Mutant("groups once", "hpcmlp/data/hdf5_reader.py", "if address in self._visited:", "if False:",
           "tests/data/test_links.py -k groups"),
    Mutant("limit on the child's time", "hpcmlp/data/probe.py", "resource.setrlimit(kind, (limit, hard))", "pass",
           "tests/data/test_probe.py -k endless"),
    Mutant("the child's end is told", "hpcmlp/data/probe.py", "if code == 0:\n        return", "return",
           "tests/data/test_probe.py"),
    Mutant("size of a shard", SHARD, "if size != self.entry.bytes:", "if False:", SHARDS),
    Mutant("rows of a shard", SHARD, "if dataset.shape[0] != self.entry.rows:", "if False:", SHARDS),
    Mutant("sha256 of a shard", SHARD, "if digest_file(self.path) != self.entry.sha256:", "if False:",
           SHARDS),
    Mutant("finite features", SHARD, 'if x.dtype.kind == "f":', "if False:", SHARDS),
    Mutant("labels in range", SHARD, "wrong = (y < 0) | (y >= num_classes)", "wrong = y >= num_classes",
           SHARDS),
    Mutant("NPZ: names differ", NPZ, "if name in self._members:", "if False:", UNSOUND),
    Mutant("NPZ: header and size", NPZ, "if size + header != info.file_size:", "if False:",
           UNSOUND),
    Mutant("NPZ: methods", NPZ, "if info.compress_type not in _METHODS:", "if False:", UNSOUND),
    Mutant("NPZ: unclosed header", NPZ, ", tokenize.TokenError)", ")", UNSOUND),
    Mutant("idx: dimensions", IDX, "not 0 < head[3] <= _DIMENSIONS_LIMIT", "False", UNSOUND),
    Mutant("idx: length", IDX, "if expected != size:", "if False:", UNSOUND),
    Mutant("idx: no columns", IDX, "if not all(self.shape[1:]):", "if False:", UNSOUND),
    Mutant("idx: inflated as declared", IDX, "_read_up_to(handle, expected + 1)",
           "_read_up_to(handle, 1 << 34)", f"{READERS} -k inflated"),
    Mutant("columns that fit", "hpcmlp/data/tables.py", "if width > COLUMN_LIMIT:", "if False:",
           f"{READERS} -k 'unsound and npz and wide'"),
    Mutant("CSV: length of a line", CSV, "if (stops - starts).max() > _LINE_LIMIT_BYTES:",
           "if False:", CSV_TEST),
    Mutant("CSV: closed quotes", CSV, "        if inside:\n", "        if False:\n",
           CSV_TEST),
    Mutant("CSV: fields of a row", CSV, "if len(fields) != len(self.columns):", "if False:",
           CSV_TEST),
    Mutant("CSV: names differ", CSV, "if column in seen:", "if False:",
           CSV_TEST),
    Mutant("CSV: encoding told", CSV, "if head.startswith(mark):", "if False:",
           CSV_TEST),
    Mutant("CSV: NUL", CSV, 'if "\\0" in text:', "if False:", CSV_TEST),
    Mutant("JSON: doubled keys", MANIFEST, "if len(values) != len(pairs):", "if False:",
           MANIFEST_TEST),
    Mutant("JSON: finite numbers", MANIFEST, "return value if math.isfinite(value) else", "return value or",
           MANIFEST_TEST),
    Mutant("JSON: whole numbers", MANIFEST, "int(text) if len(text) <= _MOST_DIGITS else", "int(text) or",
           MANIFEST_TEST),
    Mutant("JSON: names of shards", MANIFEST, '_SHARD_NAME.fullmatch(value["file"])', "True",
           MANIFEST_TEST),
    Mutant("JSON: types of preprocessing", "hpcmlp/data/preprocess.py", "    if not sound:\n", "    if False:\n",
           "tests/data/test_preprocess.py -k wrong_types"),
    Mutant("TOML: size", CONFIG, "if len(data) > TOML_LIMIT_BYTES:", "if False:",
           ABSURD),
    Mutant("TOML: digits", CONFIG, "if type(value) is int and value.bit_length() > _MOST_BITS:", "if False:",
           ABSURD),
    Mutant("TOML: parts of a key", CONFIG, 'if any(piece.count(b".") > _MOST_KEY_PARTS', 'if any(False',
           ABSURD),
    Mutant("digest of a checkpoint", CHECKPOINT, "elif manifest[_DIGEST] != digest:", "elif False:",
           f"{CHECKPOINT_TEST} -k flipped_byte"),
    Mutant("digest of a checkpoint of before", CHECKPOINT,
           'if manifest.get("sha256") != hashlib.sha256(image).hexdigest():', "if False:",
           f"{CHECKPOINT_TEST} -k of_before"),
    Mutant("messages are shown, not obeyed", "hpcmlp/errors.py", "if not (line.isprintable() and line.isascii()):",
           "if False:", "tests/test_errors.py"),
    Mutant("messages are short", "hpcmlp/errors.py", "return line if len(line) <= limit else", "return line or",
           "tests/test_errors.py"),
    Mutant("raw names between ranks", AGREEMENT, '.encode("utf-8", "backslashreplace")', ".encode()",
           NOT_THERE),
    Mutant("the file system's no, on all ranks", AGREEMENT, "error = of_system(caught)", "error = None",
           NOT_THERE),
    Mutant("values that can be drawn", "hpcmlp/run/curves.py", "return type(value) in (int, float) and abs(value) < "
           "_LARGEST", "return isinstance(value, int | float)", "tests/programs/test_report.py -k drawn"),
    Mutant("atomic: sync before the name", FILES, SYNC, SYNC.replace("os.fsync(handle)", "pass"), FAILED_WRITE),
    Mutant("atomic: the temporary goes", FILES, "        _remove(temporary)\n        raise CannotWrite",
           "        raise CannotWrite", FAILED_WRITE),
    Mutant("atomic: links not followed", FILES, RENAME,
           RENAME.replace("os.rename(temporary, path)", "open(path, 'wb').write(data)\n        os.unlink(temporary)"),
           "tests/data/test_files.py -k link_in_place"),
    Mutant("predictions laid out in memory", "hpcmlp/data/row_file.py", 'with h5py.File(laid_out, "w") as file:',
           'with h5py.File(temporary, "x") as file:', "tests/faults/test_campaign.py -k disk"),
    Mutant("one takes over", "hpcmlp/run/directory.py",
           "            if not self._check_stale():\n                return",
           "            if False:\n                return", "tests/run/test_directory.py -k two"),
    Mutant("one run a directory", "hpcmlp/run/directory.py", "        if not stale:\n", "        if False:\n",
           "tests/run/test_directory.py"),
)


def copy_tree(place: Path) -> None:
    """Copy what git knows, and the built extension beside its sources."""
    names = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=REPOSITORY,
                           capture_output=True, check=True).stdout.decode().split("\0")
    built = [str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "hpcmlp").rglob("*.so")]
    for name in filter(None, [*names, *built]):
        if (REPOSITORY / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, place / name)


def run_test(place: Path, test: str) -> tuple[bool, str]:
    """Run one test address in the copy; return (it passed, its last line)."""
    address, _, words = test.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *address.split(),
               *(["-k", words.strip("'")] if words else [])]
    environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return False, "hangs"
    lines = done.stdout.strip().splitlines() or [f"ended with {done.returncode}"]
    if done.returncode in (4, 5):
        raise RuntimeError(f"{test}: no such test: {lines[-1]}")
    return done.returncode == 0, lines[-1]


def judge(mutants: list[Mutant]) -> Iterator[tuple[Mutant, bool, str, float]]:
    """Yield (mutant, noticed, what the test said, seconds)."""
    with tempfile.TemporaryDirectory(prefix="hpcmlp-mutants-") as folder:
        place = Path(folder)
        copy_tree(place)
        for mutant in mutants:
            begin = time.monotonic()
            path = place / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                yield mutant, False, f"its text stands {text.count(mutant.old)} times in {mutant.file}", 0.0
                continue
            path.write_text(text.replace(mutant.old, mutant.new))
            try:
                passed, said = run_test(place, mutant.test)
            finally:
                path.write_text(text)
            yield mutant, not passed, said, time.monotonic() - begin


def rows(count: int | None, seed: int) -> Iterator[dict[str, Any]]:
    """One row: guards taken out, noticed by their tests."""
    chosen = list(MUTANTS)
    if count is not None and count < len(chosen):
        chosen = random.Random(seed).sample(chosen, count)
    found = list(judge(chosen))
    missed = [m.guard for m, noticed, _, _ in found if not noticed]
    yield {"fault": "guard taken out, its test must fail", "injected": len(found),
           "completed": len(found) - len(missed), "identical": None, "recover_s": None,
           "note": f"not noticed: {', '.join(missed)}" if missed else "all noticed"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="guards whose name or file holds the word")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    missed = 0
    for mutant, noticed, said, seconds in judge([m for m in MUTANTS if options.only in m.guard + m.file]):
        missed += not noticed
        told = "noticed" if noticed else f"NOT NOTICED ({said[:70]})"
        print(json.dumps([mutant.guard, noticed, said]) if options.json else
              f"| {mutant.guard:36} | {mutant.file:30} | {seconds:4.0f} s | {told} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
