"""Turn a named data set or files into a data set directory of HDF5 shards."""

import glob
import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpcmlp.comm.agreement import agreed
from hpcmlp.comm.messages import all_gather_bytes, broadcast_bytes, gather_bytes, sum_in_place
from hpcmlp.config import PrepareConfig, nearest
from hpcmlp.data.cleaning import Counts, Policy, check_levels, check_weights, judge, take
from hpcmlp.data.files import check_new_directory, discard_directory, new_directory, publish_directory
from hpcmlp.data.manifest import Manifest, ShardEntry, write_manifest
from hpcmlp.data.preprocess import POLICIES_THAT_FILL, Preprocessor, raw_targets, spread
from hpcmlp.data.readers import SourcePart, open_parts, probe_strangers
from hpcmlp.data.selection import Selection, select
from hpcmlp.data.shards import shard_name, write_shard
from hpcmlp.data.sources import NAMED, locate, open_named
from hpcmlp.data.splits import SPLITS, assign, shards_of
from hpcmlp.data.statistics import (
    Moments,
    block_moments,
    histogram,
    histogram_moments,
    merge_moments,
    quantiles,
    rows_of_rank,
    scaling,
)
from hpcmlp.data.summary import summary, volume
from hpcmlp.data.tables import Rows, as_text
from hpcmlp.data.targets import (
    TargetFacts,
    Targets,
    as_matrix,
    check_task,
    choose_task,
    class_names,
    describe_targets,
)
from hpcmlp.errors import ConfigError, DataError, InputMissing, printable, printable_lines


@dataclass
class Raw:
    """This rank's raw rows that stay, and what was counted on the way, over all ranks."""

    rows: Rows
    numbers: np.ndarray                                # (n,) their row numbers in the source
    y: np.ndarray
    weight: np.ndarray | None
    counts: Counts


@dataclass
class Places:
    """Where this rank's rows go: split number (n,), position in that split (n,); rows of each split over all ranks."""

    split: np.ndarray
    position: np.ndarray
    rows: dict[str, int]

    @property
    def train(self) -> np.ndarray:
        """Which of this rank's rows are training rows: (n,) bool."""
        return self.split == 0


def main(config: PrepareConfig, comm: Any) -> int:
    """Prepare a data set on all ranks; the same bytes at any rank count.

    Collective over `comm`. Each rank reads, cleans and encodes a range of the raw rows, then writes some of the shards,
    for which the ranks send each other their rows. Memory of a rank: its share of the raw rows (8 bytes a number) and
    of the encoded ones, two shards, and some 60 bytes for every row of the whole set.
    """
    begin = time.monotonic()
    with agreed(comm):
        if comm.rank == 0:
            check_new_directory(config.out)
    source = open_source(config, comm)
    raw = read_raw(config, source, comm)
    targets = choose_targets(config, source, raw, comm)
    places = assign_rows(config, source, raw, targets, comm)
    preprocessor = fit(config, source, raw, places, targets, comm)
    with agreed(comm):
        x = preprocessor.transform(raw.rows, source.table, raw.numbers)
        y = preprocessor.target.encode(raw.y, source.table, raw.numbers)
    manifest = write(config, preprocessor, x, y, raw.weight, places, comm)
    if comm.rank == 0:
        policy = Policy(config.missing, config.invalid)
        told = summary(manifest, preprocessor, policy, raw.counts, source.table.notes, config.normalize)
        print(printable_lines(told), flush=True)
        print(f"wrote {printable(config.out)}: {volume(manifest)}, in {time.monotonic() - begin:.1f} s", flush=True)
        if len(manifest.splits["train"]) < config.shards:
            print(f"warning: {len(manifest.splits['train'])} training shards instead of {config.shards}: there are no "
                  "more rows", flush=True)
    return 0


def open_source(config: PrepareConfig, comm: Any) -> Selection:
    """Find (or fetch, on rank 0) and open the source, and choose its columns. Collective over `comm`."""
    named = NAMED.get(config.source)
    files = []
    with agreed(comm):
        check_options(config)
        if named and comm.rank == 0:
            files = locate(named.name, config.cache, config.from_dir)
        elif not named and comm.rank == 0:
            if not Path(config.source).exists() and not glob.has_magic(config.source):
                raise InputMissing(f"{config.source}: no such file or directory, and no named data set "
                                   f"({', '.join(NAMED)}){nearest(config.source, list(NAMED)) or '.'}")
            probe_strangers(config.source)
    files = json.loads(broadcast_bytes(comm, json.dumps(files).encode() if comm.rank == 0 else None))
    with agreed(comm):
        if named:
            parts: list[SourcePart] = open_named(named.name, files, config.rows, config.seed)
        else:
            parts = open_parts(config.source, config.x, config.target or config.y, config.weight)
        target = config.target or config.y
        if named and not parts[0].table.matrix:
            columns = parts[0].table.columns
            target = named.target if named.target in columns else columns[-1]
        return select(parts, target, config.columns, config.weight, config.categorical, config.rows)


def check_options(config: PrepareConfig) -> None:
    """Raise ConfigError for options that cannot take effect. Local."""
    if config.source in NAMED:
        for option in ("target", "x", "y", "columns", "weight", "categorical"):
            if getattr(config, option) is not None:
                raise ConfigError(f"--{option} is for files; the named data set {config.source} has its own.")
        if config.task not in ("auto", NAMED[config.source].task):
            raise ConfigError(f"--task {config.task} does not fit {config.source}, a {NAMED[config.source].task}.")
    else:
        for option in ("from_dir", "cache"):
            if getattr(config, option) is not None:
                raise ConfigError(f"--{option.replace('_', '-')} is for named data sets ({', '.join(NAMED)}); "
                                  f"{config.source} is none.")
    if config.target is not None and config.y is not None:
        raise ConfigError("--target and --y name the same thing; give one of them.")


def read_raw(config: PrepareConfig, source: Selection, comm: Any) -> Raw:
    """Read this rank's rows and apply the policies for missing and invalid values. Collective over `comm`."""
    table = source.table
    start, stop = rows_of_rank(table.num_rows, comm.rank, comm.size)
    with agreed(comm):
        rows = table.read(start, stop)
    if not table.matrix:
        rows = agree_on_texts(config, source, rows, start, stop, comm)
    with agreed(comm):
        policy = Policy(config.missing, config.invalid)
        verdict = judge(rows, source.inputs, source.targets, table, start, policy)
        weight = None
        if source.weight is not None:
            if source.weight not in rows:
                raise DataError(f"{table.name}: has no array of weights {config.weight!r}.")
            weight = check_weights(rows[source.weight], table, start)
        elif table.matrix and "weight" in rows:
            weight = check_weights(rows["weight"], table, start)
        keep = verdict.keep
        rows = take(rows, keep)
        y = raw_targets(rows, source.targets, table)
    found = all_of(comm, [verdict.missing, verdict.invalid, verdict.missing_targets, int((~keep).sum())])
    missing, invalid = ({name: sum(part[k].get(name, 0) for part in found) for name in source.inputs
                         if any(name in part[k] for part in found)} for k in (0, 1))
    return Raw(rows, start + np.flatnonzero(keep), y, weight[keep] if weight is not None else None,
               Counts(sum(part[3] for part in found), missing, invalid, sum(part[2] for part in found)))


def agree_on_texts(config: PrepareConfig, source: Selection, rows: Rows, start: int, stop: int, comm: Any) -> Rows:
    """Read a column as texts on every rank when it is text on any. Collective over `comm`."""
    used = (*source.inputs, *source.targets)
    texts = set().union(*all_of(comm, [name for name in used if rows[name].dtype == object]))
    texts |= set(config.categorical or ())
    with agreed(comm):
        if texts:
            source.table.set_text(sorted(texts))
            # a column that looked like numbers here, or in one file of several, was not kept as it stands there
            if len(source.table.tables) > 1 or any(rows[name].dtype != object for name in texts):
                rows = source.table.read(start, stop)
        return {name: as_text(values) if name in texts else values for name, values in rows.items()}


def choose_targets(config: PrepareConfig, source: Selection, raw: Raw, comm: Any) -> Targets:
    """Find out what the targets are, and the classes of a classification. Collective over `comm`."""
    with agreed(comm):
        facts = describe_targets(raw.y)
    facts = TargetFacts.merged(all_of(comm, facts.to_list()))
    named = NAMED.get(config.source)
    with agreed(comm):
        if not facts.rows:
            raise DataError(f"{source.table.name}: no row is left after dropping {raw.counts.dropped}; there is "
                            "nothing to learn from.")
        task = named.task if named else config.task if config.task != "auto" else choose_task(facts)
        check_task(task, facts, source.table)
        if task != "classification":
            return Targets(task, source.targets)
        classes = class_names(facts, raw.y, source.table, raw.numbers, named.classes if named else None)
        return Targets(task, source.targets, classes)


def assign_rows(config: PrepareConfig, source: Selection, raw: Raw, targets: Targets, comm: Any) -> Places:
    """Split and shuffle all rows by the seed. Collective over `comm`; every rank computes the whole assignment."""
    with agreed(comm):
        codes = targets.encode(raw.y, source.table, raw.numbers) if targets.task == "classification" else None
    given = [np.frombuffer(part, np.int8) for part in all_gather_bytes(comm, source.given(raw.numbers).tobytes())]
    strata = None
    if codes is not None and config.stratify:
        strata = np.frombuffer(b"".join(all_gather_bytes(comm, codes.tobytes())), np.int32)
    rows = assign(np.concatenate(given), strata, config.val_fraction, config.test_fraction, config.seed)
    if not rows["train"].size:
        raise alike(ConfigError(f"{source.table.name}: no training rows are left of {sum(map(len, given))} rows; use a "
                                "smaller --test-fraction or --val-fraction."))
    split = np.empty(sum(map(len, given)), np.int8)
    position = np.empty(split.size, np.int64)
    for k, name in enumerate(SPLITS):
        split[rows[name]] = k
        position[rows[name]] = np.arange(rows[name].size)
    first = sum(len(part) for part in given[:comm.rank])
    mine = slice(first, first + len(given[comm.rank]))
    return Places(split[mine].copy(), position[mine].copy(), {name: int(rows[name].size) for name in SPLITS})


def fit(config: PrepareConfig, source: Selection, raw: Raw, places: Places, targets: Targets,
        comm: Any) -> Preprocessor:
    """Fit fills, levels and scaling on the training rows. Collective over `comm`; the same bits at any rank count."""
    if targets.task == "regression" and config.normalize_targets == "standard":
        y = as_matrix(raw.y)
        with agreed(comm):
            targets.encode(raw.y, source.table, raw.numbers)        # refuses what is no number
        moments = merged_moments(y, raw.numbers, places.train, comm)
        shift, scale = scaling("standard", moments)
        targets = replace(targets, shift=tuple(shift.tolist()), scale=tuple((1.0 / scale).tolist()))
    common = dict(form="matrix" if source.table.matrix else "columns", inputs=source.inputs, target=targets,
                  invalid_is_missing=config.invalid == "missing")
    x = raw.rows.get("x") if source.table.matrix else None
    if any_of(comm, x is not None and x.dtype == np.uint8):
        shift, scale = fit_pixels(config, x, places.train, comm)
        width = len(source.inputs)
        return Preprocessor(**common, levels={}, fills={}, shift=(shift,) * width, scale=(scale,) * width,
                            x_dtype="uint8")
    levels, fills = ({}, {}) if x is not None else fit_levels(config, source, raw, places.train, comm)
    numeric = [k for k, name in enumerate(source.inputs) if name not in levels]
    values = x if x is not None else [raw.rows[source.inputs[k]] for k in numeric]
    moments = merged_moments(values, raw.numbers, places.train, comm)
    fill = config.missing in POLICIES_THAT_FILL and (source.table.nan_is_missing or config.invalid == "missing")
    quartiles = None
    if config.normalize == "robust" or (fill and config.missing == "median"):
        quartiles = exact_quartiles(values, len(numeric), places.train, comm)
    if fill:
        middle = moments.mean if config.missing == "mean" else quartiles[1]
        fills |= {source.inputs[k]: float(v) for k, v in zip(numeric, middle, strict=True)}
    shift, scale = spread(source.inputs, levels, *scaling(config.normalize, moments, quartiles))
    return Preprocessor(**common, levels=levels, fills=fills, shift=shift, scale=scale, x_dtype="float32")


def fit_pixels(config: PrepareConfig, x: np.ndarray, train: np.ndarray, comm: Any) -> tuple[float, float]:
    """One shift and scale for all pixels of the training rows. Collective over `comm`."""
    counts = histogram(x, train)
    sum_in_place(comm, counts)
    moments, quartiles = histogram_moments(counts)
    shift, scale = scaling(config.normalize, moments, np.array(quartiles).reshape(3, 1))
    return float(shift[0]), float(scale[0])


def fit_levels(config: PrepareConfig, source: Selection, raw: Raw, train: np.ndarray,
               comm: Any) -> tuple[dict[str, tuple[str, ...]], dict[str, float | str]]:
    """The levels of each text column in the training rows, and its most frequent one. Collective over `comm`."""
    levels, fills = {}, {}
    for name in source.inputs:
        if raw.rows[name].dtype != object:
            continue
        counts: Counter = Counter()
        for part in all_of(comm, Counter(v for v in raw.rows[name][train].tolist() if v is not None)):
            counts.update(part)
        with agreed(comm):
            check_levels(raw.rows[name], name, counts, config.max_levels, source.table, raw.numbers)
        levels[name] = tuple(sorted(counts))
        if config.missing in POLICIES_THAT_FILL and counts:
            fills[name] = min(counts, key=lambda level: (-counts[level], level))
    if len(levels) == len(source.inputs) and not any(levels.values()):
        raise alike(DataError(f"{source.table.name}: all inputs are missing in every training row."))
    return levels, fills


def merged_moments(values: np.ndarray | list[np.ndarray], numbers: np.ndarray, train: np.ndarray,
                   comm: Any) -> Moments:
    """Moments of the training rows of all ranks. Collective over `comm`."""
    width = len(values) if isinstance(values, list) else values.shape[1]
    if not width:
        return Moments(*[np.zeros(0)] * 5)
    blocks = all_gather_bytes(comm, block_moments(values, numbers, train).tobytes())
    return merge_moments(np.frombuffer(b"".join(blocks)).reshape(-1, 5, width))


def exact_quartiles(values: np.ndarray | list[np.ndarray], width: int, train: np.ndarray, comm: Any) -> np.ndarray:
    """(3, d) quartiles of the finite training values, each column collected by one rank. Collective over `comm`."""
    out = np.zeros((3, width))
    for column in range(width):
        used = (values[column] if isinstance(values, list) else values[:, column])[train].astype(np.float64)
        parts = gather_bytes(comm, used[np.isfinite(used)].tobytes(), column % comm.size)
        if parts is not None:
            out[:, column] = quantiles(np.frombuffer(b"".join(parts)))
    sum_in_place(comm, out)
    return out


def write(config: PrepareConfig, preprocessor: Preprocessor, x: np.ndarray, y: np.ndarray, weight: np.ndarray | None,
          places: Places, comm: Any) -> Manifest:
    """Write shards and manifest beside the final place, then rename the whole. Collective over `comm`."""
    temporary = None
    with agreed(comm):
        if comm.rank == 0:
            temporary = str(new_directory(config.out))
    temporary = broadcast_bytes(comm, temporary.encode() if comm.rank == 0 else None).decode()
    try:
        weighted = any_of(comm, weight is not None)
        entries = write_shards(config, Path(temporary), x, y, weight if weighted else None, places, comm)
        manifest = make_manifest(config, preprocessor, entries, y, places, weighted, comm)
        with agreed(comm):
            if comm.rank == 0:
                write_manifest(temporary, manifest)
                publish_directory(temporary, config.out)
    except BaseException:
        if comm.rank == 0:
            discard_directory(temporary)
        raise
    return manifest


def write_shards(config: PrepareConfig, directory: Path, x: np.ndarray, y: np.ndarray, weight: np.ndarray | None,
                 places: Places, comm: Any) -> dict[str, tuple[ShardEntry, ...]]:
    """Send each shard's rows to the rank that writes it; ranks write different shards at the same time.

    Collective over `comm`.
    """
    arrays = [a for a in (x, y, weight) if a is not None]
    order = np.lexsort((places.position, places.split))
    starts = np.searchsorted(places.split[order], range(len(SPLITS) + 1)).tolist()
    bounds = shards_of(places.rows, config.shards)
    jobs = [(split, k, len(b) - 1, b[k], b[k + 1]) for split, b in bounds.items() for k in range(len(b) - 1)]
    written = []
    for group in range(0, len(jobs), comm.size):
        mine = None
        for root, (split, number, count, low, high) in enumerate(jobs[group:group + comm.size]):
            place = SPLITS.index(split)
            of_split = order[starts[place]:starts[place + 1]]
            rows = of_split[slice(*np.searchsorted(places.position[of_split], [low, high]))]
            parts = [gather_bytes(comm, places.position[rows].tobytes(), root)]
            parts += [gather_bytes(comm, np.ascontiguousarray(a[rows]).tobytes(), root) for a in arrays]
            if comm.rank == root:
                mine = (split, number, count, assemble(parts, arrays, low, high))
        with agreed(comm):
            if mine is not None:
                split, number, count, shard = mine
                attrs = {"split": split, "shard": number, "shards": count, "data_set": name_of(config.source)}
                entry = write_shard(directory / shard_name(split, number, count), shard[0], shard[1],
                                    shard[2] if len(shard) == 3 else None, attrs,
                                    None if config.compression == "none" else config.compression)
                written.append((split, number, vars(entry)))
    found = sorted((tuple(e) for part in all_of(comm, written) for e in part), key=lambda e: (e[0], e[1]))
    return {split: tuple(ShardEntry(**e[2]) for e in found if e[0] == split) for split in bounds}


def assemble(parts: list[list[bytes]], arrays: list[np.ndarray], low: int, high: int) -> list[np.ndarray]:
    """The rows low..high of a split, in order, from what each rank sent: positions, then one piece per array. Local."""
    at = np.frombuffer(b"".join(parts[0]), np.int64) - low
    out = []
    for pieces, like in zip(parts[1:], arrays, strict=True):
        values = np.frombuffer(b"".join(pieces), like.dtype).reshape(high - low, *like.shape[1:])
        ordered = np.empty_like(values)
        ordered[at] = values
        out.append(ordered)
    return out


def make_manifest(config: PrepareConfig, preprocessor: Preprocessor, entries: dict[str, tuple[ShardEntry, ...]],
                  y: np.ndarray, places: Places, weighted: bool, comm: Any) -> Manifest:
    """Collective over `comm`: classes are counted."""
    target, counts = preprocessor.target, None
    if target.classes is not None:
        table = np.zeros((len(SPLITS), len(target.classes)), np.int64)
        np.add.at(table, (places.split, y), 1)
        sum_in_place(comm, table)
        counts = {split: table[SPLITS.index(split)].tolist() for split in entries}
    pixels = preprocessor.x_dtype == "uint8"
    return Manifest(
        name=name_of(config.source), task=target.task, num_features=len(preprocessor.shift),
        x_dtype=preprocessor.x_dtype, feature_names=preprocessor.feature_names, splits=entries,
        classes=list(target.classes) if target.classes else None, target_names=list(target.names),
        preprocessing=json.loads(json.dumps(preprocessor.to_dict())),
        load_shift=list(preprocessor.shift) if pixels else None,
        load_scale=list(preprocessor.scale) if pixels else None,
        target_shift=list(target.shift) if target.shift else None,
        target_scale=list(target.scale) if target.scale else None, class_counts=counts, weighted=weighted)


def name_of(source: str) -> str:
    """Return the data set's name: the named set, or the file without its suffix. Local."""
    return source if source in NAMED else Path(source).name.split(".")[0].strip("*?[]") or "data"


def all_of(comm: Any, value: Any) -> list[Any]:
    """Return the JSON-able values of all ranks, in rank order. Collective over `comm`."""
    return [json.loads(part) for part in all_gather_bytes(comm, json.dumps(value).encode())]


def any_of(comm: Any, value: bool) -> bool:
    """Return whether `value` holds on any rank. Collective over `comm`."""
    flag = np.array([int(value)], np.int64)
    sum_in_place(comm, flag)
    return bool(flag[0])


def alike(error: Exception) -> Exception:
    """Mark an error that every rank raises from the same facts. Local."""
    error.agreed = True
    return error
