"""`bench` through the command line: what each prints, at 1 and 3 ranks, and which options it refuses."""

import json

import pytest

STAGES = [("gather", "warm"), ("open", "cold"), ("read", "cold"), ("read", "warm"), ("verify sha256", "warm"),
          ("stream", "cold"), ("stream", "warm")]


@pytest.mark.parametrize("ranks", [None, 3])
def test_io_counts_the_samples_of_every_stage(flowers, hpcmlp, ranks):
    done = hpcmlp("bench", "io", "--data", flowers, "--steps", 30, "--global-batch-size", 50, "--json", ranks=ranks)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(r["stage"], r["cache"]) for r in rows] == STAGES
    size = ranks or 1
    manifest = json.loads((flowers / "dataset.json").read_text())
    train = sum(entry["rows"] for entry in manifest["splits"]["train"])
    full, last = divmod(train, 50)
    batches = [50] * full + [last] * (last > 0)
    drawn = sum((batches * 30)[:30])
    for row in rows:
        assert row["ranks"] == size and row["seconds"] > 0
        if row["stage"] in ("gather", "stream"):
            assert row["samples"] == drawn
        else:
            assert train <= row["samples"] <= size * train  # a shard that two ranks touch is read by both
        if row["stage"] == "open":
            assert row["samples_per_s"] is None
        else:
            assert row["samples_per_s"] == pytest.approx(row["samples"] / row["seconds"])
            assert row["mb_per_s"] == pytest.approx(row["samples_per_s"] * (8 * 4 + 4) / 1e6)
            assert 0 < row["samples_per_s_rank"] * size <= row["samples_per_s"] * size
        assert row["cache"] == "cold" or row["still_cached"] is None


def test_tables_have_a_line_per_stage(flowers, hpcmlp):
    done = hpcmlp("bench", "io", "--data", flowers, "--steps", 5, "--memory-limit", 0.015)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 + len(STAGES) and done.stderr == ""


@pytest.mark.parametrize("what", ["step", "gemm"])
def test_json_is_all_that_is_printed(hpcmlp, what):
    done = hpcmlp("bench", what, "--sizes", "20,12,3", "--global-batch-size", 9, "--steps", 5, "--json", ranks=3)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["what"] == what and result["ranks"] == 3 and result["sizes"] == [20, 12, 3] and done.stderr == ""
    assert all(result[key] > 0 for key in (["step_ms", "floor_ms"] if what == "step" else ["ms", "gflops_per_rank"]))


@pytest.mark.parametrize("ranks", [None, 2])
def test_comm_has_a_row_per_algorithm_and_size(hpcmlp, ranks):
    done = hpcmlp("bench", "comm", "--bytes", "4,40000", "--steps", 5, "--json", ranks=ranks)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    names = ["shared", "ring", "native", "MPI_Allreduce", "copy"] + ["message"] * (ranks is not None)
    assert [(r["bytes"], r["algorithm"]) for r in rows] == [(size, name) for size in (4, 40000) for name in names]
    for row in rows:
        assert row["ranks"] == (ranks or 1) and row["us"] > 0
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        copy = next(r["us"] for r in rows if r["bytes"] == row["bytes"] and r["algorithm"] == "copy")
        assert row["of_copy"] == (None if row["algorithm"] == "message" else pytest.approx(copy / row["us"]))
    table = hpcmlp("bench", "comm", "--bytes", "4", "--steps", 5, ranks=ranks)
    assert table.returncode == 0 and len(table.stdout.splitlines()) == 1 + len(names) and table.stderr == ""


@pytest.mark.parametrize("arguments, words", [
    (("gemm", "--sync", "ring"), "--sync"), (("step", "--bytes", "4"), "--bytes"),
    (("comm", "--sizes", "3,4"), "--sizes"),
    (("step", "--data", "x"), "--data"), (("io",), "--data"), (("step", "--sizes", "3"), "at least two widths"),
    (("comm", "--wire", "bf16"), "--wire"), (("step", "--wire", "bf16", "--sync", "native"), "wire")])
def test_an_option_without_effect_is_refused(hpcmlp, arguments, words):
    done = hpcmlp("bench", *arguments)
    assert done.returncode == 78 and words in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("mib, words", [(100, "nothing would be streamed"), (0.001, "too small")])
def test_a_limit_that_cannot_stream_is_refused_on_all_ranks(flowers, hpcmlp, mib, words):
    done = hpcmlp("bench", "io", "--data", flowers, "--memory-limit", mib, "--steps", 5, ranks=2)
    assert done.returncode == 78 and words in done.stderr and len(done.stderr.splitlines()) == 1
