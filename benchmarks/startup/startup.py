"""Start-up on a slow file system: calls and seconds until a training of one step has ended.

    benchmarks/startup/startup.py --us 0 500 2000

The environment's and Python's own files stand on a file system that takes so many microseconds for every call which
names one (`slow_files.c`, preloaded; the dynamic loader's own look-ups are not seen by it). Once hpcmlp runs from that
environment, once from the bundle of jobs/bundle.sh on a disk of the node's own. With --peer-python the imports of a
PyTorch script are timed in the same way.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
TORCH = "import torch, torch.distributed, torch.utils.data"


def measure(command, library, slow, us, rounds):
    """Return (median seconds, most calls of a process, calls of all) of a command."""
    seconds, counts = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):    # the first only fills caches
            log = Path(folder, f"log{number}")
            environ = {**os.environ, "LD_PRELOAD": str(library), "SLOW_PREFIX": ":".join(slow), "SLOW_US": str(us),
                       "SLOW_LOG": str(log), "PYTHONNOUSERSITE": "1"}
            begin = time.perf_counter()
            done = subprocess.run([word.replace("{run}", f"{folder}/run{number}") for word in command], env=environ,
                                  capture_output=True, text=True)
            seconds.append(time.perf_counter() - begin)
            if done.returncode:
                raise SystemExit(f"{shlex.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
            counts.append([int(line) for line in log.read_text().split()])
    return statistics.median(seconds[1:]), max(counts[-1]), sum(counts[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--us", type=int, nargs="+", default=[0, 500, 2000])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library, local = Path(folder, "slow_files.so"), Path(folder, "local")
        source = Path(__file__).with_name("slow_files.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        environ = {**os.environ, "HPCMLP_ENV": sys.prefix, "BUNDLE": f"{folder}/bundle.tar"}
        print(subprocess.run([REPOSITORY / "jobs/bundle.sh"], cwd=REPOSITORY, env=environ, check=True, text=True,
                             capture_output=True).stdout.strip())
        local.mkdir()
        begin = time.perf_counter()
        subprocess.run(["tar", "-C", local, "-xf", f"{folder}/bundle.tar"], check=True)
        print(f"unpacked in {time.perf_counter() - begin:.1f} s")
        np.savez(f"{folder}/t.npz", x=np.zeros((256, 8), np.float32) + np.arange(256)[:, None], y=np.arange(256) % 2)
        subprocess.run([sys.executable, "-m", "hpcmlp", "prepare", f"{folder}/t.npz", "--out", f"{folder}/data"],
                       check=True, stdout=subprocess.DEVNULL)
        slow = [sys.prefix, sys.base_prefix, str(REPOSITORY / "hpcmlp")]
        train = ["-m", "hpcmlp", "train", "--data", f"{folder}/data", "--out", "{run}", "--hidden", "8", "--steps", "1",
                 "--no-test"]
        rows = {"environment": [f"{sys.prefix}/bin/mpiexec", "-n", str(args.ranks), sys.executable, *train],
                "bundle": [f"{local}/environment/bin/mpiexec", "-n", str(args.ranks),
                           f"{local}/environment/bin/python", *train]}
        if args.peer_python:
            rows["PyTorch's imports"] = [args.peer_python, "-c", TORCH]
            slow.append(str(Path(args.peer_python).resolve().parents[1]))
            slow.append(str(Path(args.peer_python).parents[1].absolute()))
        for us in args.us:
            for name, command in rows.items():
                seconds, most, every = measure(command, library, slow, us, args.rounds)
                print(f"{us:5d} us a call  {name:18} {seconds:7.2f} s  {most:6d} calls of the busiest process, {every} "
                      "of all", flush=True)


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    main()
