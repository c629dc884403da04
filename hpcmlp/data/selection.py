"""Which columns of a source are inputs, targets and weights."""

from dataclasses import dataclass

import numpy as np

from hpcmlp.data.readers import SourcePart
from hpcmlp.data.splits import SPLITS
from hpcmlp.data.tables import Chain, Part
from hpcmlp.errors import ConfigError, DataError


@dataclass(frozen=True)
class Selection:
    """A source as one table, with what each of its columns is for.

    `ends` are the rows where its parts end, `splits` their splits as numbers (-1: still to be split).
    """

    table: Chain
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    weight: str | None
    ends: tuple[int, ...]
    splits: tuple[int, ...]

    def given(self, rows: np.ndarray) -> np.ndarray:
        """Return the split that the source gives each row: (n,) int8, -1 for none. Local."""
        return np.array(self.splits, np.int8)[np.searchsorted(self.ends, rows, side="right")]


def select(parts: list[SourcePart], target: str | None = None, columns: tuple[str, ...] | None = None,
           weight: str | None = None, categorical: tuple[str, ...] | None = None,
           limit: int | None = None) -> Selection:
    """Return what the columns of a source are for.

    Local, alike on all ranks. Raises ConfigError or DataError that says which columns there are.

    Parameters
    ----------
    parts : of one layout
    target : column or columns, comma-separated; a matrix has its own
    columns : inputs; None for all that are neither target nor weight
    categorical : columns to read as texts
    limit : rows taken from the start of the training part, or of the whole where nothing is split yet
    """
    tables = [Part(p.table, limit) if limit is not None and p.split in (None, "train") else p.table for p in parts]
    table = Chain(tables)
    if not table.num_rows:
        raise DataError(f"{table.name}: has no rows; there is nothing to learn from.")
    ends = tuple(int(e) for e in np.cumsum([t.num_rows for t in tables]))
    splits = tuple(-1 if p.split is None else SPLITS.index(p.split) for p in parts)
    if table.matrix:
        for option, value in (("--columns", columns), ("--categorical", categorical)):
            if value:
                raise ConfigError(f"{option} needs columns with names; {table.name} is a matrix of "
                                  f"{len(table.columns)} unnamed ones.")
        if not table.target_names:
            raise DataError(f"{table.name}: has inputs and no targets; name their array with --y.")
        return Selection(table, table.columns, table.target_names, "weight" if weight else None, ends, splits)
    if target is None:
        raise ConfigError(f"{table.name}: name the target column with --target; its columns are "
                          f"{_some(table.columns)}.")
    targets = tuple(name.strip() for name in target.split(","))
    if target in table.columns:
        targets = (target,)
    inputs = columns or tuple(c for c in table.columns if c not in targets and c != weight)
    for name in (*targets, *inputs, *(categorical or ()), *((weight,) if weight else ())):
        if name not in table.columns:
            raise DataError(f"{table.name}: has no column {name!r}; its columns are {_some(table.columns)}.")
    for name in inputs:
        if name in targets or name == weight or inputs.count(name) > 1:
            why = "a target" if name in targets else "the weight" if name == weight else "named twice"
            raise ConfigError(f"column {name!r} cannot be an input: it is {why}.")
    for name in categorical or ():
        if name not in inputs:
            raise ConfigError(f"--categorical names {name!r}, which is no input.")
    if not inputs:
        raise DataError(f"{table.name}: has no column left to be an input.")
    if len(set(targets)) != len(targets):
        raise ConfigError(f"--target {target}: a column is named twice.")
    table.set_text(categorical or ())
    return Selection(table, inputs, targets, weight, ends, splits)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
