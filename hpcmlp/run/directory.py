"""A run directory: who uses it (lock), the log of metrics, the resolved options, the final summary."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from hpcmlp.data.files import write_atomically, write_failure
from hpcmlp.errors import CannotWrite, ConfigError
from hpcmlp.run import checkpoint
from hpcmlp.run.state_file import finite

_STALE_S = 300.0
_BEAT_S = 20.0
_TAKEOVER_S = 30.0
_LOOK_S = 1.0
_TAIL = 256     # lines of a log: more than others can have to add


def to_json(value: Any) -> str:
    """Return one line of strict JSON; numbers that are not finite become null. Local."""
    return json.dumps(finite(value), allow_nan=False)


class RunDirectory:
    """The run directory as the one rank sees it that writes there (rank 0).

    Local. Claims the directory with a `lock` file (O_EXCL; host, process, job, time of the last sign of life), so that
    two runs never write into one directory. A lock is taken over when its process is dead on this host, when it
    belongs to this SLURM job, when it gave no sign of life for five minutes, or by the `heir` of its rank.

    Raises
    ------
    CannotWrite : the directory is in use, cannot be written, or holds a run while `resume` is False.
    """

    def __init__(self, path: str | os.PathLike, resume: bool, heir: bool = False):
        from pathlib import Path  # on the one rank that writes: its import costs 40 calls to the file system
        self.path = Path(path)
        self._made = not self.path.exists()
        if heir:        # the survivors agree that the owner is dead
            self._lock.unlink(missing_ok=True)
        self._claim()
        self._log = None
        self._looked = 0.0
        try:
            held = checkpoint.list_checkpoints(self.path) or (self.path / "summary.json").exists()
            if held and not (resume or heir):
                raise CannotWrite(f"{self.path}: holds a run already; give --resume to go on with it, or another "
                                  "--out.")
            checkpoint.remove_leftovers(self.path)
        except BaseException:
            self.release()
            raise

    def _claim(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotWrite(f"{self.path}: cannot make this run directory ({error.strerror}).") from None
        mine = to_json({"host": os.uname().nodename, "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID"),
                        "since": time.time()})
        for _ in range(2):
            try:
                handle = os.open(self._lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
            except FileExistsError:
                if not self._take_over(mine.encode() + b"\n"):
                    continue
            except OSError as error:
                raise CannotWrite(f"{self.path}: cannot write in this run directory ({error.strerror}).") from None
            else:
                try:
                    os.write(handle, mine.encode() + b"\n")
                except OSError as error:
                    self._lock.unlink(missing_ok=True)
                    raise CannotWrite(write_failure(self._lock, error, len(mine))) from None
                finally:
                    os.close(handle)
            self._beat = time.monotonic()
            return
        raise CannotWrite(f"{self.path}: another run took this directory just now; name another --out.")

    @property
    def _lock(self) -> Any:
        return self.path / "lock"

    def _take_over(self, mine: bytes) -> bool:
        """Put our lock in place of a stale one, or raise CannotWrite saying who is here; False when there is none now.

        Whoever takes over holds a second file meanwhile and judges again: of two that saw the same stale lock the
        slower one would else remove the fresh lock of the other.
        """
        if not self._check_stale():
            return False
        right = self.path / "lock.takeover"
        try:
            os.close(os.open(right, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644))
        except FileExistsError:
            try:
                if time.time() - right.stat().st_mtime > _TAKEOVER_S:
                    right.unlink()                     # its owner was killed meanwhile
                    return False
            except OSError:
                pass
            raise CannotWrite(f"{self.path}: another run takes this directory over just now; try again.") from None
        except OSError as error:
            raise CannotWrite(f"{self.path}: cannot write in this run directory ({error.strerror}).") from None
        try:
            if not self._check_stale():
                return False
            write_atomically(self._lock, mine)
            return True
        finally:
            right.unlink(missing_ok=True)

    def _check_stale(self) -> bool:
        """Return whether there is a lock, a stale one; raise CannotWrite saying who is here when it is not stale."""
        age = 0.0
        try:
            age = time.time() - self._lock.stat().st_mtime
            owner = json.loads(self._lock.read_bytes()[:4096])
            host, pid, job = str(owner["host"]), int(owner["pid"]), owner.get("job")
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            host, pid, job = "?", -1, None
        here = host == os.uname().nodename
        stale = (here and not _alive(pid)) or age > _STALE_S or \
            (job is not None and job == os.environ.get("SLURM_JOB_ID") and not (here and _alive(pid)))
        if not stale:
            of_job = f"job {job} on " if job else ""
            raise CannotWrite(f"{self.path}: in use by {of_job}{host}, pid {pid}, last sign of life {age:.0f} s ago; "
                              "end that run or name another --out.")
        return True

    def sign_of_life(self) -> None:
        """Renew the lock's time, at most every 20 seconds. Local."""
        if time.monotonic() - self._beat > _BEAT_S:
            self._beat = time.monotonic()
            try:
                os.utime(self._lock)
            except OSError:
                pass  # somebody removed it; the run itself is not in danger

    def stop_asked(self) -> bool:
        """Return whether somebody has made the file `stop` here, and remove it; looks at most once a second. Local."""
        if time.monotonic() - self._looked < _LOOK_S:
            return False
        self._looked = time.monotonic()
        try:
            os.unlink(self.path / "stop")
        except OSError:
            return False
        return True

    def open_log(self, restored_step: int | None, redo: bool = False, records: Sequence[dict[str, Any]] = ()) -> None:
        """Open metrics.jsonl for appending; lines past `restored_step` are dropped (all lines when it is None).

        Local; raises CannotWrite. With `redo` those are dropped too that the end of an epoch wrote at that very step.
        `records` are what others know of the last steps: those up to `restored_step` that the file lacks are added.
        """
        if self._log is not None:
            self._log.close()
        path = self.path / "metrics.jsonl"
        kept: list[bytes] = []
        if restored_step is not None:
            there = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            known = {_subject(line) for line in there[-_TAIL:]}
            kept = [line for line in (*there, *_lines_of(records, known))
                    if line.endswith(b"\n") and _step_of(line) <= restored_step
                    and not (redo and _ends_epoch(line, restored_step))]
        write_atomically(path, b"".join(kept))
        try:
            self._log = open(path, "ab", buffering=0)
        except OSError as error:
            raise CannotWrite(write_failure(path, error)) from None

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl as one whole line. Local; raises CannotWrite."""
        line = _line_of(record)
        try:
            self._log.write(line)
        except OSError as error:
            raise CannotWrite(write_failure(self.path / "metrics.jsonl", error, len(line))) from None
        self.sign_of_life()

    def write(self, name: str, text: str) -> None:
        """Write the file `name` of the run directory atomically. Local; raises CannotWrite."""
        write_atomically(self.path / name, text.encode())

    def release(self) -> None:
        """Close the log and give up the lock; a directory made for a run that wrote nothing goes too. Local."""
        if getattr(self, "_log", None):
            self._log.close()
        self._lock.unlink(missing_ok=True)
        if self._made and not any(self.path.iterdir()):
            self.path.rmdir()


def _alive(pid: int) -> bool:
    """Return whether a process `pid` runs on this host: one that has ended and that nobody has collected does not."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return pid > 0 and file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return pid > 0


def _line_of(record: dict[str, Any]) -> bytes:
    return to_json(record).encode() + b"\n"


def _lines_of(records: Sequence[dict[str, Any]], known: set[tuple]) -> Iterator[bytes]:
    """Yield the lines of the records whose subjects are not `known`, each subject once."""
    for line in map(_line_of, sorted(records, key=lambda record: record["step"])):
        subject = _subject(line)
        if subject not in known:
            known.add(subject)
            yield line


def _subject(line: bytes) -> tuple:
    """What a line speaks of, whoever wrote it: ranks differ in the times that they tell."""
    try:
        record = json.loads(line)
        return tuple(str(record.get(name)) for name in ("kind", "event", "step", "lost"))
    except (ValueError, AttributeError):
        return ()


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line).get("step", -1))
    except (ValueError, AttributeError, TypeError):
        return math.inf


def _ends_epoch(line: bytes, step: int) -> bool:
    record = json.loads(line)
    return record.get("step") == step and record.get("kind") in ("epoch", "ranks")


def check_same_run(old: dict[str, Any], new: dict[str, Any], free: set[str], defaults: dict[str, Any]) -> None:
    """Raise ConfigError listing (key, old, new) where two resolved configurations differ outside `free`.

    Local. An option that `old` does not name did not exist when it was written: the run had its default.
    """
    had = {key: old.get(key, defaults.get(key)) for key in new}
    odd = [f"{key} was {had[key]!r} and is {value!r}" for key, value in new.items()
           if key not in free and had[key] != value]
    if odd:
        raise ConfigError(f"--resume with other options: {'; '.join(odd)}; give the old values, or another --out.")
