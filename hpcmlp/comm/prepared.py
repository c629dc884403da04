"""What collectives have prepared for the arrays they were used with: found again at little cost, a bounded number."""

from typing import Any

import numpy as np
from mpi4py import MPI


class Prepared:
    """The plans of a collective by kind, array, bounds and number of control words; at most `limit`.

    Local. A plan has `busy` (it must not be dropped now), `free()`, and keeps its array, so that the array's address
    cannot come to mean another one. Beside the key by contents stands one by the identity of the bounds: a step comes
    with the same ones each time, and looking up their contents takes longer than small messages do.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._plans: dict[tuple, Any] = {}
        self._near: dict[tuple, tuple[Any, Any]] = {}   # -> plan, bounds: kept, so that their identity stays theirs
        self._used: dict[Any, int] = {}     # plan -> number of its last use
        self._uses = 0

    def __len__(self) -> int:
        return len(self._plans)

    def find(self, kind: Any, array: np.ndarray, bounds: Any, num_words: int = 0) -> Any:
        """Return the plan for them, None if there is none. `bounds` : sequence, array that nobody changes, or None."""
        near = kind, MPI.Get_address(array), array.size, array.dtype.char, num_words, id(bounds)
        found = self._near.get(near)
        plan = self._plans.get(_key(kind, array, bounds, num_words)) if found is None else found[0]
        if plan is not None:
            if found is None:
                self._keep_near(near, plan, bounds)
            self._uses += 1
            self._used[plan] = self._uses
        return plan

    def add(self, plan: Any, kind: Any, array: np.ndarray, bounds: Any, num_words: int = 0) -> Any:
        """Keep a plan, return it, and drop the one used longest ago that is not busy if there are too many.

        Which one goes is the same on all ranks that make the same calls, how far their messages may be.
        """
        if len(self._plans) >= self._limit:
            self._drop_one()
        self._plans[_key(kind, array, bounds, num_words)] = plan
        self._uses += 1
        self._used[plan] = self._uses
        return plan

    def clear(self) -> None:
        """Drop all plans."""
        for plan in self._plans.values():
            plan.free()
        for table in (self._plans, self._near, self._used):
            table.clear()

    def _keep_near(self, near: tuple, plan: Any, bounds: Any) -> None:
        if bounds is None or isinstance(bounds, np.ndarray):    # lists are made anew for each call
            if len(self._near) >= 4 * self._limit:
                self._near.clear()
            self._near[near] = plan, bounds

    def _drop_one(self) -> None:
        for key, plan in sorted(self._plans.items(), key=lambda item: self._used[item[1]]):
            if not plan.busy:
                del self._plans[key], self._used[plan]
                self._near = {near: kept for near, kept in self._near.items() if kept[0] is not plan}
                plan.free()
                return


def _key(kind: Any, array: np.ndarray, bounds: Any, num_words: int) -> tuple:
    where = bounds.tobytes() if isinstance(bounds, np.ndarray) else None if bounds is None else tuple(bounds)
    # Where there is no memory an address says nothing, and might be an old one on one rank only: then the plans that
    # ranks drop, and their tags, would part.
    there = array.size > 0 and (bounds is None or bounds[0] < bounds[-1])
    return kind, MPI.Get_address(array) if there else 0, array.size, array.dtype.char, where, num_words
