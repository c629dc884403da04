"""A child that tries messages from GPU memory proves them only by coming to its end with the right numbers."""

import ctypes
import time

import pytest

from hpcmlp.run import device_messages
from hpcmlp.run.device_messages import PROBE, PROVEN, claims, why_false

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


FAKE = '''
import ctypes, os
wrong = int(os.environ["FAKE_WRONG"])
class runtime:
    deviceSynchronize = staticmethod(lambda: None)
class cuda:
    runtime = runtime
class Array:
    def __init__(self, size, first):
        self.memory = (ctypes.c_float * size)(*([first] * min(size, 8)))
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "<f4", "version": 3,
                                         "data": (ctypes.addressof(self.memory), False)}
    def get(self):
        if len(self.memory) == wrong:
            self.memory[wrong - 1] += 1 + id(self) % 997
        return memoryview(self.memory)
arange = lambda size, dtype: Array(size, 3.0)
zeros = lambda size, dtype: Array(size, 0.0)
'''


@pytest.mark.parametrize("wrong, words", [(0, ""), (1 << 21, "in a message of 8388608 bytes")])
def test_the_probe_looks_at_the_numbers_of_every_size(tmp_path, monkeypatch, wrong, words):
    (tmp_path / "cupy.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
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
