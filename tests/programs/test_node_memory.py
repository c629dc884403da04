"""Node memory turned against a run: too small, full, read-only, missing, shared by two jobs, left behind by a kill."""

import json
import os
import signal
import subprocess
import time

import pytest
from mpi4py import MPI

from hpcmlp import node_memory

TRAIN = ("--hidden", "16,16", "--steps", 12, "--global-batch-size", 32, "--no-test", "--log-every", 1)
# The network's vectors at 2 ranks take 3 x 2.2 MB: more than is left in 6 MB.
WIDE = ("--hidden", "700,700", "--steps", 5, "--global-batch-size", 32, "--no-test", "--log-every", 1)
MPICH = MPI.Get_library_version().startswith("MPICH")
NO_SHM = """T=/mnt; mount -t tmpfs tmpfs "$T"; mkdir "$T/pts"; ln -s /proc/self/fd "$T/fd"
for n in null zero full random urandom tty; do : >"$T/$n"; mount --bind "/dev/$n" "$T/$n"; done
mount --rbind /dev/pts "$T/pts"; mount --rbind "$T" /dev"""


@pytest.fixture(scope="session")
def small_shm():
    """A function that returns the command prefix for a mount namespace with a /dev/shm of its own (or none)."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    unshare = ["unshare", *user, "--mount", "sh", "-c"]
    try:
        done = subprocess.run([*unshare, "mount -t tmpfs tmpfs /dev/shm"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare program")
    if done.returncode != 0:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")

    def prefix(options):
        mounts = NO_SHM if options == "none" else f"mount -t tmpfs -o {options} tmpfs /dev/shm"
        return [*unshare, f'set -e\n{mounts}\nexec "$@"', "sh"]
    return prefix


def losses(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["kind"] == "step"]


def parameters(run):
    return json.loads((run / "summary.json").read_text())["parameters_sha256"]


@pytest.fixture(scope="module")
def undisturbed(flowers, hpcmlp, tmp_path_factory):
    """Runs that nothing disturbs: name -> run directory."""
    folder = tmp_path_factory.mktemp("undisturbed")
    wide = {name: (*WIDE, "--sync", name) for name in ("ring", "native")}
    for name, options in {"shared": TRAIN, **wide}.items():
        done = hpcmlp("train", "--data", flowers, "--out", folder / name, *options, ranks=2)
        assert done.returncode == 0, done.stderr
        assert f"sync {name}" in done.stdout
    return folder


@pytest.mark.parametrize("options", ["size=6m", "ro", "none"])
def test_without_enough_of_it_messages_are_sent_and_the_result_is_right(undisturbed, flowers, hpcmlp, small_shm,
                                                                       tmp_path, options):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *WIDE, ranks=2, within=small_shm(options))
    if MPICH and options in ("ro", "none"):     # it does not start there at all
        assert done.returncode == 69, done.stderr
        assert done.stderr.count("hpcmlp: ") == 1 and "MPICH needs 2.2 MB of shared memory" in done.stderr
        assert {"ro": "cannot be written", "none": "there is no /dev/shm"}[options] in done.stderr
        return
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if "instead of shared" in line]
    assert len(notes) == 1 and "/dev/shm" in notes[0]
    assert {"size=6m": "make it larger", "ro": "cannot be written", "none": "there is no"}[options] in notes[0]
    taken = "ring" if "sync ring" in done.stdout.split("device")[0] else "native"      # by trial
    assert parameters(tmp_path / "run") == parameters(undisturbed / taken)


def test_a_server_without_room_sends_messages_and_ends_with_the_same_bits(flowers, hpcmlp, small_shm, tmp_path):
    runs = {"in node memory": (), "by messages": small_shm("size=6m")}
    for way, within in runs.items():
        done = hpcmlp("train", "--data", flowers, "--out", tmp_path / way, *WIDE, "--sync", "server", ranks=3,
                      within=within)
        assert done.returncode == 0, done.stderr
        assert f"sync server ({way})" in done.stdout
        assert ("server by messages instead of node memory: /dev/shm" in done.stdout) == (way == "by messages")
    assert parameters(tmp_path / "in node memory") == parameters(tmp_path / "by messages")


@pytest.mark.skipif(not MPICH, reason="Open MPI starts without")
@pytest.mark.parametrize("ranks", [None, 3])
def test_what_mpich_cannot_start_in_is_said_before_it_dies(hpcmlp, small_shm, tmp_path, ranks):
    start = time.monotonic()
    done = hpcmlp("inspect", tmp_path, ranks=ranks, within=small_shm("size=1m"))
    assert done.returncode == 69, done.stderr
    assert "/dev/shm has 1.0 MB free" in done.stderr and "Bus error" not in done.stderr
    assert time.monotonic() - start < 10


@pytest.mark.skipif(not MPICH, reason="a fault of UCX under MPICH")
def test_ucx_does_without_what_would_do_for_some_ranks_only(run_ranks, small_shm):
    done = run_ranks(3, "-c", "from hpcmlp import launch; launch.open_world().comm.Barrier(); print('right')",
                     within=small_shm("size=18m"))
    assert done.returncode == 0 and done.stdout.count("right") == 3, done.stdout + done.stderr


@pytest.mark.skipif(not MPICH, reason="Open MPI starts without")
def test_one_node_that_cannot_start_ends_the_job_of_all(run_ranks, tmp_path):
    """Rank 1 plays a node of its own, on which /dev/shm is too small; the others wait for it inside MPI_Init."""
    (tmp_path / "program.py").write_text(
        "import os, sys\nfrom hpcmlp import cli, node_memory\n"
        "if os.environ['PMI_RANK'] == '1':\n"
        "    os.environ['MPI_LOCALRANKID'] = '0'\n    node_memory.free_bytes = lambda: 0\n"
        f"sys.exit(cli.main(['inspect', {str(tmp_path)!r}]))")
    done = run_ranks(3, tmp_path / "program.py", timeout=20)
    assert done.returncode == 69 and "MPICH needs" in done.stderr


FULL = """
import os, sys
import numpy as np
from hpcmlp import launch, node_memory
world = launch.open_world()
from hpcmlp.comm import Topology, open_exchange, shared

def fill(window):
    # Another program is quicker than we are, once the MPI library has made a window of some size.
    if world.rank == 0 and window.stop - window.start > 1_000_000:
        file = os.open("/dev/shm/another", os.O_CREAT | os.O_WRONLY)
        os.posix_fallocate(file, 0, node_memory.free_bytes() - 500_000)
        os.close(file)
    world.comm.Barrier()
    missing = honest(window)
    world.comm.Barrier()
    if world.rank == 0 and os.path.exists("/dev/shm/another"):
        os.unlink("/dev/shm/another")
    return missing

honest, shared._Window.fill = shared._Window.fill, fill
for _ in range(8):      # the collectives of this program, as `Shared` does with its own
    world.comm.Barrier()
for turn in range(3):
    world.comm.Barrier()
    before = node_memory.free_bytes()
    world.comm.Barrier()
    exchange = open_exchange("shared", Topology(world.comm), 1_000_000, np.float32)
    world.comm.Barrier()
    after = node_memory.free_bytes()
    world.comm.Barrier()
    exchange.grads[:] = world.rank + 1
    exchange.collective.all_reduce(exchange.grads)
    assert (exchange.grads == world.size * (world.size + 1) / 2).all()
    assert exchange.name == "ring" and "another program took" in exchange.note, exchange.note
    assert turn == 0 or before - after < 300_000, (before, after)    # what had been taken was given back
    exchange.collective.free()
print("right", flush=True)
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_memory_that_is_taken_between_question_and_first_touch_is_no_bus_error(run_ranks, small_shm, ranks):
    done = run_ranks(ranks, "-c", FULL, within=small_shm("size=64m"), timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == ranks


@pytest.mark.skipif(MPICH, reason="MPICH allocates without asking for the space")
def test_what_the_library_finds_too_small_ends_the_job_in_one_sentence(flowers, run_ranks, small_shm, tmp_path):
    """Its first rank fails and the others wait inside the call: they cannot agree on the ring any more."""
    (tmp_path / "program.py").write_text(
        "import sys\nfrom hpcmlp import cli, node_memory\nnode_memory.free_bytes = lambda: 1 << 40\n"
        "sys.exit(cli.main(sys.argv[1:]))")
    done = run_ranks(2, tmp_path / "program.py", "train", "--data", flowers, "--out", tmp_path / "run", *WIDE,
                     within=small_shm("size=4m"), timeout=30)
    assert done.returncode == 69, done.stderr
    assert "cannot be allocated" in done.stderr and "give --sync ring" in done.stderr


def test_two_jobs_on_one_node_do_not_meet(undisturbed, flowers, start_hpcmlp, tmp_path):
    jobs = [start_hpcmlp("train", "--data", flowers, "--out", tmp_path / name, *TRAIN, ranks=2) for name in "ab"]
    for job in jobs:
        _, err = job.communicate(timeout=120)
        assert job.returncode == 0, err
    for name in "ab":
        assert parameters(tmp_path / name) == parameters(undisturbed / "shared")
        assert losses(tmp_path / name) == losses(undisturbed / "shared")


def all_below(pid):
    """The process and all that it has started."""
    found = [pid]
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            for child in file.read().split():
                found += all_below(int(child))
    return found


def test_a_job_killed_with_its_launcher_leaves_next_to_nothing_and_the_next_one_runs(
        undisturbed, flowers, hpcmlp, start_hpcmlp, tmp_path):
    before = node_memory.leftovers()[0]
    job = start_hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--hidden", "700,700", "--epochs", 10_000,
                       "--no-test", "--log-every", 1, ranks=2)
    log = tmp_path / "run/metrics.jsonl"
    give_up = time.monotonic() + 60
    while not (log.exists() and '"step"' in log.read_text()) and time.monotonic() < give_up:
        time.sleep(0.05)
    pids = all_below(job.pid)
    assert len(pids) >= 3
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    job.communicate(timeout=20)
    # A job beside this one may have made a file a moment ago that it has not mapped yet.
    left, give_up = {}, time.monotonic() + 10
    while time.monotonic() < give_up:
        left = {name: size for name, size in node_memory.leftovers()[0].items() if name not in before}
        # MPICH: nothing. Open MPI needs the names of its segments for as long as it runs: 0.1 MB a rank.
        if sum(left.values()) <= (0 if MPICH else 300_000):
            break
        time.sleep(0.2)
    else:
        pytest.fail(f"left over: {left}")
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "next", *TRAIN, ranks=2)
    assert done.returncode == 0, done.stderr
    assert parameters(tmp_path / "next") == parameters(undisturbed / "shared")
    for name in left:
        os.unlink(f"{node_memory.FOLDER}/{name}")


def test_leftovers_are_told_from_files_in_use(tmp_path):
    for name, size in (("mpich_shm_1_0", 8192), ("sm_segment.host.0.1", 4096), ("notes.txt", 4096)):
        (tmp_path / name).write_bytes(bytes(size))
    folder = str(tmp_path)
    assert node_memory.leftovers(folder) == ({"mpich_shm_1_0": 8192, "sm_segment.host.0.1": 4096}, {})
    text = node_memory.advice(folder)
    assert "your 2 files that no process uses any more" in text and f"{folder}/mpich_shm_1_0" in text
    import mmap
    with open(tmp_path / "mpich_shm_1_0", "r+b") as file, mmap.mmap(file.fileno(), 0):
        assert node_memory.leftovers(folder) == ({"sm_segment.host.0.1": 4096}, {})
        node_memory.drop_names("mpich_shm_", folder)
    assert sorted(os.listdir(folder)) == ["notes.txt", "sm_segment.host.0.1"]
    assert "there is no" in node_memory.advice(str(tmp_path / "none"))
