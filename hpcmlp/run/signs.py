"""Signs of life of a node's ranks in memory that they share: where each is, since when, and its Python line.

One record a rank in a mapped file without a name. A rank's main thread writes one number, its place in the run; its
watchdog thread writes the rest, from a look at the main thread's stack. Nobody waits for anybody and no MPI is called,
so the record of a rank that is stopped, stuck in C code or gone still tells the others where it was last.

A rank waits for others while it is inside `hpcmlp/comm/`: the innermost frame of the package tells. No call has to be
wrapped for that, and the operation and the line cost nothing between two looks.
"""

import mmap
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

from hpcmlp import node_memory
from hpcmlp.comm.messages import barrier, broadcast_bytes

PHASES = ("start", "input", "step", "validation", "save", "end")
PLACE, BEAT_NS, SINCE_NS, PID, NAMESPACE, WAITS, LEAVES, STACKS, TEXT_BYTES = range(9)
RECORD_BYTES = 512      # a rank's own cache lines
TEXT_START = 80
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
COMM = PACKAGE + "comm" + os.sep


@dataclass(frozen=True)
class Sign:
    """What is known of one rank.

    `place` orders the ranks: the later in the run the larger. `silent_s`: seconds since its watchdog thread last ran;
    `still_s`: since it came to where it is; `waits`: it waits for others; `state`: "", or what the system says of a
    silent process: "stopped", "gone", "busy" (it runs, but its interpreter does not).
    """

    rank: int
    host: str
    pid: int
    place: int = 0
    silent_s: float = 0.0
    still_s: float = 0.0
    waits: bool = False
    leaves: bool = False
    operation: str = ""
    line: str = ""
    state: str = ""

    @property
    def step(self) -> int:
        return self.place >> 3

    @property
    def phase(self) -> str:
        return PHASES[self.place & 7]


class Signs:
    """The table of this node's ranks, and this rank's record in it.

    Collective over `node` (the communicator of the ranks that share memory) when it has several ranks.

    Parameters
    ----------
    ranks : of the node's ranks the numbers in the world, in the order of `node`.
    host : this host's name.
    """

    def __init__(self, node: Any, ranks: list[int], host: str):
        self.ranks, self.host, self.local_rank = ranks, host, node.rank
        self._memory = _map_together(node, RECORD_BYTES * node.size)
        self._numbers = memoryview(self._memory).cast("q")
        per = RECORD_BYTES // 8
        self._records = [self._numbers[k * per:(k + 1) * per] for k in range(node.size)]
        self._mine = self._records[node.rank]
        self._main = threading.main_thread().ident
        self._last: Any = None
        self._mine[PID], self._mine[NAMESPACE] = os.getpid(), os.stat("/proc/self/ns/pid").st_ino
        self.look()
        if node.size > 1:
            barrier(node)       # every record is there before anybody judges

    def mark(self, phase: int, step: int) -> None:
        """Say where the main thread is: an index into `PHASES`, and the step in hand, from 0. Local, some 0.1 us."""
        self._mine[PLACE] = step << 3 | phase

    def leave(self) -> None:
        """Say that this rank leaves the run on its own account, so that nobody misses it. Local."""
        self._mine[LEAVES] = 1
        self._mine[STACKS] = 0

    def offer_stacks(self, descriptor: int) -> None:
        """Say in which open file of this process the stacks stand after a SIGUSR2. Local."""
        self._mine[STACKS] = descriptor

    def look(self) -> None:
        """Bring this rank's record up to date: called by its watchdog thread. Local."""
        mine, now = self._mine, time.monotonic_ns()
        waits, operation, line, caller = where(sys._current_frames().get(self._main))
        key = mine[PLACE], waits, operation, caller if waits else None
        if key != self._last:
            self._last = key
            mine[SINCE_NS] = now
        text = f"{operation}\n{line}".encode()[:RECORD_BYTES - TEXT_START]
        start = self.local_rank * RECORD_BYTES + TEXT_START
        self._memory[start:start + len(text)] = text
        mine[TEXT_BYTES] = len(text)
        mine[WAITS] = waits
        mine[BEAT_NS] = now

    def read(self, local_rank: int) -> Sign:
        """Return what the record of a rank of this node says now. Local."""
        record, now = self._records[local_rank], time.monotonic_ns()
        start = local_rank * RECORD_BYTES + TEXT_START
        text = bytes(self._memory[start:start + record[TEXT_BYTES]]).decode(errors="replace")
        operation, _, line = text.partition("\n")
        return Sign(self.ranks[local_rank], self.host, record[PID], record[PLACE],
                    max(0, now - record[BEAT_NS]) * 1e-9, max(0, now - record[SINCE_NS]) * 1e-9,
                    bool(record[WAITS]), bool(record[LEAVES]), operation, line)

    def gone(self, local_rank: int) -> bool:
        """Return whether that rank's process has ended; False where it cannot be seen from here. Local."""
        record = self._records[local_rank]
        if not record[PID] or record[NAMESPACE] != self._mine[NAMESPACE]:
            return False
        try:
            os.kill(record[PID], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def state(self, local_rank: int) -> str:
        """Return what the system says of that rank's process: "stopped", "gone", "busy" or "". Local."""
        if self._records[local_rank][NAMESPACE] != self._mine[NAMESPACE]:
            return ""
        try:
            with open(f"/proc/{self._records[local_rank][PID]}/stat", encoding="utf-8", errors="replace") as file:
                letter = file.read().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"
        return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(letter, "busy")

    def send(self, local_rank: int, number: int) -> bool:
        """Send a signal to that rank's process, if it is one of this process's namespace. Local."""
        record = self._records[local_rank]
        if not record[PID] or record[NAMESPACE] != self._mine[NAMESPACE]:
            return False
        try:
            os.kill(record[PID], number)
        except OSError:
            return False
        return True

    def stacks_path(self, local_rank: int) -> str | None:
        """Return where that rank's stacks can be read after a SIGUSR2; None when it cannot take one. Local."""
        record = self._records[local_rank]
        if not record[STACKS] or record[NAMESPACE] != self._mine[NAMESPACE]:
            return None
        return f"/proc/{record[PID]}/fd/{record[STACKS]}"


def where(frame: FrameType | None) -> tuple[bool, str, str, Any]:
    """Return (waits for others, operation, line, line of the caller) for the innermost frame of a stack.

    Local. The operation of a rank that waits is the outermost function of `hpcmlp.comm` that it is in, such as
    `all_gather`; else the innermost function of the package. The line reads `hpcmlp/sync/step.py:126 in run`.
    """
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return False, "", "", None
    line = f"{_short(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
    if not frame.f_code.co_filename.startswith(COMM):
        return False, frame.f_code.co_name, line, None
    entry: FrameType | None = frame
    while frame is not None:
        # What stands between two frames of ours is the standard library's, such as contextlib's.
        if frame.f_code.co_filename.startswith(COMM):
            entry = frame
        elif frame.f_code.co_filename.startswith(PACKAGE):
            break
        frame = frame.f_back
    caller = None if frame is None else (_short(frame.f_code.co_filename), frame.f_lineno)
    return True, entry.f_code.co_name.strip("_"), line, caller


def line_of(stacks: str) -> str:
    """Return the innermost line of the package in what faulthandler wrote of the thread that took the signal.

    Local; "" when there is none.
    """
    _, _, current = stacks.rpartition("Current thread")
    found = re.search(rf'File "({re.escape(PACKAGE)}[^"]*)", line (\d+) in (\S+)', current)
    return f"{_short(found[1])}:{found[2]} in {found[3]}" if found else ""


def _short(file: str) -> str:
    return os.path.basename(PACKAGE[:-1]) + os.sep + file[len(PACKAGE):]


def _map_together(node: Any, size: int) -> mmap.mmap:
    """Return memory that all ranks of the node share, zeroed, whose file has no name any more. Collective."""
    if node.size == 1:
        return mmap.mmap(-1, size)
    path = b""
    if node.rank == 0:
        folder = node_memory.FOLDER if node_memory.free_bytes() > size else "/tmp"
        path = f"{folder}/hpcmlp-signs-{os.getpid()}-{os.urandom(4).hex()}".encode()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(descriptor, size)
    path = broadcast_bytes(node, path if node.rank == 0 else None)
    if node.rank:
        descriptor = os.open(path, os.O_RDWR)
    memory = mmap.mmap(descriptor, size)
    os.close(descriptor)
    barrier(node)
    if node.rank == 0:
        os.unlink(path)
    return memory
