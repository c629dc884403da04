"""Files and columns of any name: they work, and no message of theirs is obeyed by a terminal."""

import json
import os

import pytest

NAMES = ["two words", "gr\u00f6\u00dfe \u6570\u636e", "new\nline", "\x1b[31mred", "-dash", "q'uo\"te", "#%{}$(ls)"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder below all the names, with a table in it."""
    folder = tmp_path_factory.mktemp("names").joinpath(*NAMES)
    folder.mkdir(parents=True)
    rows = "".join(f"{k % 7},{k % 5},{'a' if k % 2 else 'b'}\n" for k in range(60))
    (folder / "table \u00e9\n.csv").write_text('"x\n1","\x1b[2J",label\n' + rows)
    return folder


def clean(text):
    """Whether a terminal shows all of it."""
    return all(c.isprintable() or c == "\n" for c in text)


def test_every_program_takes_odd_names(odd, hpcmlp):
    done = hpcmlp("prepare", odd / "table \u00e9\n.csv", "--target", "label", "--out", odd / "data")
    assert done.returncode == 0 and clean(done.stdout), done.stderr
    done = hpcmlp("train", "--data", odd / "data", "--out", odd / "run", "--hidden", 4, "--epochs", 2, ranks=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((odd / "run" / "summary.json").read_text())["status"] == "finished"
    for words in (("train", "--data", odd / "data", "--out", odd / "run", "--hidden", 4, "--epochs", 3, "--resume"),
                  ("evaluate", odd / "run"), ("inspect", odd / "run"), ("inspect", odd / "data"),
                  ("predict", odd / "run", odd / "table \u00e9\n.csv", "--out", odd / "p.h5")):
        done = hpcmlp(*words)
        assert done.returncode == 0, done.stderr
        if words[0] in ("predict", "inspect"):
            assert clean(done.stdout)


@pytest.mark.parametrize("ranks, name, programs", [
    (None, "\x1b[31mgone\nagain", ("prepare", "inspect", "evaluate", "train", "predict")),
    (None, "x" * 5000, ("prepare", "inspect", "evaluate", "train")),
    (None, os.fsdecode(b"raw\xff"), ("prepare", "train")),
    (2, os.fsdecode(b"raw\xff"), ("prepare",)), (2, "x" * 5000, ("prepare", "train"))])
def test_what_is_not_there_is_named_in_one_line_that_is_not_obeyed(tmp_path, hpcmlp, ranks, name, programs):
    words = {"prepare": (name, "--out", tmp_path / "out"), "inspect": (name,), "evaluate": (name,),
             "train": ("--data", name, "--out", tmp_path / "run"), "predict": (name, name, "--out", tmp_path / "p.h5")}
    for program in programs:
        done = hpcmlp(program, *words[program], ranks=ranks)
        assert done.returncode == 66, done.stderr
        lines = done.stderr.removesuffix("\n").split("\n")
        assert len(lines) == 1 and clean(lines[0]) and len(lines[0]) < 1600, done.stderr
