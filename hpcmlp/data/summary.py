"""What a prepared data set holds and what was done to its rows, as text for people."""

from hpcmlp.data.cleaning import Counts, Policy
from hpcmlp.data.manifest import Manifest
from hpcmlp.data.preprocess import Preprocessor
from hpcmlp.data.targets import name_some

_CLASSES_SHOWN = 20
_COLUMNS_SHOWN = 8
_RULES = {"median": "filled with the median, or the most frequent level", "drop": "rows dropped",
          "mean": "filled with the mean, or the most frequent level", "missing": "taken as missing"}


def summary(manifest: Manifest, preprocessor: Preprocessor, policy: Policy, counts: Counts, notes: tuple[str, ...],
            normalize: str) -> str:
    """Return rows, inputs, splits and classes, and what happened to missing and invalid values. Local."""
    rows = sum(manifest.rows(split) for split in manifest.splits)
    what = {"classification": f"{manifest.num_outputs} classes", "multilabel": f"{manifest.num_outputs} labels",
            "regression": name_some(tuple(manifest.target_names))}[manifest.task]
    lines = [f"{manifest.name}: {rows:,} rows, {manifest.num_features} inputs, {manifest.task} of {what}"]
    lines += [f"note: {note}" for note in notes]
    if preprocessor.levels:
        lines.append("one-hot: " + _some([f"{name} ({len(v)} levels)" for name, v in preprocessor.levels.items()]))
    for text, found, rule in (("missing", counts.missing, policy.missing), ("invalid", counts.invalid, policy.invalid)):
        if found:
            lines.append(f"{text} values: {sum(found.values()):,}, {_RULES[rule]}: "
                         + _some([f"{name} {n:,}" for name, n in found.items()]))
    if counts.missing_targets:
        lines.append(f"missing targets: {counts.missing_targets:,}, rows dropped")
    if counts.dropped:
        lines.append(f"rows dropped: {counts.dropped:,}")
    stored = "stored as 8-bit pixels, all with one scale" if manifest.x_dtype == "uint8" else "stored as float32"
    lines.append(f"normalisation: {normalize}, fitted on the training rows; {stored}")
    for split, shards in manifest.splits.items():
        line = f"  {split:<5}  {manifest.rows(split):>11,} rows in {len(shards)} shard{'s' * (len(shards) > 1)}"
        if manifest.class_counts and manifest.num_outputs <= _CLASSES_SHOWN:
            line += f"; per class {' '.join(map(str, manifest.class_counts[split]))}"
        lines.append(line)
    if manifest.classes:
        lines.append(f"classes: {name_some(tuple(manifest.classes))}")
        lost = [c for c, n in zip(manifest.classes, manifest.class_counts["train"], strict=True) if not n]
        if lost:
            lines.append(f"warning: no training row is of class {name_some(tuple(lost))}")
    return "\n".join(lines)


def volume(manifest: Manifest) -> str:
    """Return how many shards there are and how large they are together. Local."""
    entries = [entry for shards in manifest.splits.values() for entry in shards]
    return f"{len(entries)} shards, {sum(entry.bytes for entry in entries) / 1e6:,.1f} MB"


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _COLUMNS_SHOWN} more" if len(items) > _COLUMNS_SHOWN else ""
    return ", ".join(items[:_COLUMNS_SHOWN]) + more
