"""How fast each rank multiplies, how fast each link of the ring is, and how far clocks are apart: in about a second."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

GEMM_WIDTH = 384
GEMM_S = 0.5
LINK_BYTES = 1 << 19    # well above what a network card or a shaper lets pass as a burst
LINK_MESSAGES = 4
LINK_ROUNDS = 3
CLOCK_TRIES = 5


def gemm_gflops(width: int = GEMM_WIDTH, seconds: float = GEMM_S) -> float:
    """Return the best rate of a square float32 product in `seconds`, GFLOP/s.

    Local. The best, not the mean: it shows slow cores and wrong kernels, and not who else used the core meanwhile.
    """
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((width, width)).astype(np.float32) for _ in range(2))
    out = np.empty_like(a)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        begin = time.perf_counter()
        np.matmul(a, b, out=out)
        best = min(best, time.perf_counter() - begin)
    return 2 * width**3 / best / 1e9


def link_rate(comm: Any, size: int = LINK_BYTES) -> float:
    """Return the rate at which bytes come in from the rank to the left, bytes/s; 0 for a single rank.

    Collective over `comm`: all ranks send to the right at once. The middle of three rounds of some messages each: ranks
    do not start at the same moment, so a single message may have arrived before its time is taken.
    """
    if comm.size == 1:
        return 0.0
    out, into = np.zeros(size, np.uint8), np.empty((LINK_MESSAGES, size), np.uint8)
    right, left, rates = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size, []
    for _ in range(LINK_ROUNDS):
        receives = [comm.Irecv(row, left) for row in into]
        comm.Barrier()
        begin = time.perf_counter()
        sends = [comm.Isend(out, right) for _ in into]      # none waits for what comes in: links stay apart
        for receive in receives:
            receive.Wait()
        rates.append(into.size / (time.perf_counter() - begin))
        for send in sends:
            send.Wait()
    return statistics.median(rates)


def clock_offset(comm: Any, clock: Callable[[], float] | None = None) -> float:
    """Return how far this rank's wall clock is ahead of rank 0's, s; what the messages' time leaves open counts as 0.

    Collective over `comm`: rank 0 asks one rank after the other (Cristian's method, the quickest answer of five).
    """
    clock = clock or time.time
    word = np.zeros(1)
    offset = 0.0
    for rank in range(1, comm.size):
        if comm.rank == 0:
            seen = []
            for _ in range(CLOCK_TRIES):
                begin = clock()
                comm.Send(word, rank)
                comm.Recv(word, rank)
                end = clock()
                seen.append((end - begin, float(word[0]) - (begin + end) / 2))
            trip, apart = min(seen)
            word[0] = np.sign(apart) * max(0.0, abs(apart) - trip / 2)
            comm.Send(word, rank)
        elif comm.rank == rank:
            for _ in range(CLOCK_TRIES):
                comm.Recv(word, 0)
                word[0] = clock()
                comm.Send(word, 0)
            comm.Recv(word, 0)
            offset = float(word[0])
    return offset
