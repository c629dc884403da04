"""Start ranks, and start them again on the ranks that remain when some die or hang."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from hpcmlp.config import LaunchConfig
from hpcmlp.errors import Unavailable, UsageError
from hpcmlp.run.checkpoint import list_checkpoints
from hpcmlp.run.watchdog import END_FILE

# Starting again would end alike: usage, data, input, service, numbers or fault of ours, output, configuration; and a
# user who has said stop.
FINAL = (2, 65, 66, 69, 70, 73, 78, 130, 141)
SAVED = 75
LONGEST_BACKOFF_S = 60.0
FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def main(config: LaunchConfig, comm: Any = None) -> int:
    """Run the command until its run has finished or the restarts are used up.

    Local: one process, which starts no MPI. Returns 0 when RUN/summary.json says that the run has finished, whatever
    the launcher returned; else the last exit code. Raises UsageError or Unavailable.
    """
    program, *arguments = config.command
    run = run_directory(program, arguments)
    launcher = find_launcher(config.launcher)
    if "--elastic" in arguments and "--with-ft" not in launcher:
        launcher += ["--with-ft", "ulfm"]
    ranks, restarts = config.ranks, 0
    attempt = Attempt()
    while True:
        before = stamp(run, "summary.json"), stamp(run, END_FILE)
        code = attempt.run([*launcher, "-n", str(ranks), sys.executable, "-m", "hpcmlp", program, *arguments])
        if finished(run, before[0]):
            return 0
        hung = stamp(run, END_FILE) != before[1]
        if attempt.told or code in FINAL or (code == SAVED and not hung):
            return code
        what = "ended a wait without end" if hung else f"ended with {code} and without its summary"
        if restarts == config.max_restarts:
            say(f"the job {what}; it was started again {restarts} times, which is all that --max-restarts allows")
            return code or SAVED
        pause = min(config.backoff * 2**restarts, LONGEST_BACKOFF_S)
        restarts += 1
        ranks = max(config.min_ranks, ranks - 1)
        say(f"the job {what}; {newest(run)}: it starts again on {ranks} rank{'s' * (ranks > 1)} in {pause:g} s "
            f"(restart {restarts} of {config.max_restarts})")
        attempt.pause(pause)
        if attempt.told:
            return SAVED
        if "--resume" not in arguments:
            arguments.append("--resume")


class Attempt:
    """One start of the job at a time; signals go on to it. `told` is True once one has come."""

    def __init__(self):
        self.told = False
        self._process: subprocess.Popen | None = None
        for number in FORWARDED:
            signal.signal(number, self._forward)

    def _forward(self, number: int, frame: object) -> None:
        self.told = True
        if self._process is not None:
            self._process.send_signal(number)

    def run(self, command: list[str]) -> int:
        """Start the job, wait for it and return its exit code, 128 + the number of a signal. Local."""
        # A group of its own: an INT from the terminal comes to it once, from here.
        self._process = subprocess.Popen(command, start_new_session=True)
        code = self._process.wait()
        self._process = None
        return 128 - code if code < 0 else code

    def pause(self, seconds: float) -> None:
        """Wait, unless a signal has come. Local."""
        end = time.monotonic() + seconds
        while not self.told and time.monotonic() < end:
            time.sleep(min(0.1, seconds))


def run_directory(program: str, arguments: list[str]) -> str:
    """Return the run directory that the command names. Local; raises UsageError."""
    if program != "train":
        raise UsageError(f"hpcmlp launch starts 'train', not {program!r}; give: launch -n RANKS -- train --data DIR "
                         "--out RUN.")
    for k, word in enumerate(arguments):
        if word == "--out" and k + 1 < len(arguments):
            return arguments[k + 1]
        if word.startswith("--out="):
            return word.partition("=")[2]
    raise UsageError("hpcmlp launch wants --out RUN among the words after '--': its summary.json tells whether the run "
                     "has finished.")


def find_launcher(given: str | None) -> list[str]:
    """Return the words that start ranks: as given, or the mpiexec beside this Python or in PATH. Local."""
    beside = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    words = shlex.split(given) if given else [beside if os.access(beside, os.X_OK) else "mpiexec"]
    if not words or shutil.which(words[0]) is None:
        raise Unavailable(f"there is no launcher {given or 'mpiexec'!r} here; name one with --launcher, such as "
                          "'srun' or 'mpiexec -hosts a,b'.")
    return words


def stamp(run: str, name: str) -> tuple[int, int] | None:
    """Return what tells a new file of that name from an old one, None when there is none. Local."""
    try:
        found = os.stat(os.path.join(run, name))
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def finished(run: str, before: tuple[int, int] | None) -> bool:
    """Return whether a summary has been written since `before` that says the run has finished. Local."""
    if stamp(run, "summary.json") in (None, before):
        return False
    try:
        with open(os.path.join(run, "summary.json"), encoding="utf-8") as file:
            return json.load(file).get("status") == "finished"
    except (OSError, ValueError, AttributeError):
        return False


def newest(run: str) -> str:
    """Return what there is to go on from, as a few words. Local."""
    found = list_checkpoints(run)
    return f"saved up to {found[0].name}" if found else "nothing was saved yet"


def say(text: str) -> None:
    """Print one line for people. Local."""
    print(f"hpcmlp: launch: {text}", file=sys.stderr, flush=True)
