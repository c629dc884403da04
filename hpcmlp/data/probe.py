"""HDF5 files of strangers are opened by a child process first: libhdf5 itself crashes and loops on some damaged ones.

The guard (`data.guard`) sees what libhdf5 tells; what libhdf5 does not survive telling ends this child instead of the
ranks. The child opens every file, judges every array and reads a row of each, with limits on time and memory.
"""

import os
import signal
import sys
from collections.abc import Sequence

from hpcmlp.errors import DataError
from hpcmlp.launch import without_launcher

_START_CPU_S = 10
_FILE_CPU_S = 5
_MEMORY_BYTES = 4 << 30
_WALL_FACTOR = 10                                      # of the processor time, on a slow file system


def probe(paths: Sequence[str | os.PathLike]) -> None:
    """Raise DataError when the HDF5 library crashes or does not come to an end opening one of the files.

    Local: one rank calls it, in about 0.3 s. What is wrong with a file in ordinary ways is left to the reader to say.
    """
    if not paths:
        return
    import subprocess
    cpu_s = _START_CPU_S + _FILE_CPU_S * len(paths)
    told = b"\0".join(map(os.fsencode, [str(cpu_s), *map(os.path.abspath, paths)]))
    try:
        done = subprocess.run([sys.executable, "-P", "-m", "hpcmlp.data.probe"], stdout=subprocess.PIPE,
                              input=told, stderr=subprocess.DEVNULL, env=without_launcher(os.environ),
                              timeout=_WALL_FACTOR * cpu_s)
        code, told = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, told = None, error.stdout or b""
    if code == 0:
        return
    begun = told.count(b"\n")
    if not begun:
        raise DataError(f"{paths[0]}: the process that looks at HDF5 files first could not start (exit code {code}).")
    if code is None:
        what = f"does not come to an end opening it ({_WALL_FACTOR * cpu_s} s of waiting)"
    elif code in (-signal.SIGXCPU, -signal.SIGKILL):
        what = f"does not come to an end opening it ({cpu_s} s of processor time)"
    elif code < 0:
        what = f"crashes opening it ({signal.Signals(-code).name})"
    else:
        what = f"needs more than {_MEMORY_BYTES >> 30} GiB of memory to open it"
    raise DataError(f"{paths[begun - 1]}: the HDF5 library {what}; the file is damaged.")


def _main() -> None:
    """The child: seconds and paths stand on standard input; it prints a line before each path."""
    import resource

    from hpcmlp.data.hdf5_reader import Hdf5File
    from hpcmlp.errors import HpcmlpError
    seconds, *names = sys.stdin.buffer.read().split(b"\0")
    cpu_s = int(seconds)
    for kind, limit in ((resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_AS, _MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, hard))
    for name in names:
        print(flush=True)
        try:
            file = Hdf5File(os.fsdecode(name))
            for array in file.shapes:
                try:
                    file.read(array, 0, 1)
                except HpcmlpError:
                    pass
        except HpcmlpError:
            pass
    sys.stdout.flush()
    os._exit(0)                                        # libhdf5 may crash closing what is damaged


if __name__ == "__main__":
    _main()
