"""Malformed inputs for every reader: each must end in a result or in one sentence with an exit code.

Worker processes of their own read them, with 1 GiB of memory beyond what Python needs and 5 s of processor time a case,
so that a crash of the interpreter, a hang and memory without bound are seen and named. Cases are numbered; the same
seed and number give the same bytes (`--show KIND NUMBER` writes a case and what becomes of it).

    python benchmarks/faults/inputs.py                        20,000 of each kind
    python benchmarks/faults/inputs.py csv npz --count 500
    python benchmarks/faults/inputs.py --show csv 1234
"""

import argparse
import contextlib
import io
import json
import os
import resource
import selectors
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import mutations  # noqa: E402  (beside this file)

COUNTS = {**dict.fromkeys(mutations.KINDS, 20_000), "parquet": 5_000}
MEMORY_BYTES = 1 << 30
CASE_CPU_S = 5.0
SILENCE_S = 120.0                                      # wall time; a loaded machine is no hang
LONGEST_SENTENCE = 2000
CODES = {2, 65, 66, 69, 73, 78}
SUFFIXES = {"hdf5": ".h5", "csv": ".csv", "npz": ".npz", "idx": ".idx", "parquet": ".parquet", "toml": ".toml"}


@dataclass
class Outcome:
    """What became of the cases of one kind."""

    read: int = 0
    refused: Counter = field(default_factory=Counter)
    findings: list[tuple[int, str]] = field(default_factory=list)   # case, what is wrong
    times: list[float] = field(default_factory=list)
    peak_mib: float = 0.0


def use(what: str, data: bytes, folder: Path, comm: Any, thorough: bool) -> None:
    """Do with the bytes what a user would: open, read, prepare, inspect, report. Raises what that raises."""
    from hpcmlp.config import InspectConfig, PrepareConfig, ReportConfig, TrainConfig, read_toml
    from hpcmlp.programs import inspect, prepare, report

    if what in ("manifest", "summary", "metrics"):
        place = folder / {"manifest": "dataset.json", "summary": "summary.json", "metrics": "metrics.jsonl"}[what]
        place.write_bytes(data)
        if what == "manifest":
            from hpcmlp.data.manifest import read_manifest
            from hpcmlp.data.preprocess import Preprocessor
            from hpcmlp.data.readers import open_table
            preprocessor = Preprocessor.from_dict(read_manifest(folder).preprocessing)
            (folder / "rows.csv").write_text("a,b\n1,u\n,w\n")
            preprocessor.transform(open_table(folder / "rows.csv", text=preprocessor.text_columns))
        try:
            inspect.main(InspectConfig(path=str(folder)), comm)
        finally:
            if what == "metrics" and thorough:
                report.main(ReportConfig(runs=(str(folder),)), comm)
        return
    place = folder / f"case{SUFFIXES.get(what, '.h5')}"
    place.write_bytes(data)
    if what == "toml":
        (folder / "config.toml").write_bytes(data)
        inspect.main(InspectConfig(path=str(folder)), comm)
        read_toml(str(place), TrainConfig)
    elif what == "shard":
        read_shard(place, data)
        inspect.main(InspectConfig(path=str(place)), comm)
    else:
        from hpcmlp.data.readers import open_table
        table = open_table(place)
        table.read(0, min(table.num_rows, 200_000))
        if thorough:
            target = None if table.matrix else table.columns[-1]
            prepare.main(PrepareConfig(source=str(place), out=str(folder / "out"), target=target, shards=2), comm)


def read_shard(place: Path, data: bytes) -> None:
    """Read a shard that the manifest vouches for by its size."""
    import corpus

    from hpcmlp.data.manifest import ShardEntry
    from hpcmlp.data.shards import ShardReader, check_values
    with ShardReader(place, ShardEntry(place.name, corpus.ROWS, len(data), "0" * 64)) as shard:
        shard.check()
        x, y, _ = shard.read(0, corpus.ROWS)
        check_values(place, x, y, 3 if y.dtype.kind == "i" else None)


def judge(what: str, data: bytes, folder: Path, comm: Any, thorough: bool) -> tuple[str, str]:
    """Use the bytes and return (result, detail): read, refused with its code, or finding with what is wrong."""
    from hpcmlp.errors import HpcmlpError, printable
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("error")             # a warning is text that nobody asked for
            use(what, data, folder, comm, thorough)
    except HpcmlpError as error:
        text = printable(str(error))                   # what the command line does
        if error.code not in CODES:
            return "finding", f"exit code {error.code}: {text[:300]}"
        flaw = flaw_of(text)
        return ("finding", f"{flaw}: {text[:300]!r}") if flaw else ("refused", str(error.code))
    except MemoryError:
        return "finding", "memory without bound: " + last_place()
    except BaseException:
        return "finding", last_place()
    flaw = flaw_of(said.getvalue().replace("\n", " "), 1 << 30)
    return ("finding", f"{flaw} in what is printed: {said.getvalue()[:300]!r}") if flaw else ("read", "")


def flaw_of(text: str, longest: int = LONGEST_SENTENCE) -> str | None:
    """What keeps a text from being one sentence that a terminal can show, or None."""
    if not text and longest == LONGEST_SENTENCE:
        return "empty sentence"
    if len(text) > longest:
        return f"sentence of {len(text)} characters"
    odd = next((c for c in text if not c.isprintable()), None)
    return f"control character {odd!r}" if odd else None


def last_place() -> str:
    """The exception under way and the last lines of its way through hpcmlp."""
    kind, error, trace = sys.exc_info()
    frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(trace)
              if "hpcmlp" in f.filename or "numpy" in f.filename or "zipfile" in f.filename]
    return f"{kind.__name__}: {str(error)[:160]} [{' < '.join(reversed(frames[-5:]))}]"


def work(kind: str, seed: int, start: int, stop: int, step: int, folder: Path, thorough_every: int) -> None:
    """A worker: judge the cases start, start + step, ... below stop and say so line by line."""
    from mpi4py import MPI

    from hpcmlp.data import readers
    from hpcmlp.programs import inspect
    comm = MPI.COMM_SELF
    # This process is the child that ranks start (`data.probe`); what ends it goes through that door (`record`).
    readers.probe = inspect.probe = lambda paths: None
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with contextlib.suppress(BaseException):           # modules, thread pools and arenas, before memory is counted
        judge("manifest" if kind == "json" else kind, corpus_file(kind), folder, comm, True)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(start, stop, step):
        pipe.write(f"begin {number}\n")
        signal.setitimer(signal.ITIMER_PROF, CASE_CPU_S)
        begin = time.monotonic()
        what, data = mutations.malformed(kind, number, seed)
        result, detail = judge(what, data, folder, comm, number // step % thorough_every == 0)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        pipe.write(json.dumps([number, result, detail, time.monotonic() - begin]) + "\n")
    pipe.write(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}\n")
    pipe.flush()
    os._exit(0)


def corpus_file(kind: str) -> bytes:
    """A sound file of a kind."""
    import corpus
    if kind == "json":
        return corpus.manifest(None)
    import numpy as np
    return getattr(corpus, kind)(np.random.default_rng(0))[0]


class Worker:
    """A worker process as its parent sees it: which case it is at, and what it has said."""

    def __init__(self, kind: str, seed: int, start: int, stop: int, step: int, folder: Path, thorough_every: int):
        self.rest = (kind, seed, stop, step, folder, thorough_every)
        self.at: int | None = None
        self.last = start - step
        self.heard = time.monotonic()
        arguments = [kind, seed, start, stop, step, folder, thorough_every]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "Agg", "MALLOC_ARENA_MAX": "2"}
        self.log = open(f"{folder}.log", "w+b")
        self.process = subprocess.Popen([sys.executable, __file__, "--work", *map(str, arguments)],
                                        stdout=subprocess.PIPE, stderr=self.log, env=environment)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.buffer = b""

    def lines(self) -> Iterator[str]:
        """What the worker has said since the last call."""
        piece = self.process.stdout.read()
        if piece:
            self.heard = time.monotonic()
            self.buffer += piece
        *whole, self.buffer = self.buffer.split(b"\n")
        for line in whole:
            yield line.decode()

    def ended(self) -> str:
        """How it ended, in words."""
        code = self.process.wait()
        self.log.seek(0)
        words = " ".join(self.log.read().decode(errors="replace").split()[-40:])
        self.log.close()
        self.process.stdout.close()
        if code == -signal.SIGPROF:
            return f"hang: more than {CASE_CPU_S:.0f} s of processor time"
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the interpreter ended by {name} {words}"


def fuzz(kind: str, count: int, seed: int, jobs: int, thorough_every: int) -> Outcome:
    """Judge cases 0 to count - 1 of a kind in `jobs` processes."""
    outcome = Outcome()
    base = Path(tempfile.mkdtemp(prefix="hpcmlp-inputs-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    chosen = selectors.DefaultSelector()
    workers = set()

    def start(first: int, stop: int, step: int, folder: Path) -> None:
        worker = Worker(kind, seed, first, stop, step, folder, thorough_every)
        workers.add(worker)
        chosen.register(worker.process.stdout, selectors.EVENT_READ, worker)

    try:
        for job in range(jobs):
            start(job, count, jobs, base / f"w{job}")
        while workers:
            chosen.select(timeout=1.0)
            for worker in list(workers):
                for line in worker.lines():
                    listen(worker, line, outcome)
                if worker.process.poll() is None:
                    if time.monotonic() - worker.heard < SILENCE_S:
                        continue
                    worker.process.kill()
                for line in worker.lines():
                    listen(worker, line, outcome)
                chosen.unregister(worker.process.stdout)
                workers.remove(worker)
                told = worker.ended()
                _, _, stop, step, folder, _ = worker.rest
                if worker.at is not None:
                    record(kind, worker.at, seed, base, told, outcome)
                    if len(outcome.findings) < 200 and worker.at + step < stop:
                        start(worker.at + step, stop, step, folder)
                elif worker.last + step < stop:
                    outcome.findings.append((worker.last, f"the worker itself: {told}"))
        return outcome
    finally:
        for worker in workers:
            worker.process.kill()
        shutil.rmtree(base, ignore_errors=True)


def record(kind: str, number: int, seed: int, base: Path, told: str, outcome: Outcome) -> None:
    """A case that ended its worker: a finding, unless the command line ends it in one sentence."""
    what, data = mutations.malformed(kind, number, seed)
    folder = base / "again"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    place = folder / f"case{SUFFIXES.get(what, '.h5')}"
    place.write_bytes(data)
    words = ["inspect", place] if what == "shard" else ["prepare", place, "--out", folder / "out", "--target", "label"]
    try:
        done = subprocess.run([sys.executable, "-m", "hpcmlp", *map(str, words)], capture_output=True, text=True,
                              timeout=300)
    except subprocess.TimeoutExpired:
        outcome.findings.append((number, f"{told}; and the command line hangs"))
        return
    if done.returncode in CODES and done.stderr.count("\n") == 1 and done.stderr.startswith("hpcmlp: "):
        outcome.refused[f"{done.returncode} by the child"] += 1
    else:
        outcome.findings.append((number, f"{told}; the command line ends with {done.returncode}: "
                                         f"{done.stderr[-300:]}"))


def listen(worker: Worker, line: str, outcome: Outcome) -> None:
    """Take in one line of a worker."""
    if line.startswith("begin "):
        worker.at = int(line[6:])
    elif line.startswith("peak "):
        outcome.peak_mib = max(outcome.peak_mib, float(line[5:]))
    else:
        number, result, detail, seconds = json.loads(line)
        worker.at, worker.last = None, number
        outcome.times.append(seconds)
        if result == "read":
            outcome.read += 1
        elif result == "refused":
            outcome.refused[detail] += 1
        else:
            outcome.findings.append((number, detail))


def rows(count: int | None, seed: int, kinds: tuple[str, ...] = mutations.KINDS, jobs: int = 2,
         thorough_every: int = 4) -> Iterator[dict[str, Any]]:
    """One row a kind, for the campaign; every `thorough_every`-th case also goes through prepare or report."""
    for kind in kinds:
        if kind == "parquet" and not has_parquet():
            continue
        number = COUNTS[kind] if count is None else count
        outcome = fuzz(kind, number, seed, jobs, thorough_every)
        refused = ", ".join(f"{n} x {code}" for code, n in sorted(outcome.refused.items()))
        first = f"; FIRST: case {outcome.findings[0][0]}: {outcome.findings[0][1]}" if outcome.findings else ""
        yield {"fault": f"malformed {kind}", "injected": number, "completed": number - len(outcome.findings),
               "identical": None, "recover_s": statistics.median(outcome.times) if outcome.times else None,
               "note": f"{outcome.read} read, {refused or 'none refused'}; longest {max(outcome.times, default=0):.1f} "
                       f"s, peak {outcome.peak_mib:.0f} MiB{first}"}


def has_parquet() -> bool:
    """Whether the optional package is there."""
    from importlib.util import find_spec
    return find_spec("pyarrow") is not None


def show(kind: str, number: int, seed: int) -> None:
    """Write one case to a file and say what becomes of it."""
    from mpi4py import MPI
    what, data = mutations.malformed(kind, number, seed)
    folder = Path(tempfile.mkdtemp(prefix="hpcmlp-case-"))
    print(what, len(data), "bytes:", data[:200])
    print(judge(what, data, folder / "case", MPI.COMM_SELF, True), "in", folder / "case")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of: {', '.join(mutations.KINDS)} (default: all)")
    parser.add_argument("--count", type=int, help="cases a kind (default: 20,000, parquet 5,000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default: 2)")
    parser.add_argument("--thorough-every", type=int, default=4, help="every how many cases go through prepare or "
                        "report as well (default: 4)")
    parser.add_argument("--show", nargs=2, metavar=("KIND", "NUMBER"), help="write one case and judge it")
    parser.add_argument("--findings", metavar="FILE", help="append every finding there, one JSON line each")
    parser.add_argument("--work", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        kind, seed, start, stop, step, folder, every = options.work
        work(kind, int(seed), int(start), int(stop), int(step), Path(folder), int(every))
    if options.show:
        show(options.show[0], int(options.show[1]), options.seed)
        return 0
    broken = 0
    for kind in options.kinds or mutations.KINDS:
        count = options.count or COUNTS[kind]
        begin = time.monotonic()
        outcome = fuzz(kind, count, options.seed, options.jobs, options.thorough_every)
        print(f"{kind:8} {count} cases in {time.monotonic() - begin:.0f} s: {outcome.read} read, refused "
              f"{dict(sorted(outcome.refused.items()))}, {len(outcome.findings)} findings, longest "
              f"{max(outcome.times, default=0):.2f} s, peak {outcome.peak_mib:.0f} MiB", flush=True)
        for number, detail in sorted(outcome.findings)[:40]:
            print(f"    {kind} {number}: {detail}", flush=True)
        if options.findings:
            with open(options.findings, "a") as file:
                file.writelines(json.dumps([kind, *finding]) + "\n" for finding in outcome.findings)
        broken += len(outcome.findings)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
