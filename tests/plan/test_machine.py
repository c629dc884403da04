"""Machine files: what is written is read, times between entries, and files that are something else."""

import json
from dataclasses import replace

import pytest

from hpcmlp.errors import ConfigError, InputMissing
from hpcmlp.plan.machine import Process, look_up, read_machine, write_machine
from hpcmlp.plan.profiles import HARDWARE, NETWORKS, find_machine, profile, with_network
from hpcmlp.plan.record import Op


def test_what_is_written_is_read(tmp_path, machine):
    machine = replace(machine, late_s=[[1e-3, 1e-5], [1e-2, 1e-4]])
    write_machine(tmp_path / "m.json", machine)
    assert read_machine(tmp_path / "m.json") == machine


def test_a_file_from_before_the_spread_was_measured_is_read_and_nobody_is_late(tmp_path, machine):
    write_machine(tmp_path / "m.json", machine)
    values = json.loads((tmp_path / "m.json").read_text())
    del values["late_s"]
    (tmp_path / "m.json").write_text(json.dumps(values))
    assert read_machine(tmp_path / "m.json").wait_s(1.0, 4096) == 0.0


@pytest.mark.parametrize("size, seconds", [(1, 2.0), (10, 2.0), (100, 20.0), (1000, 200.0), (31.6227766, 6.32455532),
                                           (4000, 800.0)])
def test_times_between_entries_go_by_logarithms_and_beyond_the_last_in_proportion(size, seconds):
    assert look_up([[10, 2.0], [100, 20.0], [1000, 200.0]], size) == pytest.approx(seconds)


def test_products_keep_the_rate_between_and_beyond_the_grid(machine):
    for sizes in ((1, 1, 1), (7, 300, 11), (4096, 4096, 4096), (100_000, 5000, 9)):
        assert machine.op_s(Op("forward", 1, sizes), 1) == pytest.approx(2 * sizes[0] * sizes[1] * sizes[2] / 1e9)


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"{\"format\": \"hpcmlp-machine-1\"}", b"\xff\xfe", b"nan",
                                    b"[" * 100_000])
def test_what_is_no_machine_file_is_refused_in_one_sentence(tmp_path, damage):
    (tmp_path / "m.json").write_bytes(damage)
    with pytest.raises(ConfigError, match="not a machine file"):
        read_machine(tmp_path / "m.json")


@pytest.mark.parametrize("name", ["ops", "products", "node", "late_s"])
def test_a_table_with_a_hole_is_refused(tmp_path, machine, name):
    write_machine(tmp_path / "m.json", machine)
    values = json.loads((tmp_path / "m.json").read_text())
    if name == "ops":
        values["ops"]["4"]["adam"][1][1] = 0.0
    elif name == "late_s":
        values["late_s"] = [[1e-3, 1e-5], [1e-2, -1e-4]]
    elif name == "products":
        values["products"]["4"]["weight"]["s"][0].pop()
    else:
        values["node"]["reduce"].reverse()
    (tmp_path / "m.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="not whole"):
        read_machine(tmp_path / "m.json")


def test_a_file_that_is_not_there_and_a_name_that_is_unknown(tmp_path):
    with pytest.raises(InputMissing, match="bench --calibrate"):
        find_machine(str(tmp_path / "m.json"), None)
    with pytest.raises(ConfigError, match="epyc-7763"):
        find_machine("pdp-11", None)
    with pytest.raises(ConfigError, match="no effect without --machine"):
        find_machine(None, "ethernet-1g")


@pytest.mark.parametrize("name", HARDWARE)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_profile_names_its_source(tmp_path, name, network):
    machine = with_network(profile(name), network)
    assert "not measured" in machine.source and NETWORKS[network].source in machine.source
    write_machine(tmp_path / "m.json", machine)
    read_machine(tmp_path / "m.json")


@pytest.mark.parametrize("m, k, n, kib", [      # of the result m x n, sums over k
    (1024, 512, 256, 268), (1024, 784, 256, 420), (4096, 2048, 256, 472), (4096, 784, 256, 420),
    (4096, 784, 512, 6800), (1024, 64, 4096, 368), (256, 2048, 4096, 1232), (4096, 2048, 784, 7868)])
def test_the_blas_keeps_what_it_was_seen_to_keep(m, k, n, kib):
    """Growth of a process by one product in float32, OpenBLAS 0.3.31 on a core with AVX-512, seen on 2026-11-28."""
    found = Process(0, 0, row_bytes=1792, block_rows=448).blas_bytes([(m, k, n)])
    assert found == pytest.approx(1024 * kib, rel=0.02, abs=32 * 1024)


def test_the_blas_has_one_place_for_blocks_and_one_for_panels():
    process = Process(0, 0, row_bytes=40, block_rows=5)
    assert process.blas_bytes([(7, 10, 3)]) == 40 * 3               # the other operand comes in narrow pieces
    assert process.blas_bytes([(7, 10, 10), (20, 4, 6)]) == 40 * 5 + 320
    assert process.blas_bytes([]) == 0
