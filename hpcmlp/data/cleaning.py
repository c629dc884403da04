"""Which raw rows may stay: missing and not finite values, counted, dropped or refused by a stated policy."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from hpcmlp.data.csv_numbers import NUMBER
from hpcmlp.data.preprocess import raw_targets, refusal
from hpcmlp.data.statistics import BLOCK_ROWS
from hpcmlp.data.tables import Rows, Table
from hpcmlp.data.targets import missing_targets
from hpcmlp.errors import DataError


@dataclass(frozen=True)
class Policy:
    """What happens to missing inputs (`median`, `mean`, `drop`, `error`) and to invalid ones.

    Missing is an empty field or a null; NaN in a binary file and infinities anywhere are invalid: `error`, `drop`, or
    `missing` (then the first policy applies).
    """

    missing: str = "median"
    invalid: str = "error"


@dataclass(frozen=True)
class Counts:
    """What was found in all rows of a source: rows dropped, missing and invalid values by column, missing targets."""

    dropped: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    invalid: dict[str, int] = field(default_factory=dict)
    missing_targets: int = 0


@dataclass
class Verdict:
    """What was found in some rows: `keep` (n,) bool, and counts of values by column."""

    keep: np.ndarray
    missing: dict[str, int] = field(default_factory=dict)
    invalid: dict[str, int] = field(default_factory=dict)
    missing_targets: int = 0


def judge(rows: Rows, inputs: tuple[str, ...], targets: tuple[str, ...], table: Table, first: int,
          policy: Policy) -> Verdict:
    """Count and judge the missing and not finite values of raw rows.

    Local. `inputs` are the columns' names (of a matrix: all of them). `first` is the number of the first row. Raises
    DataError, with row and column, for the first value that the policy refuses.
    """
    y = raw_targets(rows, targets, table)
    verdict = Verdict(np.ones(len(y), bool))
    lost = missing_targets(y)
    if lost.any():
        if policy.missing != "drop":
            raise DataError(f"{table.where(first + int(lost.argmax()))}: target {', '.join(targets)} is missing or "
                            "NaN; fill it, remove the row, or prepare with --missing drop.")
        verdict.missing_targets = int(lost.sum())
        verdict.keep &= ~lost
    if "x" in rows and rows["x"].ndim == 2:
        x = rows["x"]
        for start in range(0, len(x) if x.dtype.kind == "f" else 0, BLOCK_ROWS):
            block = x[start:start + BLOCK_ROWS]
            fine = np.isfinite(block)
            if not fine.all():
                for column in np.flatnonzero(~fine.all(axis=0)):
                    _judge_column(block[:, column], inputs[column], table, first + start, policy, verdict, start)
        return verdict
    for name in inputs:
        _judge_column(rows[name], name, table, first, policy, verdict, 0)
    return verdict


def _judge_column(values: np.ndarray, name: str, table: Table, first: int, policy: Policy, verdict: Verdict,
                  start: int) -> None:
    """Add one column's values to the verdict; `start` is their place in it."""
    if values.dtype == object:
        missing = np.array([v is None for v in values], bool)
        invalid = np.zeros(len(values), bool)
    else:
        bad = ~np.isfinite(values)
        if not bad.any():
            return
        missing = bad & np.isnan(values) if table.nan_is_missing else np.zeros(len(values), bool)
        invalid = bad & ~missing
    keep = verdict.keep[start:start + len(values)]
    for wrong, kind, counts in ((invalid, policy.invalid, verdict.invalid), (missing, policy.missing, verdict.missing)):
        if not wrong.any():
            continue
        counts[name] = counts.get(name, 0) + int(wrong.sum())
        rule = policy.missing if kind == "missing" else kind
        if rule == "error":
            row = int(wrong.argmax())
            raise DataError(refusal(table, first + row, name, values[row], bool(missing[row])))
        if rule == "drop":
            keep &= ~wrong


def check_weights(weight: np.ndarray, table: Table, first: int) -> np.ndarray:
    """Return sample weights as (n,) float32. Local; raises DataError, with the row, for a weight that is none."""
    if weight.dtype == object:
        raise DataError(f"{table.name}: the weights are texts; they must be numbers.")
    wrong = ~(np.isfinite(weight) & (weight >= 0))
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"{table.where(first + row)}: the weight is {weight[row]}; weights are finite and at least 0.")
    return weight.astype(np.float32)


def check_levels(values: np.ndarray, name: str, levels: Collection[str], most: int, table: Table,
                 rows: np.ndarray) -> None:
    """Raise DataError when a text column has more than `most` levels; where most are numbers, name a row that is none.

    Local. `values` are this rank's texts of the column `name`, `rows` (n,) their row numbers.
    """
    if len(levels) <= most:
        return
    odd = {level for level in levels if not NUMBER.fullmatch(level)}
    if len(odd) < len(levels) / 2:
        for row, value in zip(rows.tolist(), values, strict=True):
            if value in odd:
                raise DataError(f"{table.where(row)}, column {name!r}: {value!r} is no number, unlike most of this "
                                "column; correct it, or choose inputs with --columns.")
    raise DataError(f"{table.name}: column {name!r} holds {len(levels)} different texts; at most {most} become inputs: "
                    "leave it out with --columns, or raise --max-levels.")


def take(rows: Rows, keep: np.ndarray) -> Rows:
    """Return the rows that are kept; the same arrays when all are. Local."""
    return rows if keep.all() else {name: values[keep] for name, values in rows.items()}
