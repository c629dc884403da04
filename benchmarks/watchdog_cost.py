"""What the watchdog costs: its marks in a step, its thread's beats, and a loop of Python and NumPy beside it.

    mpiexec -n 2 python benchmarks/watchdog_cost.py [--step-ms 1.4]

Prints, for rank 0: microseconds of a mark and of a beat, the share of a step that both take at the default limit (two
marks a step, one beat a second), and the median time of a loop of small array operations with and without the thread,
taken in turns.
"""

import argparse
import statistics
import time
from functools import partial

from hpcmlp import launch

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--step-ms", type=float, default=1.4, help="step to compare with, ms (default 1.4)")
parser.add_argument("--limit", type=float, default=60.0, help="of the watchdog, seconds (default 60)")
parser.add_argument("--rounds", type=int, default=8, help="pairs of loops (default 8)")
options = parser.parse_args()
world = launch.open_world()

import numpy as np  # noqa: E402  the BLAS threads are set

from hpcmlp.comm.topology import Topology  # noqa: E402
from hpcmlp.run.watchdog import STEP, Watchdog  # noqa: E402


def microseconds(call, times):
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return 1e6 * (time.perf_counter() - begin) / times


def loop(seconds):
    """Return microseconds a round of small array operations, over some seconds."""
    a, b, rounds = np.ones(1000, np.float32), np.ones(1000, np.float32), 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for _ in range(100):
            np.add(a, b, a)
            np.multiply(a, 0.5, a)
        rounds += 100
    return 1e6 * (time.perf_counter() - begin) / rounds


topology = Topology(world.comm)
make = partial(Watchdog, topology, options.limit, None, launch.end_all)
with make() as watch:
    mark = microseconds(lambda: watch.mark(STEP, 7), 200_000) - microseconds(lambda: None, 200_000)
    beat = microseconds(lambda: watch._beat(time.monotonic()), 2000)
pairs = []
for _ in range(options.rounds):
    world.comm.Barrier()
    without = loop(2.0)
    with make():
        world.comm.Barrier()
        pairs.append((without, loop(2.0)))
if world.rank == 0:
    beat_s = min(options.limit / 8, 1.0)
    share = 2 * mark / (1e3 * options.step_ms) + 1e-6 * beat / beat_s
    ratios = sorted(w / o for o, w in pairs)
    print(f"{world.size} ranks, {world.library}: mark {mark:.3f} us, beat {beat:.0f} us every {beat_s:g} s: "
          f"{100 * share:.4f} % of a step of {options.step_ms:g} ms")
    print(f"loop without {statistics.median(o for o, _ in pairs):.3f} us, "
          f"with {statistics.median(w for _, w in pairs):.3f} us; ratio of pairs: "
          f"median {statistics.median(ratios):.4f}, from {ratios[0]:.4f} to {ratios[-1]:.4f}")
topology.free()
