"""What the surroundings of an HDF5 file can do: plugins in the environment, locks that are held."""

import fcntl
import os
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

PLUGIN = """#include <fcntl.h>
#include <unistd.h>
__attribute__((constructor)) static void loaded(void) { close(open("LOADED", O_CREAT | O_WRONLY, 0644)); }
const void *H5PLget_plugin_info(void) { return 0; }
int H5PLget_plugin_type(void) { return 0; }
"""


def read(path, **environment):
    """Read the file's x in a process of its own, as the programs do."""
    code = f"from hpcmlp.data.readers import open_table; print(open_table({str(path)!r}).read(0, 9)['x'].sum())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, **environment})


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_plugin_from_the_environment_is_not_loaded_for_a_foreign_filter(tmp_path):
    (tmp_path / "p.c").write_text(PLUGIN.replace("LOADED", str(tmp_path / "loaded")))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libp.so", tmp_path / "p.c"], check=True)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((4, 3))
        plan.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        data = h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4, 3)), plan)
        data.write_direct_chunk((0, 0), np.ones(12, "f4").tobytes(), 0)
    done = read(tmp_path / "a.h5", HDF5_PLUGIN_PATH=str(tmp_path))
    assert "compressed by filter 32015" in done.stderr and not (tmp_path / "loaded").exists()
    plain = f"import h5py; h5py.File({str(tmp_path / 'a.h5')!r})['x'][...]"        # libhdf5 by itself does load it
    subprocess.run([sys.executable, "-c", plain], capture_output=True,
                   env={**os.environ, "HDF5_PLUGIN_PATH": str(tmp_path)})
    assert (tmp_path / "loaded").exists()


def test_a_held_lock_is_passed_over_unless_the_environment_insists_which_is_named(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.ones((3, 3))
    with open(tmp_path / "a.h5", "r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)               # a writer elsewhere; Lustre and NFS without locks fail alike
        assert read(tmp_path / "a.h5", HDF5_USE_FILE_LOCKING="FALSE").stdout == "9.0\n"
        done = read(tmp_path / "a.h5", HDF5_USE_FILE_LOCKING="TRUE")
    assert "Unavailable: " in done.stderr and "HDF5_USE_FILE_LOCKING=TRUE insists" in done.stderr
