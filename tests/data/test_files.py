"""Files and directories appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from hpcmlp.data.files import (
    check_new_directory,
    digest_file,
    discard_directory,
    new_directory,
    publish_directory,
    write_atomically,
)
from hpcmlp.errors import CannotWrite, InputMissing


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "a"
    for data in (b"", b"one", bytes(range(256)) * 100_000):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call, code):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    real = getattr(os, call)

    def fail(*args, **kwargs):
        if call == "open" and not args[1] & os.O_CREAT:
            return real(*args, **kwargs)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CannotWrite, match="cannot write") as error:
            write_atomically(path, b"new" * 1000)
    if code == errno.ENOSPC:
        assert "3000 bytes are needed" in str(error.value) and "free" in str(error.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_link_in_place_of_the_file_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "a").symlink_to(victim)
    write_atomically(tmp_path / "a", b"new")
    assert victim.read_bytes() == b"precious" and not (tmp_path / "a").is_symlink()


def test_a_directory_appears_at_once(tmp_path):
    for given in (tmp_path / "deep" / "out", tmp_path / "empty"):
        if given.name == "empty":
            given.mkdir()
        work = Path(new_directory(given))
        (work / "f").write_bytes(b"1")
        assert not (given / "f").exists()
        publish_directory(work, given)
        assert (given / "f").read_bytes() == b"1" and not work.exists()
    work = Path(new_directory(tmp_path / "never"))
    discard_directory(work)
    assert sorted(os.listdir(tmp_path)) == ["deep", "empty"]


def test_a_taken_directory_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, word in (("full", "not empty"), ("file", "no directory"), ("dangling", "no directory")):
        with pytest.raises(CannotWrite, match=word):
            check_new_directory(tmp_path / name)
    with pytest.raises(CannotWrite, match="cannot"):
        new_directory(tmp_path / "file" / "below")


def test_a_digest_is_of_the_content(tmp_path):
    write_atomically(tmp_path / "a", b"abc")
    assert digest_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(InputMissing, match="nothere"):
        digest_file(tmp_path / "nothere")
