"""Ranks that differ are named with the difference, a replica that drifted too; one rank reads the manifest for all."""

import numpy as np
import pytest

from hpcmlp.comm.agreement import agree
from hpcmlp.data.manifest import Manifest, ShardEntry, write_manifest
from hpcmlp.errors import ConfigError, InputMissing
from hpcmlp.run.coordinator import Console, check_alike, epoch_line, header, open_dataset, replica_error, versions


@pytest.mark.mpi
def test_equal_facts_pass_and_versions_are_told(comm):
    check_alike(comm, {"lr": 0.1, "hidden": (3, 4), "none": None, **versions()})
    assert set(versions()) == {"hpcmlp", "python", "numpy", "h5py", "hdf5", "machine"}


@pytest.mark.mpi(min_size=2)
def test_the_rank_that_differs_is_named_with_the_difference(comm):
    facts = {"lr": 0.1 if comm.rank != 1 else 0.2, "numpy": "2.4"}
    with pytest.raises(ConfigError, match="rank 1 differs from rank 0: lr is 0.2 there and 0.1 on rank 0") as caught:
        check_alike(comm, facts)
    assert caught.value.agreed
    agree(comm, None)  # nobody is left in a collective


@pytest.mark.mpi(min_size=3)
def test_the_drifted_replica_is_named(comm):
    error = replica_error(comm, 17 if comm.rank != 2 else 18, 40)
    assert "at step 40 the parameters of rank 2 differ" in str(error) and error.code == 70 and error.agreed


@pytest.mark.mpi
def test_rank_0_reads_the_manifest_for_all(comm, mpi_tmp_path):
    manifest = Manifest("x", "regression", 2, "float32", ["a", "b"],
                        {"train": (ShardEntry("train-00000-of-00001.h5", 5, 100, "0" * 64),)}, target_names=["t"],
                        target_shift=[0.5], target_scale=[2.0], preprocessing={"deep": {"list": [1, None, True]}})
    if comm.rank == 0:
        write_manifest(mpi_tmp_path, manifest)
    assert open_dataset(comm, str(mpi_tmp_path)) == manifest
    with pytest.raises(InputMissing, match="nothing-here"):
        open_dataset(comm, str(mpi_tmp_path / "nothing-here"))


def test_only_the_speaking_console_speaks(capsys):
    Console(False, True).line("no")
    Console(True, True).line("yes")
    assert capsys.readouterr().out == "yes\n"


def test_the_lines_of_header_and_epoch():
    assert header([("a", "1"), ("longer", "2")]) == "a       1\nlonger  2"
    line = epoch_line(3, 10, 0.5, {"loss": 0.25, "rows": 7}, 12345.6, {"compute": 3.0, "comm": 1.0})
    assert line == "epoch   3/10  train loss 0.5000  val loss 0.2500  12,346 samples/s  compute 75 % comm 25 %"
    assert epoch_line(1, None, np.nan, {}, 1.0, {"compute": 0.0}).startswith("epoch   1  train loss nan")
