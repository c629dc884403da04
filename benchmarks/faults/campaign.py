"""The fault campaign: every program of this folder injects its faults; one table tells what came of them.

Each program has a function `rows(count, seed)` that yields one dict a row:
    fault      what was injected, in a few words
    injected   how many times
    completed  how often the promise was kept: the run went on or was resumed to its end, or the input ended in a result
               or in one sentence with its exit code
    identical  finals with the bits of the undisturbed run, or None where there is no final
    recover_s  median seconds from the fault to the next step or to the answer, or None
    note       what is not in the numbers
`count` is the number of injections a row (None: the program's own, which are those of the notes). A row that does not
complete everything, or a program that raises, makes the exit code 1.

    python benchmarks/faults/campaign.py                    everything (hours)
    python benchmarks/faults/campaign.py inputs disk        two of its programs
    python benchmarks/faults/campaign.py --count 20         a short form of everything
"""

import argparse
import importlib.util
import json
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
KEYS = ("fault", "injected", "completed", "identical", "recover_s", "note")
WIDTHS = (44, 8, 9, 9, 9)


def programs() -> dict[str, Path]:
    """The programs of this folder that have rows, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.py"))
            if path.name != Path(__file__).name and "\ndef rows(" in path.read_text()}


def load(path: Path) -> Any:
    """Import a program of this folder by its path."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(FOLDER))


def run(names: list[str], count: int | None, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of these programs; one that raises becomes a row that did not complete."""
    for name in names:
        begin = time.monotonic()
        try:
            for row in load(programs()[name]).rows(count, seed):
                if set(row) != set(KEYS):
                    raise ValueError(f"{name}: a row has the keys {', '.join(sorted(row))}")
                yield {"program": name, **row, "took_s": round(time.monotonic() - begin, 1)}
                begin = time.monotonic()
        except Exception as error:
            traceback.print_exc()
            yield {"program": name, "fault": f"{name}: the program itself", "injected": 1, "completed": 0,
                   "identical": None, "recover_s": None, "note": f"{type(error).__name__}: {error}",
                   "took_s": round(time.monotonic() - begin, 1)}


def line(cells: list[Any]) -> str:
    """One line of the table: Markdown, so that it can be pasted into a note."""
    shown = ["" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
    padded = [s.ljust(WIDTHS[0]) if k == 0 else s.rjust(WIDTHS[k]) if k < len(WIDTHS) else s
              for k, s in enumerate(shown)]
    return "| " + " | ".join(padded) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of: {', '.join(programs())} (default: all)")
    parser.add_argument("--count", type=int, help="injections a row (default: each program's own)")
    parser.add_argument("--seed", type=int, default=1, help="seed of all random choices (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too, one JSON object a line")
    options = parser.parse_args()
    unknown = [name for name in options.programs if name not in programs()]
    if unknown:
        parser.error(f"unknown program {unknown[0]!r}; there are {', '.join(programs())}")
    print(f"{platform.machine()}, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
          f"seed {options.seed}")
    print(line(["fault", "injected", "completed", "identical", "recover s", "note"]))
    print("|" + "---|" * 6, flush=True)
    broken = 0
    for row in run(options.programs or list(programs()), options.count, options.seed):
        print(line([row[key] for key in KEYS]), flush=True)
        broken += row["completed"] < row["injected"] or row["identical"] not in (None, row["injected"])
        if options.json:
            with open(options.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(f"\n{broken} rows are not as promised" if broken else "\nall as promised")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
