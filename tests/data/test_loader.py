"""The loader: every sample once at any rank count, memory and stream alike, bounded memory, errors that name things."""

import gc
import threading
import tracemalloc

import h5py
import numpy as np
import pytest

from hpcmlp.data import samples as samples_module
from hpcmlp.data.loader import Loader, default_window_rows
from hpcmlp.data.manifest import Manifest, ShardEntry, write_manifest
from hpcmlp.data.samples import row_bytes
from hpcmlp.data.shards import shard_name, write_shard
from hpcmlp.errors import ConfigError, DataError, InputMissing, Unavailable

WIDTH = 5


def make(directory, shard_rows, task="classification", x_dtype="float32", weighted=False, width=WIDTH,
         compression=None):
    """Write a data set whose sample g (counted through the shards) has g in x, y and weight; return its manifest."""
    entries, first = [], 0
    for number, rows in enumerate(shard_rows):
        g = np.arange(first, first + rows)
        x = np.repeat(g[:, None], width, axis=1).astype(x_dtype)
        y = (g % 3).astype(np.int32) if task == "classification" else np.stack((g, -g), axis=1).astype(np.float32)
        weight = (g + 0.5).astype(np.float32) if weighted else None
        path = directory / shard_name("train", number, len(shard_rows))
        entries.append(write_shard(path, x, y, weight, {"split": "train"}, compression))
        first += rows
    classes = ["a", "b", "c"] if task == "classification" else None
    manifest = Manifest("numbers", task, width, x_dtype, [f"x{i}" for i in range(width)], {"train": tuple(entries)},
                        classes, [] if classes else ["up", "down"], weighted=weighted)
    write_manifest(directory, manifest)
    return manifest


def numbers(batch):
    """The sample numbers of a batch, after comparing targets, weights, shapes and types with them."""
    g = batch.source[batch.index][:, 0].astype(np.int64)
    assert len(g) == batch.rows and batch.index.dtype == np.int64
    if batch.targets.ndim == 1:
        assert batch.targets.dtype == np.int32 and np.array_equal(batch.targets, g % 3)
    else:
        assert batch.targets.dtype == np.float32 and np.array_equal(batch.targets, np.stack((g, -g), axis=1))
    if batch.weights is not None:
        assert batch.weights.dtype == np.float32 and np.array_equal(batch.weights, (g + 0.5).astype(np.float32))
    return g.tolist()


def epoch_of(loaders, epoch=0, steps=None):
    """The global batches of an epoch as lists of sample numbers, put together from all ranks' loaders."""
    out = []
    for t in steps if steps is not None else range(loaders[0].steps_per_epoch):
        shares = [loader.batch(epoch, t) for loader in loaders]
        assert [b.first for b in shares] == np.cumsum([0] + [b.rows for b in shares])[:-1].tolist()
        assert all(b.global_rows == sum(b.rows for b in shares) for b in shares)
        assert all(b.rows <= loader.local_rows_max for b, loader in zip(shares, loaders, strict=True))
        out.append([g for b in shares for g in numbers(b)])
    return out


def open_all(directory, manifest, size, batch, **options):
    return [Loader(directory, manifest, "train", r, size, batch, **options) for r in range(size)]


def close_all(loaders):
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("shard_rows, part", [
    ([1], None), ([3], None), ([2, 0, 1], None), ([4, 3], None), ([13, 0, 8, 8, 9], None), ([50, 51, 49], None),
    ([40, 0, 41, 7], 0.99), ([40, 41, 7], 0.6), ([100], 0.5), ([12] * 5, 0.99)])
def test_every_sample_once_per_epoch_and_the_same_batches_at_any_rank_count(tmp_path, shard_rows, part):
    manifest = make(tmp_path, shard_rows)
    total = sum(shard_rows)
    options = {} if part is None else {"memory_limit": total * row_bytes(manifest) * part, "window_rows": 4}
    for batch in (1, 4, 7, 1000) if part is None else (1, 4, 7):
        lists = []
        for size in (1, 2, 3, 5):
            loaders = open_all(tmp_path, manifest, size, batch, seed=9, **options)
            assert part is None or size > 1 or loaders[0].mode == "streamed"
            epochs = [epoch_of(loaders, epoch) for epoch in (0, 1)]
            close_all(loaders)
            for steps in epochs:
                assert [len(b) for b in steps] == [min(batch, total - t * batch) for t in range(-(-total // batch))]
                assert sorted(sum(steps, [])) == list(range(total))
            assert total < 8 or epochs[0] != epochs[1]
            lists.append(epochs)
        assert all(one == lists[0] for one in lists)


@pytest.mark.parametrize("task, weighted, x_dtype, compression", [
    ("classification", False, "uint8", None), ("classification", True, "float32", "gzip"),
    ("regression", True, "float64", None), ("multilabel", False, "float16", None)])
def test_streamed_equals_resident_in_the_same_order(tmp_path, task, weighted, x_dtype, compression):
    manifest = make(tmp_path, [60, 61, 59, 60], task, x_dtype, weighted, compression=compression)
    total = 240 * row_bytes(manifest)
    # One shard fits the limit of rank 0 of 4 or more, never all four: the order is windowed for both.
    streamed = open_all(tmp_path, manifest, 2, 13, memory_limit=total / 2.1, window_rows=8)
    resident = open_all(tmp_path, manifest, 8, 13, memory_limit=total / 1.5, window_rows=8)
    assert {loader.mode for loader in streamed} == {"streamed"}
    assert {loader.mode for loader in resident} == {"resident"}
    assert streamed[0].x_dtype == np.dtype(x_dtype) == streamed[0].batch(0, 0).source.dtype
    for epoch in range(3):
        assert epoch_of(streamed, epoch) == epoch_of(resident, epoch)
    close_all(streamed)


@pytest.mark.parametrize("limit", [None, 1.5])
def test_an_epoch_goes_on_from_its_number_and_step_alone(tmp_path, limit):
    manifest = make(tmp_path, [100, 90, 80])
    options = {} if limit is None else {"memory_limit": 270 * row_bytes(manifest) / limit, "window_rows": 16}
    whole = open_all(tmp_path, manifest, 2, 16, **options)
    assert whole[0].mode == ("resident" if limit is None else "streamed")
    expected = {e: epoch_of(whole, e) for e in (0, 1, 2)}
    for epoch, t in ((2, 5), (0, 16), (1, 0)):
        fresh = open_all(tmp_path, manifest, 3, 16, **options)
        for loader in fresh:
            loader.prefetch(epoch, t)
        assert epoch_of(fresh, epoch, range(t, 17)) == expected[epoch][t:]
        assert epoch_of(fresh, epoch + 1, [0]) == epoch_of(whole, epoch + 1, [0])
        close_all(fresh)
    assert epoch_of(whole, 0, [7, 3, 3, 16]) == [expected[0][t] for t in (7, 3, 3, 16)]     # jumps
    close_all(whole)


def test_unshuffled_order_keeps_the_rows_of_each_shard(tmp_path):
    manifest = make(tmp_path, [4, 4])
    loader, = open_all(tmp_path, manifest, 1, 4, shuffle=False)
    assert epoch_of([loader]) == [[0, 1, 4, 5], [2, 3, 6, 7]] == epoch_of([loader], 1)


def test_ranks_keep_only_the_shards_that_they_touch(tmp_path):
    manifest = make(tmp_path, [64] * 8)
    loaders = open_all(tmp_path, manifest, 4, 32)
    assert [loader.memory_bytes // (64 * row_bytes(manifest)) for loader in loaders] == [2, 2, 2, 2]


def test_streaming_stays_within_the_memory_limit(tmp_path):
    width, shard_rows = 512, [700, 700, 700, 701]
    manifest = make(tmp_path, shard_rows, width=width)
    total = sum(shard_rows) * row_bytes(manifest)       # 5.7 MB
    limit = total / 4
    gc.collect()
    tracemalloc.start()
    loader = Loader(tmp_path, manifest, "train", 0, 1, 32, memory_limit=limit)
    for t in range(loader.steps_per_epoch):
        numbers(loader.batch(0, t))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loader.mode == "streamed" and loader.memory_bytes <= limit
    assert peak < limit + 2**19         # what the test itself gathers and checks, and masks of isfinite
    loader.close()


def test_windows_shrink_only_where_the_limit_demands_it():
    assert default_window_rows([16000] * 4, 100, 10**7) == 1000 == default_window_rows([16000] * 4, 100, 6 * 10**6)
    assert default_window_rows([16000] * 4, 100, 10**6) == 500          # two windows of 4 shards in half of 1 MB
    assert default_window_rows([10**9], 4096, 10**9) == 1024            # 4 MiB
    assert default_window_rows([3], 10**6, 1) == 4


def test_a_limit_too_small_to_stream_is_refused(tmp_path):
    manifest = make(tmp_path, [100, 100])
    with pytest.raises(ConfigError, match="too small to stream split 'train' with 1 ranks"):
        Loader(tmp_path, manifest, "train", 0, 1, 150, memory_limit=200 * row_bytes(manifest) / 2)


def test_more_memory_than_there_is_is_refused_before_it_is_taken(tmp_path, monkeypatch):
    manifest = make(tmp_path, [100])
    monkeypatch.setattr(samples_module, "available_bytes", lambda: 1000)
    for batch in (10, None):
        with pytest.raises(Unavailable, match="use more ranks, or --memory-limit"):
            Loader(tmp_path, manifest, "train", 0, 1, batch)


@pytest.mark.parametrize("shard_rows", [[], [0], [1], [7], [5, 0, 9, 1, 2]])
def test_sequential_passes_over_every_row_in_order(tmp_path, shard_rows):
    manifest = make(tmp_path, shard_rows, weighted=True)
    total = sum(shard_rows)
    for limit in (None, 1):
        for size in (1, 2, 5):
            for max_rows in (1, 3, 100):
                seen = []
                for rank in range(size):
                    loader = Loader(tmp_path, manifest, "train", rank, size, memory_limit=limit)
                    for batch in loader.sequential(max_rows):
                        assert batch.first == len(seen) and batch.global_rows == total and 0 < batch.rows <= max_rows
                        seen += numbers(batch)
                assert seen == list(range(total))


def test_a_training_loader_can_also_pass_in_order(tmp_path):
    manifest = make(tmp_path, [5, 6, 7])
    seen = []
    for rank in range(3):
        loader = Loader(tmp_path, manifest, "train", rank, 3, 4)
        seen += [g for batch in loader.sequential(2) for g in numbers(batch)]
    assert seen == list(range(18))


def test_all_missing_shards_are_named(tmp_path):
    manifest = make(tmp_path, [5, 5, 5, 5])
    for number in (1, 3):
        (tmp_path / shard_name("train", number, 4)).unlink()
    for rank in range(2):
        with pytest.raises(InputMissing, match="train-00001-of-00004.h5, train-00003-of-00004.h5"):
            Loader(tmp_path, manifest, "train", rank, 2, 4)
    with pytest.raises(InputMissing, match="has no split 'val'; it has train"):
        Loader(tmp_path, manifest, "val", 0, 1, 4)
    with pytest.raises(InputMissing, match="cannot read this data set directory"):
        Loader(tmp_path / "nowhere", manifest, "train", 0, 1, 4)


def test_an_empty_split_cannot_be_trained_on(tmp_path):
    for shard_rows in ([], [0, 0]):
        manifest = make(tmp_path, shard_rows)
        with pytest.raises(DataError, match="split 'train' has no rows"):
            Loader(tmp_path, manifest, "train", 0, 1, 4)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_damage_is_found_where_it_is_read(tmp_path, limit):
    manifest = make(tmp_path, [40, 40])
    options = {} if limit is None else {"memory_limit": 80 * row_bytes(manifest) * limit, "window_rows": 4}
    path = tmp_path / manifest.splits["train"][1].file
    data = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        offset = file["x"].id.get_offset() + 4 * (WIDTH * 17 + 2)
    flipped = data.copy()
    flipped[offset] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(DataError, match="train-00001-of-00002.h5.*sha256"):
        Loader(tmp_path, manifest, "train", 0, 1, 8, **options)
    Loader(tmp_path, manifest, "train", 0, 1, 8, verify=False, **options).close()
    path.write_bytes(data[:-96])
    with pytest.raises(DataError, match="truncated"):
        Loader(tmp_path, manifest, "train", 0, 1, 8, verify=False, **options)


def replace_shard(directory, manifest, number, x, y, weight=None):
    """Put another shard in the place of one, with a manifest that knows its bytes."""
    shards = list(manifest.splits["train"])
    shards[number] = write_shard(directory / shards[number].file, x, y, weight)
    assert isinstance(shards[number], ShardEntry)
    return Manifest(**{**{f: getattr(manifest, f) for f in manifest.__dataclass_fields__},
                       "splits": {"train": tuple(shards)}})


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("what, text", [
    ("nan", "x: row 31, column 2 is nan"), ("inf", "x: row 31, column 2 is inf"), ("label", "y: row 7 is class 3"),
    ("negative", "y: row 7 is class -1"), ("weight", "weight: row 9 is -1.0")])
def test_samples_that_cannot_be_trained_on_are_named(tmp_path, what, text, limit):
    manifest = make(tmp_path, [40, 40], weighted=True)
    x, y = np.ones((40, WIDTH), np.float32), np.zeros(40, np.int32)
    weight = np.ones(40, np.float32)
    x[31, 2] = {"nan": np.nan, "inf": np.inf}.get(what, 0.0)
    y[7] = {"label": 3, "negative": -1}.get(what, 0)
    weight[9] = -1 if what == "weight" else 1
    manifest = replace_shard(tmp_path, manifest, 1, x, y, weight)
    options = {} if limit is None else {"memory_limit": 80 * row_bytes(manifest) * limit, "window_rows": 4}
    with pytest.raises(DataError, match=f"train-00001-of-00002.h5: data set {text}"):
        loader = Loader(tmp_path, manifest, "train", 0, 1, 8, **options)
        assert loader.mode == "streamed"
        for t in range(loader.steps_per_epoch):
            loader.batch(0, t)


def test_shards_that_disagree_with_the_data_set_are_refused(tmp_path):
    good = make(tmp_path, [10, 10])
    x, y = np.ones((10, WIDTH), np.float32), np.zeros(10, np.int32)
    for other in ((x[:, :3], y), (x.astype(np.float64), y), (x, y.astype(np.int64)), (x[:9], y), (x, y, x[:, 0])):
        manifest = replace_shard(tmp_path, good, 1, *other)
        with pytest.raises(DataError, match="train-00001-of-00002.h5"):
            Loader(tmp_path, manifest, "train", 0, 1, 4)


def test_an_error_in_the_prefetch_thread_reaches_the_batch_it_prevented(tmp_path):
    manifest = make(tmp_path, [64, 64])
    loader = Loader(tmp_path, manifest, "train", 0, 1, 4, memory_limit=128 * row_bytes(manifest) / 2, window_rows=8)
    path = tmp_path / manifest.splits["train"][0].file
    data = path.read_bytes()
    expected = numbers(loader.batch(0, 0))
    with open(path, "r+b") as file:
        file.truncate(64)
    with pytest.raises(DataError, match="train-00000-of-00002.h5: truncated while it was read"):
        for t in range(1, loader.steps_per_epoch):
            loader.batch(0, t)
    with open(path, "r+b") as file:
        file.write(data)
    assert numbers(loader.batch(0, 0)) == expected       # a new thread, once the trouble is over
    loader.close()


def test_no_thread_is_left_behind(tmp_path):
    manifest = make(tmp_path, [64, 64])

    def ours():
        return [thread for thread in threading.enumerate() if thread.name == "hpcmlp-prefetch"]

    for end in ("close", "forget"):
        loader = Loader(tmp_path, manifest, "train", 0, 1, 4, memory_limit=128 * row_bytes(manifest) / 2, window_rows=8)
        loader.batch(0, 0)
        assert len(ours()) == 1 and ours()[0].daemon
        if end == "close":
            loader.close()
        del loader
        gc.collect()
        assert not ours()   # at once: whoever lets it go has waited for its end


@pytest.mark.parametrize("size", [1, 2])
def test_a_resident_step_allocates_next_to_nothing(tmp_path, size):
    manifest = make(tmp_path, [4096, 4096])
    loader = Loader(tmp_path, manifest, "train", 0, size, 128)
    loader.batch(0, 0)
    gc.collect()
    tracemalloc.start()
    for t in range(1, 32):
        loader.batch(0, t)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4096
