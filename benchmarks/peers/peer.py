"""What the peers of compare_steps.py share: made-up samples, and turns of timed steps asked for line by line.

A peer says one JSON object about itself once it is ready. Then, for each number that it reads from standard input, it
takes so many steps and says {"step_ms": ...}, their median. So all peers of a network stay started while they take
turns: a round lasts seconds, and no start-up stands between two turns that are compared.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

ROWS = 8192  # resident samples, as in hpcmlp bench step
BATCHES = 16


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser of what every peer is told."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--sizes", type=lambda text: [int(w) for w in text.split(",")], required=True,
                        help="widths from input to output")
    parser.add_argument("--global-batch-size", type=int, required=True, help="samples of one step")
    parser.add_argument("--threads", type=int, required=True,
                        help="threads of one process; OMP_NUM_THREADS and its like are the caller's to set")
    return parser


def samples(sizes: list[int], rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return x (ROWS, d) float32, classes (ROWS,) int64, and the (rows,) int64 indices of BATCHES batches."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((ROWS, sizes[0]), dtype=np.float32)
    return x, random.integers(0, sizes[-1], ROWS), [random.integers(0, ROWS, rows) for _ in range(BATCHES)]


def time_steps(step: Callable[[int], None], count: int) -> list[float]:
    """Return the milliseconds of each of `count` steps, after a few that wake caches and threads."""
    for number in range(max(3, count // 10)):
        step(number)
    times = []
    for number in range(count):
        begin = time.perf_counter()
        step(number)
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def take_turns(about: dict, turn: Callable[[int], list[float]]) -> None:
    """Say `about`, then for each line of standard input the median of the milliseconds that `turn(steps)` returns."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps({"step_ms": statistics.median(turn(int(line)))}), flush=True)
