"""The exact area under the ROC curve from groups of equal scores, in pieces that add over ranges of scores.

The area is the share of (positive, negative) pairs in which the positive scores higher, a tie counting half (Mann and
Whitney, 1947). Samples with one score form a group (`score_groups`); counting pairs in ascending groups costs one sort
and one pass (`pair_counts`), and ranges of scores that follow each other join exactly (`area`), so the value does not
depend on how many ranges there are. `run.evaluation` brings the groups of all ranks into such ranges.
"""

import numpy as np


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Return log(p_c / (1 - p_c)) of the softmax probabilities: the order of p_c, where p_c itself would round to 1.

    Local. Two classes give one column, the score of class 1; K > 2 give one column per class (one against the rest).

    Parameters
    ----------
    logits : (n, K) float

    Returns
    -------
    (n, 1) or (n, K) float64
    """
    z = np.asarray(logits, np.float64)
    if z.shape[1] == 2:
        return z[:, 1:] - z[:, :1]
    if z.size <= len(z):  # no rows, or one class and nothing to tell apart
        return np.zeros_like(z)
    rows, best = np.arange(len(z)), z.argmax(axis=1)
    top = z[rows, best][:, None]
    e = np.exp(z - top)
    rest = e.sum(axis=1, keepdims=True) - e
    rest[rows, best] = 1.0
    odds = z - top - np.log(rest)
    # for the largest class that difference would cancel: sum the other classes about their own largest
    others = z.copy()
    others[rows, best] = -np.inf
    second = others.max(axis=1)
    odds[rows, best] = top[:, 0] - second - np.log(np.exp(others - second[:, None]).sum(axis=1))
    return odds


def score_groups(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the distinct scores in ascending order, with the positives and negatives that share each.

    Local. Cost: one sort.

    Parameters
    ----------
    scores : (n,) finite float
    positive : (n,) bool
    weights : (n,) float or None (counts)

    Returns
    -------
    (m, 3) float64: score, positives, negatives
    """
    share = np.empty((len(scores), 3))
    share[:, 0], share[:, 1], share[:, 2] = scores, positive, ~positive
    if weights is not None:
        share[:, 1:] *= weights[:, None]
    return merge_groups(share)


def merge_groups(groups: np.ndarray) -> np.ndarray:
    """Return `groups` (m, 3) in ascending order of score with equal scores joined. Local."""
    if len(groups) < 2:
        return groups
    groups = groups[np.argsort(groups[:, 0], kind="stable")]
    starts = np.flatnonzero(np.concatenate([[True], groups[1:, 0] != groups[:-1, 0]]))
    if len(starts) == len(groups):
        return groups
    merged = np.add.reduceat(groups, starts, axis=0)
    merged[:, 0] = groups[starts, 0]
    return merged


def pair_counts(groups: np.ndarray, whole: bool) -> np.ndarray:
    """Count the pairs in which the positive scores higher than the negative.

    Local.

    Parameters
    ----------
    groups : (m, 3) float64 in ascending order of score, as `merge_groups` gives them
    whole : the counts are whole numbers and are added as such

    Returns
    -------
    (4,) positives, negatives, high, low: int64 when `whole`, else float64. high * 2^24 + low is twice the number of
    pairs won, a tie counting half (in two words, since their products outgrow int64 at 2^31 positives and negatives).
    """
    kind = np.int64 if whole else np.float64
    positives, negatives = groups[:, 1].astype(kind), groups[:, 2].astype(kind)
    below = 2 * (np.cumsum(negatives) - negatives) + negatives
    if whole:
        high, low = np.dot(positives, below >> 24), np.dot(positives, below & 0xFFFFFF)
    else:
        high, low = 0.0, np.dot(positives, below)
    return np.array([positives.sum(), negatives.sum(), high, low], kind)


def area(counts: np.ndarray) -> float:
    """Return the area under the ROC curve from the pair counts of consecutive ranges of scores.

    Local. Exact for whole counts (Python integers, one division at the end). NaN when a class is missing.

    Parameters
    ----------
    counts : (ranges, 4) int64 or float64, `pair_counts` of each range, ranges in ascending order of score
    """
    won = below = 0
    for positives, negatives, high, low in counts.tolist():
        won += high * 2**24 + low + 2 * below * positives
        below += negatives
    pairs = 2 * below * sum(counts[:, 0].tolist())
    return won / pairs if pairs else float("nan")
