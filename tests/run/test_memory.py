"""What a process holds of its node: memory is shared out among those that have it, code counts once on a node."""

import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

from hpcmlp.run.memory import held_bytes

MIB = 1 << 20
TOUCH = """
import mmap, sys, time
with open(sys.argv[1], "rb") as file:
    view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(view[::4096])
print("touched", flush=True)
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(held_bytes() == (0, 0), reason="this kernel does not tell")


def test_memory_that_is_written_to_is_a_ranks_own_and_goes_when_it_is_freed():
    own, code = held_bytes()
    array = np.ones(8 * MIB, np.uint8)
    more, same = held_bytes()
    assert 7.5 * MIB < more - own < 8.5 * MIB and abs(same - code) < MIB / 2
    del array
    assert held_bytes()[0] - own < MIB / 2


def test_a_mapped_file_counts_in_full_whoever_else_has_it(tmp_path):
    """On two nodes that are one machine, or beside another job, the kernel's share of it would be a half."""
    path = tmp_path / "library"
    path.write_bytes(os.urandom(8 * MIB))
    own, code = held_bytes()
    with subprocess.Popen([sys.executable, "-c", TOUCH, path], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "touched\n"
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                sum(view[::4096])
                same, more = held_bytes()
        finally:
            other.kill()
    assert 7.5 * MIB < more - code < 8.5 * MIB and abs(same - own) < MIB / 2


def test_memory_of_two_processes_counts_half_in_each():
    own, _ = held_bytes()
    handle = os.memfd_create("shared")
    os.ftruncate(handle, 8 * MIB)
    view = mmap.mmap(handle, 8 * MIB)
    np.frombuffer(view, np.uint8)[:] = 1
    alone = held_bytes()[0]
    with subprocess.Popen([sys.executable, "-c", TOUCH, f"/proc/{os.getpid()}/fd/{handle}"], stdout=subprocess.PIPE,
                          text=True) as other:
        try:
            assert other.stdout.readline() == "touched\n"
            both = held_bytes()[0]
        finally:
            other.kill()
    os.close(handle)
    assert 7.5 * MIB < alone - own < 8.5 * MIB and 3.5 * MIB < both - own < 4.5 * MIB
