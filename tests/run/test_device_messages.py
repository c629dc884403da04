"""A child that tries messages from GPU memory proves them only by coming to its end with the right numbers."""

import ctypes
import time
from types import SimpleNamespace

import numpy as np
import pytest

from hpcmlp.comm.ring import Ring
from hpcmlp.errors import ConfigError
from hpcmlp.ops.device import DirectOps
from hpcmlp.ops.device_sums import LateSums
from hpcmlp.run import device_messages
from hpcmlp.run.device_messages import PROBE, PROVEN, claims, may_send, why_false, why_wrong
from hpcmlp.run.on_device import _open_path

END = f"\nprint({PROVEN!r})"


@pytest.mark.parametrize("code, words", [
    ("print('on my way')" + END, ""),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)" + END, "it ends with -11: no word"),
    ("assert False, 'other numbers arrive in a message of 4 bytes'" + END, "it ends with 1: AssertionError: other"),
    ("import os; print('aborted'); os._exit(0)" + END, "it ends with 0: aborted"),
    ("raise SystemExit(7)" + END, "it ends with 7"),
    ("import os\n" + END + "\nos._exit(3)", "it ends with 3"),     # the end of MPI is part of it
])
def test_what_a_child_does_is_judged(code, words):
    found = why_false(code)
    assert found.startswith(words) and bool(found) == bool(words), found


def test_a_child_that_hangs_is_ended():
    begin = time.monotonic()
    assert why_false("import time; time.sleep(60)" + END, 0.5) == "it ends with 124: no answer in 0.5 s"
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("wrong, words", [(0, ""), (1 << 21, "in a message of 8388608 bytes")])
def test_the_probe_looks_at_the_numbers_of_every_size(fake_cupy, monkeypatch, wrong, words):
    monkeypatch.setenv("PYTHONPATH", str(fake_cupy))
    monkeypatch.setenv("FAKE_WRONG", str(wrong))
    found = why_false(PROBE)
    assert words in found and bool(found) == bool(words), found


def test_claims_are_those_of_settings_and_libraries(monkeypatch):
    class Library:
        MPIX_Query_cuda_support = staticmethod(lambda: 1)
    for name in device_messages.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert claims([]) == []
    monkeypatch.setenv("MPICH_GPU_SUPPORT_ENABLED", "1")
    monkeypatch.setenv("MV2_USE_CUDA", "0")
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Library)
    assert claims(["libmpi.so"]) == ["MPICH_GPU_SUPPORT_ENABLED=1", "MPIX_Query_cuda_support"]


@pytest.fixture
def asked(monkeypatch):
    """Who claims it and what the children find is what the test says; notes whose children were started."""
    started = []

    def say(claimed, tried):
        started.clear()
        monkeypatch.setattr(device_messages, "claims", lambda paths: claimed)
        monkeypatch.setattr(device_messages, "why_false", lambda code: started.append(code) or tried)
    say.started = started
    return say


@pytest.mark.mpi
@pytest.mark.parametrize("num_nodes, asks", [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("claimed", (False, True))
@pytest.mark.parametrize("false", (False, True))
def test_all_ranks_find_the_same_by_one_claim_and_every_childs_proof(comm, asked, num_nodes, asks, claimed, false):
    last = comm.rank == comm.size - 1
    asked(["MV2_USE_CUDA=1"] * (claimed and last), "it ends with -11: no word" * (false and last))
    good, why = may_send(comm, num_nodes, 5, asks)
    tries = asks or claimed and num_nodes == 1
    assert good == (tries and not false)
    assert len(asked.started) == tries and all("Device(5).use()" in code for code in asked.started)
    assert len(set(comm.allgather(why))) == 1
    assert bool(why) == (claimed or asks)
    assert ("not straight from GPU memory" in why) == (bool(why) and not good)
    assert ("MV2_USE_CUDA=1 claims" in why) == claimed
    assert (f"a child process of rank {comm.size - 1}, it ends with -11" in why) == bool(tries and false)
    assert ("between nodes only --sync direct" in why) == (claimed and num_nodes > 1 and not asks)


class Device:
    """A device whose memory is the host's."""

    def zeros(self, count, dtype):
        return np.zeros(count, dtype)

    def upload(self, host, out):
        out[...] = host

    def download(self, array, out):
        out[...] = array


@pytest.mark.mpi
def test_numbers_that_arrive_are_right_or_all_ranks_see_that_they_are_not(comm, given_back, monkeypatch):
    ring = given_back(Ring(comm, small_bytes=0, device=LateSums()))
    assert why_wrong(ring, Device()) == "" and len(ring._plans) == 0
    gather = ring.all_gather

    def wrong(array, bounds):
        gather(array, bounds)
        if comm.rank == comm.size - 1 and array.size == 1024:
            array[-1] += 1
    monkeypatch.setattr(ring, "all_gather", wrong)
    assert why_wrong(ring, Device()) == "other numbers arrive in a sum of 4096 bytes" and len(ring._plans) == 0


@pytest.mark.mpi(min_size=2)
def test_a_proof_that_does_not_hold_between_the_ranks_leads_through_the_host(comm, topology, asked, monkeypatch):
    asked(["MV2_USE_CUDA=1"], "")
    monkeypatch.setattr(device_messages, "why_wrong", lambda ring, device: "other numbers arrive")
    parts = SimpleNamespace(config=SimpleNamespace(sync="auto", full_update=True), comm=comm, topology=topology,
                            sync_name=lambda: "ring")
    path, why = _open_path(parts, Device(), 64, DirectOps(np))
    assert path == "host" and parts.exchange.name == "ring"
    assert why == ("--full-update; not straight from GPU memory: MV2_USE_CUDA=1 claims that MPI can, proven in a child "
                   "process of every rank, but other numbers arrive between the ranks")
    parts.exchange.collective.free()
    parts.config.sync = "direct"
    with pytest.raises(ConfigError, match="cannot work here: not straight from GPU memory: MV2"):
        _open_path(parts, Device(), 64, DirectOps(np))
    monkeypatch.setattr(device_messages, "why_wrong", lambda ring, device: "")
    path, why = _open_path(parts, Device(), 64, DirectOps(np))
    assert path == parts.exchange.name == "direct" and "proven" in why
    parts.exchange.collective.free()
