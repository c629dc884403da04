"""The fastest collectives for a run, by a short trial where nothing else can tell.

Tried is what a step does: a reduce-scatter of the gradients and an all-gather of the parameters, on vectors as long as
the run's, or, where that would take too long, as long as the time allows. The time of a call is that of its slowest
rank, which all ranks learn, so all take the same decision from the same numbers.

Between nodes a step hides most of what was started behind its computing (`sync.overlap`; 72 to 82 % of the time, note
of 2026-11-24 on overlap), which MPI's own collectives, called in one piece, do not allow. So where there is enough to
cut into buckets, the time of collectives that can be started counts a half.

The figures of a trial move from run to run, and with other collectives the bits of a run may differ. So the candidates
have a standing order, and one is passed over only where another is clearly faster (`MARGIN`): what is too close to call
is decided alike every time.
"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from hpcmlp.comm import messages
from hpcmlp.comm.shared import SharedUnavailable

BUDGET_S = 0.05         # that a trial may take, about
CALLS = 3               # timed calls of each candidate, of which the fastest counts
FIRST_ELEMENTS = 1 << 10
GROWTH = 8
HIDDEN = 0.5            # of the time of collectives that can be started, at least
CUT_BYTES = 1 << 20     # below, networks are one bucket mostly, and nothing is hidden
MARGIN = 0.25           # a candidate that takes so much more than the fastest still comes before later ones


def fastest(make: Callable[[str, int], Any], names: Sequence[str], comm: Any, size: int,
            hides: bool = False) -> tuple[str, str]:
    """Return the collectives among `names` to take for vectors of `size` elements, and the figures as a sentence.

    Collective over `comm`. Taken are the first of `names` that need at most 1 + MARGIN times as long as the fastest.
    `make(name, elements)` opens a `comm.Exchange`; where it raises SharedUnavailable that one is left out (the last of
    `names` must not). `hides`: the run hides what it can start behind its computing.
    """
    elements = _affordable(make, names[-1], comm, size)
    seconds, counted, missing = {}, {}, ""
    for name in names:
        try:
            seconds[name], starts = _time(make, name, comm, elements, CALLS)
            counted[name] = seconds[name] * (1.0 - HIDDEN if hides and starts and 4 * size >= CUT_BYTES else 1.0)
        except SharedUnavailable as reason:
            missing = f"; no {name}: {reason}"
    least = min(counted.values())
    taken = next(name for name, value in counted.items() if value <= (1.0 + MARGIN) * least)
    ordered = sorted(counted, key=lambda name: (name != taken, counted[name]))
    figures = ", ".join(f"{name} {1e3 * seconds[name]:.2f} ms" for name in ordered)
    of = "" if elements == size else f" for the first {elements:,} of {size:,} numbers"
    close = "" if counted[taken] == least else ", too close to call"
    return taken, f"by trial{of}: {figures}{close}{missing}"


def _affordable(make: Callable[[str, int], Any], name: str, comm: Any, size: int) -> int:
    """Return how many elements can be tried: `size`, or as many as fit in a candidate's share of the time."""
    elements = min(size, FIRST_ELEMENTS)
    while elements < size and _time(make, name, comm, elements, 1)[0] * GROWTH < BUDGET_S / (4 * CALLS):
        elements = min(size, GROWTH * elements)
    return elements


def _time(make: Callable[[str, int], Any], name: str, comm: Any, elements: int, calls: int
          ) -> tuple[float, bool]:
    """Return the seconds of the fastest of `calls` steps' communication, and whether it can be started; alike on all.
    """
    exchange = make(name, elements)
    bounds = np.arange(comm.size + 1) * elements // comm.size
    best, took = np.inf, np.zeros(1)
    for call in range(calls + 1):
        messages.barrier(comm)
        begin = perf_counter()
        exchange.collective.reduce_scatter(exchange.grads, bounds)
        exchange.collective.all_gather(exchange.params, bounds)
        took[0] = perf_counter() - begin
        messages.max_in_place(comm, took)
        if call:    # the first one prepares messages and touches memory
            best = min(best, float(took[0]))
    collective, exchange.params, exchange.grads = exchange.collective, None, None
    collective.free()
    return best, collective.starts
