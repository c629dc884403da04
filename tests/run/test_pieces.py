"""The digest by pieces is the same however the bytes come, and sees every byte."""

import hashlib
import os

import numpy as np
import pytest

from hpcmlp.run import pieces
from hpcmlp.run.pieces import PIECE_BYTES, PieceDigest

SIZES = (0, 1, 4097, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 12345)


def plain(data):
    parts = [data[at:at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@pytest.mark.parametrize("size", SIZES)
def test_in_portions_and_from_a_file_it_is_the_same(tmp_path, size):
    random = np.random.default_rng(size)
    data = random.bytes(size)
    digest, at = PieceDigest(), 0
    while at < size:
        portion = int(random.integers(0, PIECE_BYTES))
        digest.update(data[at:at + portion])
        at += portion
    assert digest.hexdigest() == plain(data)
    (tmp_path / "file").write_bytes(data)
    for mapped in (False, True):
        image, told = pieces.read(tmp_path / "file", mapped)
        assert told == plain(data) and image.tobytes() == data


@pytest.mark.parametrize("at", [0, PIECE_BYTES - 1, PIECE_BYTES, 3 * PIECE_BYTES + 5])
def test_a_flip_in_any_piece_changes_it(tmp_path, at):
    data = bytearray(os.urandom(3 * PIECE_BYTES + 6))
    (tmp_path / "file").write_bytes(data)
    before = pieces.read(tmp_path / "file")[1]
    data[at] ^= 4
    (tmp_path / "file").write_bytes(data)
    assert pieces.read(tmp_path / "file")[1] != before


def test_a_file_that_becomes_shorter_meanwhile_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(os.urandom(2 * PIECE_BYTES))
    monkeypatch.setattr(pieces.os, "preadv", lambda handle, buffers, at: 0)
    with pytest.raises(OSError, match="cut off"):
        pieces.read(tmp_path / "file")
