"""Communication apart from waiting: what an exchange costs is what the rank that came last to it spends on it.

A rank that comes early waits inside the same calls, and no clock of its own tells the two apart. But all ranks of a
step leave it together, so the least over the ranks is the exchange itself, and what another rank spends beyond that is
its waiting for the last one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcmlp.comm import messages


def kept_by_all(comm: Any, seconds: Sequence[Any]) -> np.ndarray:
    """Return the newest entries of `seconds`, as many as every rank has, as float64.

    Collective over `comm`. seconds : one entry a step, newest last; (n, ...) comes back with the least n of all ranks.
    """
    least = np.array([len(seconds)], np.int64)
    messages.min_in_place(comm, least)
    return np.array(seconds, np.float64)[len(seconds) - int(least[0]):]


def least_over_ranks(comm: Any, seconds: np.ndarray) -> np.ndarray:
    """Return what each step's exchange cost the rank that came last to it. Collective over `comm`.

    seconds : (n,) float64, of this rank, by step; n is the same on all ranks.
    """
    least = seconds.copy()
    messages.min_in_place(comm, least)
    return least
