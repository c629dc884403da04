"""inspect: tells data sets, shards, runs and checkpoints apart, and whole ones from damaged and incomplete ones."""

import json

import numpy as np
import pytest

from hpcmlp.config import InspectConfig
from hpcmlp.data.manifest import Manifest, write_manifest
from hpcmlp.data.shards import shard_name, write_shard
from hpcmlp.errors import DataError, InputMissing
from hpcmlp.programs import inspect
from hpcmlp.run import checkpoint

pytestmark = pytest.mark.mpi
SHARDS = 5


@pytest.fixture
def data(comm, mpi_tmp_path):
    """A data set of 5 training and 1 test shards, made by rank 0; the path is the same on all ranks."""
    if comm.rank == 0:
        rng = np.random.default_rng(0)
        splits = {}
        for split, count in (("train", SHARDS), ("test", 1)):
            splits[split] = tuple(
                write_shard(mpi_tmp_path / shard_name(split, k, count), rng.integers(0, 255, (20 + k, 7), np.uint8),
                            rng.integers(0, 3, 20 + k).astype(np.int32), None, {"split": split}) for k in range(count))
        manifest = Manifest("flowers", "classification", 7, "uint8", [f"f{i}" for i in range(7)], splits,
                            ["red", "green", "blue"])
        write_manifest(mpi_tmp_path, manifest)
    comm.Barrier()
    return mpi_tmp_path


@pytest.fixture
def run(comm, mpi_tmp_path):
    """A run directory with two checkpoints and its small files."""
    if comm.rank == 0:
        arrays = {"params/layers.0.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
                  "params/layers.0.bias": np.zeros(3, np.float32)}
        for step in (10, 20):
            checkpoint.save(mpi_tmp_path, step, checkpoint.State({"step": step, "network": {"sizes": [4, 3]},
                                                                  "data": "somewhere"}, arrays))
        (mpi_tmp_path / "config.toml").write_text('data = "somewhere"\nseed = 1\n')
        (mpi_tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 10}\n{"kind": "step", "step": 20}\n')
        (mpi_tmp_path / "summary.json").write_text('{"status": "done", "steps": 20}\n')
    comm.Barrier()
    return mpi_tmp_path


@pytest.fixture
def look(comm, capfd):
    """look(path, **options) -> (exit code, what was printed); JSON is parsed. Other ranks than 0 get None for it."""
    def look(path, **options):
        capfd.readouterr()
        code = inspect.main(InspectConfig(path=str(path), **options), comm)
        out = capfd.readouterr().out
        assert comm.rank == 0 or not out
        if comm.rank:
            return code, None
        return code, json.loads(out) if options.get("json") else out
    return look


def alone(comm, action):
    """Let rank 0 do something to the files while the others wait."""
    comm.Barrier()
    if comm.rank == 0:
        action()
    comm.Barrier()


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_whole_data_set(comm, data, look):
    code, found = look(data, json=True)
    assert code == 0
    if comm.rank == 0:
        assert found["kind"] == "data set" and found["whole"] and found["rows"] == {"train": 110, "test": 20}
        assert [part["file"] for part in found["parts"]] == \
            [shard_name("train", k, SHARDS) for k in range(SHARDS)] + [shard_name("test", 0, 1)]
        assert all(part["status"] == "whole" for part in found["parts"])
    code, text = look(data)
    assert code == 0
    if comm.rank == 0:
        assert "flowers: classification, 7 features (uint8), 3 classes: red, green, blue" in text
        assert text.endswith("\nwhole\n")
    assert look(data / "dataset.json")[0] == 0


def test_damaged_and_missing_shards_are_all_named(comm, data, look):
    def damage():
        flip(data / shard_name("train", 1, SHARDS), -1)
        (data / shard_name("train", 3, SHARDS)).unlink()
        (data / "train-extra.h5").write_bytes(b"")

    alone(comm, damage)
    code, found = look(data, json=True)
    assert code == 65
    if comm.rank == 0:
        assert [part["status"] for part in found["parts"]] == ["whole", "damaged", "whole", "missing", "whole", "whole"]
        assert not found["whole"] and found["unlisted"] == ["train-extra.h5"]
    code, text = look(data, verify=False)
    assert code == 66       # the flipped bit is not looked for
    if comm.rank == 0:
        assert "not whole: 1 of 6 parts damaged or missing" in text


def test_a_shard_with_its_data_set_and_alone(comm, data, look):
    shard = data / shard_name("train", 2, SHARDS)
    code, found = look(shard, json=True)
    assert code == 0
    if comm.rank == 0:
        assert found["kind"] == "shard" and found["split"] == "train" and found["parts"][0]["rows"] == 22
    alone(comm, lambda: (data / "dataset.json").unlink())
    code, found = look(shard, json=True)
    assert code == 0
    if comm.rank == 0:
        part = found["parts"][0]
        assert part["arrays"]["x"] == {"shape": [22, 7], "dtype": "uint8", "layout": "contiguous", "compression": None}
        assert sum(part["class_counts"]) == 22 and part["attributes"]["split"] == "train"
    code, text = look(shard)
    if comm.rank == 0:
        assert "x (22, 7) uint8, contiguous" in text
    alone(comm, lambda: shard.write_bytes(shard.read_bytes()[:3000]))
    assert look(shard)[0] == 65
    alone(comm, lambda: shard.write_bytes(b"no HDF5"))
    code, found = look(shard, json=True)
    assert code == 65
    if comm.rank == 0:
        assert "not an HDF5 file" in found["parts"][0]["problem"]


def test_a_shard_alone_with_numbers_that_are_not_finite(comm, mpi_tmp_path, look):
    path = mpi_tmp_path / "one.h5"
    x, y = np.ones((9, 2), np.float32), np.ones((9, 2), np.float32)
    alone(comm, lambda: write_shard(path, x, y))
    code, found = look(path, json=True)
    assert code == 0
    if comm.rank == 0:
        assert found["parts"][0]["y_mean"] == [1.0, 1.0] and found["parts"][0]["y_std"] == [0.0, 0.0]
    x[7, 1] = np.nan
    alone(comm, lambda: write_shard(path, x, y))
    code, found = look(path, json=True)
    assert code == 65
    if comm.rank == 0:
        assert "row 7, column 1 is nan" in found["parts"][0]["problem"]


def test_run_and_checkpoint(comm, run, look):
    code, found = look(run, json=True)
    assert code == 0
    if comm.rank == 0:
        assert found["kind"] == "run" and found["whole"]
        parts = {part.get("file") or part["checkpoint"]: part for part in found["parts"]}
        assert parts["metrics.jsonl"]["records"] == 2 and parts["metrics.jsonl"]["last_step"] == 20
        assert parts["step-00000020"]["num_params"] == 15 and parts["step-00000020"]["meta"]["step"] == 20
    code, text = look(run)
    if comm.rank == 0:
        assert "step 20, network [4, 3]" in text and text.endswith("\nwhole\n")
    last = run / "checkpoints" / "step-00000020"
    for path in (last, last / "state.h5"):
        code, found = look(path, json=True)
        assert code == 0
        if comm.rank == 0:
            assert found["kind"] == "checkpoint" and found["parts"][0]["arrays"]["params/layers.0.bias"]["shape"] == [3]


def test_damaged_run(comm, run, look):
    state = run / "checkpoints" / "step-00000010" / "state.h5"
    alone(comm, lambda: flip(state, -5))
    code, found = look(run, json=True)
    assert code == 65
    if comm.rank == 0:
        assert [p["checkpoint"] for p in found["parts"] if p["status"] == "damaged"] == ["step-00000010"]
    assert look(run, verify=False)[0] == 0
    alone(comm, state.unlink)
    assert look(run)[0] == 66 == look(state.parent)[0]
    alone(comm, lambda: (run / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste'))
    code, text = look(run)
    assert code == 66
    if comm.rank == 0:
        assert "2 records, to step 2, last line cut off" in text
    alone(comm, lambda: (run / "metrics.jsonl").write_bytes(b'{"step": 1}\nx\n'))
    assert look(run)[0] == 65


def test_what_is_no_such_thing(comm, mpi_tmp_path, look):
    with pytest.raises(InputMissing, match="there is no such file"):
        look(mpi_tmp_path / "nothing")
    with pytest.raises(InputMissing, match="neither a data set"):
        look(mpi_tmp_path)
    alone(comm, lambda: (mpi_tmp_path / "dataset.json").write_text("{"))
    with pytest.raises(DataError, match="not a manifest") as caught:
        look(mpi_tmp_path)
    assert caught.value.agreed
