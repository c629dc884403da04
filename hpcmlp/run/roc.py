"""The exact area under the ROC curve over the samples of all ranks, without any rank holding all scores.

Each rank sorts its own scores into groups of equal value, a sample of everybody's scores gives size - 1 splitters, one
Alltoallv brings rank r the r-th range of scores, and the pair counts of the ranges join exactly (`nn.auc`). Per score:
O(log n) to sort and 24 bytes once over the wire. Unweighted counts are integers, so the area has the same bits at any
number of ranks.
"""

import math
from typing import Any

import numpy as np

from hpcmlp.comm.messages import sum_in_place
from hpcmlp.nn import auc
from hpcmlp.nn.metrics import NAN

SAMPLES_PER_RANK = 64  # scores per class that a rank shows to find the splitters
SCORE_LIMIT_BYTES = 1 << 30  # of one rank's scores; above it the AUC is left out and the result says so
EXCHANGE_BYTES = 1 << 26  # of one rank's groups sent at once


class Scores:
    """The scores, targets and weights of this rank's samples, kept for the AUC while they fit."""

    def __init__(self, manifest: Any, rows: int, size: int):
        self.task, self.weighted = manifest.task, manifest.weighted
        if self.task == "classification":
            self.columns = len(manifest.classes) if len(manifest.classes) > 2 else 1
        else:
            self.columns = len(manifest.target_names)
        self.rows_per_rank = -(-rows // size)  # the same on all ranks, and so are the decisions made by it
        self.needed_bytes = 8 * self.rows_per_rank * self.columns
        self.fits = self.needed_bytes <= SCORE_LIMIT_BYTES
        self._blocks: tuple[list, list, list] = ([], [], [])

    def add(self, logits: np.ndarray, targets: np.ndarray, weights: np.ndarray | None) -> None:
        if not self.fits or self.task == "regression":
            return
        logits = np.nan_to_num(logits.astype(np.float64))  # where that changes anything, no area will be computed
        scores = auc.log_odds(logits) if self.task == "classification" else logits
        for blocks, values in zip(self._blocks, (scores, targets, weights), strict=True):
            blocks.append(None if values is None else values.copy())

    def areas(self, comm: Any) -> list[float]:
        """Return the area under the ROC curve of each column. Collective over `comm`."""
        scores, targets, weights = self._joined()
        at_once = max(1, EXCHANGE_BYTES // (24 * max(1, self.rows_per_rank)))
        areas: list[float] = []
        for first in range(0, self.columns, at_once):
            groups = []
            for c in range(first, min(first + at_once, self.columns)):
                if self.task == "multilabel":
                    positive = targets[:, c] > 0.5
                else:
                    positive = targets == (c if self.columns > 1 else 1)
                groups.append(auc.score_groups(scores[:, c], positive, weights))
            areas += _areas_of(groups, not self.weighted, comm)
        return areas

    def _joined(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        scores, targets, weights = self._blocks
        if not scores:  # a rank without rows
            shape = (0, self.columns) if self.task == "multilabel" else (0,)
            return np.zeros((0, self.columns)), np.zeros(shape, np.int32), None
        return (np.concatenate(scores), np.concatenate(targets),
                np.concatenate(weights) if self.weighted else None)


def add_areas(result: dict[str, Any], scores: Scores, names: list[str], comm: Any) -> None:
    """Put `auc` into the result, and the area of each class or label beside its other figures."""
    result["auc"] = NAN
    if "not_finite" in result:
        return
    if not scores.fits:
        result["auc_note"] = (f"left out: the scores of a rank take {scores.needed_bytes >> 20} MiB; use more ranks "
                              f"for less than {SCORE_LIMIT_BYTES >> 20} MiB")
        return
    areas = scores.areas(comm)
    known = [a for a in areas if not math.isnan(a)]
    result["auc"] = sum(known) / len(known) if known else NAN
    table = result["classes" if scores.task == "classification" else "labels"]
    if len(areas) == len(names):
        for name, value in zip(names, areas, strict=True):
            table[str(name)]["auc"] = value


def roc_areas(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None, comm: Any, *,
              weighted: bool = False) -> list[float]:
    """Return the exact area under the ROC curve of each column, ties counting half, over the samples of all ranks.

    Collective over `comm`; every rank passes its own samples, perhaps none, and gets the same result. Unweighted, the
    result has the same bits however the samples are spread over ranks. NaN for a column without both classes.

    Parameters
    ----------
    scores : (n, columns) finite float
    positive : (n, columns) bool
    weights : (n,) float, or None
    weighted : weights count, on all ranks
    """
    groups = [auc.score_groups(scores[:, c], positive[:, c], weights if weighted else None)
              for c in range(scores.shape[1])]
    return _areas_of(groups, not weighted, comm)


def _areas_of(groups: list[np.ndarray], whole: bool, comm: Any) -> list[float]:
    if comm.size > 1:
        groups = _exchange(groups, comm)
    counts = np.zeros((comm.size, len(groups), 4), np.int64 if whole else np.float64)
    for c, own in enumerate(groups):
        counts[comm.rank, c] = auc.pair_counts(own, whole)
    sum_in_place(comm, counts)
    return [auc.area(counts[:, c]) for c in range(len(groups))]


def _exchange(groups: list[np.ndarray], comm: Any) -> list[np.ndarray]:
    """Give rank r, for each column, the groups of all ranks in the r-th range of scores, merged. Collective."""
    size, columns = comm.size, len(groups)
    splitters = _splitters(groups, comm)
    cuts = [np.concatenate([[0], np.searchsorted(own[:, 0], at), [len(own)]])
            for own, at in zip(groups, splitters, strict=True)]
    counts = np.ascontiguousarray(np.diff(cuts, axis=1).T, np.int64)  # (size, columns): groups for each rank
    arriving = np.empty_like(counts)
    comm.Alltoall(counts, arriving)
    leave = np.concatenate([groups[c][cuts[c][r]:cuts[c][r + 1]] for r in range(size) for c in range(columns)])
    come = np.empty((int(arriving.sum()), 3))
    comm.Alltoallv([leave, 3 * counts.sum(axis=1)], [come, 3 * arriving.sum(axis=1)])
    ends = np.cumsum(arriving.reshape(-1)).reshape(size, columns)
    starts = ends - arriving
    return [auc.merge_groups(np.concatenate([come[starts[r, c]:ends[r, c]] for r in range(size)]))
            for c in range(columns)]


def _splitters(groups: list[np.ndarray], comm: Any) -> list[np.ndarray]:
    """Return for each column at most size - 1 ascending scores, the same on all ranks. Collective.

    Equal scores lie on one side of a splitter, so a group never spans two ranges.
    """
    shown = np.zeros((comm.size, len(groups), SAMPLES_PER_RANK))
    for c, own in enumerate(groups):
        at = (np.arange(SAMPLES_PER_RANK) * len(own) + len(own) // 2) // SAMPLES_PER_RANK
        shown[comm.rank, c] = own[at, 0] if len(own) else np.nan
    sum_in_place(comm, shown)
    splitters = []
    for c in range(len(groups)):
        pool = np.sort(shown[:, c][~np.isnan(shown[:, c])])
        at = np.arange(1, comm.size) * len(pool) // comm.size
        splitters.append(pool[at] if len(pool) else np.zeros(comm.size - 1))
    return splitters
