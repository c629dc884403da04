"""Flips and kills in short; a reader without digests is caught by the same program."""

import sys
from pathlib import Path

import pytest

from hpcmlp.run import checkpoint, state_file

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks/faults"


@pytest.fixture
def program(monkeypatch):
    def load(name):
        monkeypatch.syspath_prepend(str(FOLDER))
        sys.modules.pop(name, None)
        return __import__(name)
    return load


def test_every_flip_and_every_truncation_is_answered_as_promised(program):
    rows = list(program("flips").rows(80, 3))
    assert len(rows) == 4 and sum(row["injected"] for row in rows) == 80
    for row in rows:
        assert row["completed"] == row["injected"], row


def test_flips_find_a_reader_that_compares_nothing(program, monkeypatch):
    monkeypatch.setattr(checkpoint, "parse", lambda image, check_arrays: state_file.parse(image, False))
    monkeypatch.setattr(checkpoint, "read_sealed", lambda path: None)
    row = next(program("flips").rows(80, 3))
    assert row["fault"] == "bit flip in a checkpoint" and row["completed"] < row["injected"]


def test_a_run_that_was_killed_ends_with_the_bits_of_the_undisturbed_one(program, tmp_path):
    cases, same, gap = program("kills").campaign(tmp_path, 1, 5, 2, float("inf"))
    assert len(cases) == same == 1 and gap == 0.0
    assert cases[0]["finished"] and cases[0]["bad"] == [] and cases[0]["restarts"] >= 1
