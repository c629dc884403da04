"""The hosts themselves: separate, shaped, and gone when their process is gone."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

HOSTS = Path(__file__).with_name("hosts.py")


def test_hosts_share_files_and_nothing_else(run_hosts, tmp_path):
    script = """for host in n1 n2; do on $host sh -ec '
            hostname
            for kind in net pid ipc mnt uts; do readlink /proc/self/ns/$kind; done
            ls -A $TMPDIR /dev/shm; touch $TMPDIR/mine /dev/shm/mine; ls $TMPDIR /dev/shm
            touch $0/$(hostname)' "$0" || exit
    done"""
    done = run_hosts("1,1", "bash", "-c", script, tmp_path)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    first, second = words[:len(words) // 2], words[len(words) // 2:]
    assert (first[0], second[0]) == ("n1", "n2")
    assert all(":[" in word for word in first[1:6]) and not set(first[1:6]) & set(second[1:6])
    assert first[6:] == second[6:] and first.count("mine") == 2     # empty before, one file each afterwards
    assert {path.name for path in tmp_path.iterdir()} == {"n1", "n2"}


def test_hosts_have_the_cores_they_were_given(run_hosts):
    cores = sorted(os.sched_getaffinity(0))
    show = "for h in n1 n2 n3; do on $h {python} -c 'import os; print(*os.sched_getaffinity(0))'; done"
    done = run_hosts("1,1,1", "bash", "-c", show, cores=1)
    assert done.stdout.split() == [str(cores[k % len(cores)]) for k in range(3)]


def test_the_exit_code_is_the_commands(run_hosts):
    assert run_hosts("1", "bash", "-c", "exit 3").returncode == 3
    assert run_hosts("1", "bash", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_a_machine_without_the_tools_is_told_which(run_hosts):
    refused = run_hosts("1,1", "true", env={"PATH": "/nowhere"})
    if refused.returncode:      # 0 where all of them stand in /usr/sbin, which is always looked at
        assert refused.returncode == 69
        assert re.fullmatch(r"No hosts here: these programs are missing: .*unshare.*\n", refused.stderr)


def namespaces_in_use():
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/pid"):
        try:
            found.add(os.readlink(link))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_it_is_killed(start_ranks, number):
    mounts = Path("/proc/self/mounts").read_text()
    links = sorted(os.listdir("/sys/class/net"))
    show = "readlink /proc/self/ns/pid; on n1 readlink /proc/self/ns/pid; on n2 sleep 1000 & sleep 1000"
    process = start_ranks(0, HOSTS, "--hosts", 2, "--", "bash", "-c", show)
    inner = {process.stdout.readline().strip() for _ in range(2)}
    assert len(inner) == 2 and inner <= namespaces_in_use()
    os.kill(process.pid, number)
    process.communicate(timeout=20)
    assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    give_up = time.monotonic() + 10
    while inner & namespaces_in_use() and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not inner & namespaces_in_use()
    assert Path("/proc/self/mounts").read_text() == mounts
    assert sorted(os.listdir("/sys/class/net")) == links


SEND = """
import time
import numpy as np
from mpi4py import MPI
comm, data = MPI.COMM_WORLD, np.zeros(1 << 20, np.uint8)
for count in (1, 2):        # the second time counts
    comm.Barrier()
    begin = time.perf_counter()
    for _ in range(count):
        comm.Sendrecv_replace(data, 1 - comm.rank, source=1 - comm.rank)
    seconds = time.perf_counter() - begin
if comm.rank == 0:
    print(seconds)
"""


def test_a_shaped_link_has_its_rate_both_ways_at_once(run_hosts):
    done = run_hosts("1,1", "{mpiexec}", "{python}", "-c", SEND, rate="100mbit")
    assert done.returncode == 0, done.stderr
    # 128 KiB may pass as a burst; the upper limit leaves room for a busy machine
    wire = (2 * 2**20 - 2**17) * 8 / 100e6
    assert wire <= float(done.stdout) <= 3 * wire
