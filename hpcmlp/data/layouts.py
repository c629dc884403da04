"""Which of a file's arrays are inputs, targets and weights, by name: ours, and other people's habits."""

from dataclasses import dataclass

import numpy as np

from hpcmlp.errors import DataError

INPUTS = ("x", "X", "features", "data", "inputs", "images")
TARGETS = ("y", "Y", "labels", "targets", "label", "target")
WEIGHTS = ("weight", "weights", "sample_weight", "w")
SPLIT_WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "t10k")}

Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]


@dataclass(frozen=True)
class Layout:
    """The arrays of one split (None: of the whole file)."""

    split: str | None
    x: str
    y: str | None
    weight: str | None


def find_layouts(name: str, shapes: Shapes, x: str | None = None, y: str | None = None,
                 weight: str | None = None) -> list[Layout]:
    """Return the layouts of a file's arrays: one without split, or one per split, train first; [] when nothing fits.

    Local. `x`, `y`, `weight` name arrays and must be there; what is not named is found by habit. Raises DataError that
    lists what was found.
    """
    for given in (x, y, weight):
        if given is not None and given not in shapes:
            raise DataError(f"{name}: has no array {given!r}; it holds {describe(shapes)}.")
    if x is not None:
        return [_complete(name, shapes, Layout(None, x, y or _near(x, TARGETS, INPUTS, shapes),
                                               weight or _near(x, WEIGHTS, INPUTS, shapes)))]
    found = [_complete(name, shapes, Layout(None, habit, y or _near(habit, TARGETS, INPUTS, shapes),
                                            weight or _near(habit, WEIGHTS, INPUTS, shapes)))
             for habit in INPUTS if habit in shapes]
    if len(found) > 1:
        raise DataError(f"{name}: {found[0].x!r} and {found[1].x!r} may both be the inputs; choose with --x.")
    if found:
        return found
    layouts = []
    for split, words in SPLIT_WORDS.items():
        for word in words:
            names = [n for habit in INPUTS for n in _spellings(word, habit) if n in shapes]
            if names:
                targets = [n for habit in TARGETS for n in _spellings(word, habit) if n in shapes]
                weights = [n for habit in WEIGHTS for n in _spellings(word, habit) if n in shapes]
                layouts.append(_complete(name, shapes, Layout(split, names[0], targets[0] if targets else None,
                                                              weights[0] if weights else None)))
                break
    if layouts and layouts[0].split == "train":
        return layouts
    return []


def describe(shapes: Shapes) -> str:
    """Return what a file holds, for an error message. Local."""
    items = [f"{n} {tuple(shape)} {dtype}" for n, (shape, dtype) in list(shapes.items())[:8]]
    more = f" and {len(shapes) - 8} more" if len(shapes) > 8 else ""
    return (", ".join(items) + more) if items else "no arrays"


def split_of_file(stem: str) -> str | None:
    """Return the split that a file name speaks of: train-images -> train, t10k-labels -> test. Local."""
    words = stem.lower().replace("_", "-").replace(".", "-").split("-")
    for split, names in SPLIT_WORDS.items():
        if any(word in names for word in words):
            return split
    return None


def _spellings(split: str, habit: str) -> tuple[str, ...]:
    return (f"{habit}_{split}", f"{split}_{habit}", f"{split}/{habit}")


def _near(x: str, wanted: tuple[str, ...], inputs: tuple[str, ...], shapes: Shapes) -> str | None:
    """The array that stands to x as y stands to X: same group, same prefix or suffix."""
    group, _, leaf = x.rpartition("/")
    prefix = group + "/" if group else ""
    for name in wanted:
        if prefix + name in shapes:
            return prefix + name
    for habit in inputs:
        if habit in leaf and habit != leaf:
            for name in wanted:
                if (other := prefix + leaf.replace(habit, name)) in shapes and other != x:
                    return other
    return None


def _complete(name: str, shapes: Shapes, layout: Layout) -> Layout:
    """Check shapes: rows agree, x has columns."""
    shape, dtype = shapes[layout.x]
    if len(shape) < 2 or dtype.kind not in "fiub":
        raise DataError(f"{name}: array {layout.x!r} is {tuple(shape)} {dtype}; inputs are numbers with two or more "
                        "dimensions, rows first.")
    if not all(shape[1:]):
        raise DataError(f"{name}: array {layout.x!r} has shape {tuple(shape)}: no columns.")
    for other, limit in ((layout.y, 2), (layout.weight, 1)):
        if other is None:
            continue
        other_shape = shapes[other][0]
        if len(other_shape) == 0 or len(other_shape) > 2 or (limit == 1 and other_shape[1:] not in ((), (1,))):
            raise DataError(f"{name}: array {other!r} has shape {tuple(other_shape)}; it must be (n,)"
                            f"{' or (n, k)' if limit == 2 else ''}.")
        if other_shape[0] != shape[0]:
            raise DataError(f"{name}: {layout.x!r} has {shape[0]} rows and {other!r} has {other_shape[0]}; they must "
                            "have the same.")
    return layout
