"""The doctor on a healthy launch, and on launches each with one fault that is really there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mpi4py import MPI

from hpcmlp.run.checkup import check_all

CORES = len(os.sched_getaffinity(0))
MPICH = MPI.Get_library_version().startswith("MPICH")
needs_two_cores = pytest.mark.skipif(CORES < 2, reason="two ranks need two cores to be healthy")
pytestmark = needs_two_cores


def examine(done):
    """The findings of a run with --json, by name; faults only when the exit code says so."""
    assert done.returncode in (0, 78), done.stdout + done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert (done.returncode == 78) == (result["faults"] > 0)
    for check in result["checks"]:
        assert check["ok"] == (not check["cure"]), check
    return {check["name"]: check for check in result["checks"]}


TIMED = {"speed", "links"}      # which neighbours on a busy machine can spoil: tested for themselves


def faults(checks):
    return {name for name, check in checks.items() if not check["ok"]} - TIMED


@pytest.fixture(scope="session")
def doctor(hpcmlp):
    """Run `hpcmlp doctor --json` and return its findings by name."""
    def run(*arguments, ranks=2, **how):
        return examine(hpcmlp("doctor", "--json", *arguments, ranks=ranks, **how))
    return run


@pytest.fixture(scope="session")
def doctor_in(run_ranks):
    """The same with Python code that runs first on each rank, `rank` being the launcher's number."""
    def run(code, ranks=2, **how):
        program = (f"import sys\nfrom hpcmlp import launch\nrank = launch.launcher_rank()\n{code}\n"
                   "from hpcmlp import cli\nsys.exit(cli.main(['doctor', '--json']))\n")
        return examine(run_ranks(ranks, "-c", program, **how))
    return run


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_healthy_launch_is_well(hpcmlp, ranks):
    for _ in range(3):      # neighbours on a busy machine can make one rank slow for once
        done = hpcmlp("doctor", ranks=ranks)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("all well\n") and not done.stderr
    assert all(line.startswith("ok ") for line in done.stdout.splitlines()[:-1])
    assert f"{ranks or 1} rank" in done.stdout


def test_a_world_of_one_under_a_launcher_of_three(hpcmlp):
    done = hpcmlp("doctor", env={"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0"})
    assert done.returncode == 78 and not done.stderr
    assert "FAULT  launcher" in done.stdout and "world of 1" in done.stdout and "srun --mpi=list" in done.stdout


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_two_mpi_libraries_in_one_process(doctor, tmp_path):
    other = tmp_path / "libmpi.so.99"
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", other], check=True)
    checks = doctor(env={"LD_PRELOAD": str(other)})
    assert faults(checks) == {"MPI library"} and str(other) in checks["MPI library"]["found"]
    assert "LD_PRELOAD" in checks["MPI library"]["cure"]


@pytest.mark.skipif(not (Path(sys.prefix) / "bin/mpiexec").exists(), reason="the MPI is not a wheel here")
def test_a_wheel_that_hides_the_modules_mpi(doctor):
    checks = doctor(env={"LOADEDMODULES": "gcc/12:openmpi/4.1.5"})
    assert faults(checks) == {"MPI module"} and "openmpi/4.1.5 is loaded" in checks["MPI module"]["found"]
    assert "pip uninstall" in checks["MPI module"]["cure"]


def test_too_many_blas_threads(doctor):
    checks = doctor(env={"OMP_NUM_THREADS": str(CORES + 1)})
    assert faults(checks) == {"BLAS threads"}
    assert f"{2 * (CORES + 1)} threads on {CORES} cores" in checks["BLAS threads"]["found"]


def test_ranks_bound_to_one_core(doctor_in):
    checks = doctor_in(f"import os\nos.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}])")
    assert "cores" in faults(checks) and "2 ranks on 1 core" in checks["cores"]["found"]
    if CORES == os.cpu_count():
        assert "--bind-to none" in checks["cores"]["cure"]


def test_more_ranks_than_cores(doctor):
    checks = doctor(ranks=CORES + 1)
    assert "cores" in faults(checks) and f"start at most {CORES}" in checks["cores"]["cure"]


def test_cores_of_the_batch_script_that_srun_does_not_pass_on(doctor):
    checks = doctor(env={"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_CPUS_PER_TASK": str(CORES + 6)})
    assert faults(checks) == {"cores"} and "SRUN_CPUS_PER_TASK" in checks["cores"]["cure"]


def test_another_version_on_one_rank(doctor_in):
    checks = doctor_in("import hpcmlp\nif rank == 1: hpcmlp.__version__ = '0.0.9'")
    assert "versions" in faults(checks) and "hpcmlp 0.0.9 there" in checks["versions"]["found"]
    assert "rank 1 " in checks["versions"]["found"]


def test_a_clock_that_is_ahead(doctor_in):
    checks = doctor_in("import time\nreal = time.time\nif rank == 1: time.time = lambda: real() + 7")
    assert "clocks" in faults(checks)
    assert "rank 1 " in checks["clocks"]["found"] and "7.0 s ahead of" in checks["clocks"]["found"]


def test_a_rank_that_multiplies_slowly(doctor_in):
    if os.uname().machine != "x86_64":
        pytest.skip("OpenBLAS has no such kernels here")
    # Kernels of 2004, without AVX: as a node of an old generation, or with a wrong setting, would have them.
    checks = doctor_in("import os\nif rank == 1: os.environ['OPENBLAS_CORETYPE'] = 'Prescott'")
    assert not checks["speed"]["ok"] and "rank 1 " in checks["speed"]["found"]


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_a_file_system_without_locks(start_ranks, run_ranks):
    strace = ("strace", "-f", "-o", "/dev/null", "-e", "trace=flock", "-e", "inject=flock:error=ENOLCK")
    if subprocess.run([*strace, "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    quiet = examine(run_ranks(0, "-m", "hpcmlp", "doctor", "--json", within=strace))
    assert not faults(quiet) and "No locks available" in quiet["file locks"]["found"]
    checks = examine(run_ranks(0, "-m", "hpcmlp", "doctor", "--json", within=strace,
                               env={"HDF5_USE_FILE_LOCKING": "TRUE"}))
    assert faults(checks) == {"file locks"} and "No locks available" in checks["file locks"]["found"]
    assert "HDF5_USE_FILE_LOCKING" in checks["file locks"]["cure"]


def test_node_memory_that_is_small(run_ranks):
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    within = ["unshare", *user, "--mount", "sh", "-ec", 'mount -t tmpfs -o size=64m tmpfs /dev/shm\nexec "$@"', "sh"]
    try:
        if subprocess.run([*within, "true"], capture_output=True).returncode:
            pytest.skip("no mount namespaces here")
    except FileNotFoundError:
        pytest.skip("no unshare program")
    checks = examine(run_ranks(2, "-m", "hpcmlp", "doctor", "--json", within=within))
    assert "node memory" in faults(checks) and "--shm-size" in checks["node memory"]["cure"]


FAKE_CUPY = '''
import ctypes, os
class runtime:
    visible = [w for w in os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",") if w]
    getDeviceCount = staticmethod(lambda: len(runtime.visible))
    getDeviceProperties = staticmethod(lambda k: {"uuid": b"gpu" + runtime.visible[k].encode()})
    deviceGetPCIBusId = staticmethod(lambda k: "0000:0" + runtime.visible[k])
    deviceSynchronize = staticmethod(lambda: None)
class cuda:
    runtime = runtime
class Array:
    """Numbers where this process may not read, as GPU memory is for an MPI that knows nothing of it."""
    def __init__(self, size):
        pointer = int(os.environ.get("FAKE_POINTER", "64"))
        if not pointer:
            self.memory = (ctypes.c_float * size)()
            pointer = ctypes.addressof(self.memory)
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "<f4", "data": (pointer, False), "version": 3}
    def get(self):
        return memoryview(self.memory)
arange = zeros = lambda size, dtype: Array(size)
'''


@pytest.fixture
def cupy(tmp_path):
    """A folder for PYTHONPATH with a CuPy whose GPUs are none."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "cupy.py").write_text(FAKE_CUPY)
    return str(folder)


def test_gpus_that_were_granted_and_are_not_visible(doctor, cupy):
    checks = doctor(env={"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": cupy})
    assert faults(checks) == {"GPUs"} and "sees none of the node's 2" in checks["GPUs"]["found"]
    import importlib.util
    if importlib.util.find_spec("cupy") is None:
        checks = doctor(env={"SLURM_GPUS_ON_NODE": "2"})
        assert faults(checks) == {"GPUs"} and "CuPy is not installed" in checks["GPUs"]["found"]


def test_two_ranks_on_one_gpu(doctor, cupy):
    checks = doctor(env={"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": cupy})
    assert faults(checks) == {"GPUs"} and "ranks 0-1 " in checks["GPUs"]["found"]
    assert "--gpus-per-task=1" in checks["GPUs"]["cure"]
    assert not faults(doctor(env={"CUDA_VISIBLE_DEVICES": "0,1", "PYTHONPATH": cupy}))


@pytest.mark.parametrize("ids, ranks", [
    ([["a", "b"], ["b"], ["c"], ["d"]], ""),            # rank 0 gives way to rank 1
    ([["a"], ["b"], ["c", "d"], ["c"]], ""),
    ([["a", "b"], ["a", "b"], ["c"], ["c"]], "ranks 2-3 (n2)"),
])
def test_gpus_are_judged_by_the_choice_that_programs_make(ids, ranks):
    facts = launch_of_four()
    for fact, own in zip(facts, ids, strict=True):
        fact["gpu"] = {**fact["gpu"], "installed": 2, "cupy": True, "ids": own}
    found = [finding for finding in check_all(facts) if not finding.ok]
    assert [finding.name for finding in found] == (["GPUs"] if ranks else [])
    assert not ranks or ranks in found[0].found and "--gpus-per-task=1" in found[0].cure


@pytest.mark.skipif(not MPICH, reason="the claim is MPICH's")
def test_a_claim_of_messages_from_gpu_memory_that_is_false(doctor, cupy):
    claim = {"MPICH_GPU_SUPPORT_ENABLED": "1", "PYTHONPATH": cupy, "CUDA_VISIBLE_DEVICES": "0,1"}
    checks = doctor(env=claim)
    assert faults(checks) == {"CUDA-aware MPI"}
    assert "MPICH_GPU_SUPPORT_ENABLED=1" in checks["CUDA-aware MPI"]["found"]
    true = doctor(env={**claim, "FAKE_POINTER": "0"})
    assert not faults(true) and "true" in true["CUDA-aware MPI"]["found"]


def test_a_directory_that_is_not_there(hpcmlp):
    done = hpcmlp("doctor", "--dir", "nowhere", ranks=2)
    assert done.returncode == 66 and "nowhere: no such directory" in done.stderr and done.stderr.count("\n") == 1


HEALTHY = {"host": "n1", "expected": 4, "variable": "PMI_SIZE", "launch_error": "", "mpi_paths": ["/mpi/libmpi.so.12"],
           "prefix": "/env", "mpi_modules": [], "versions": {"hpcmlp": "1"}, "library": "MPICH 5", "cores": [0, 1],
           "node_cores": 2, "quota": None, "cores_granted": None, "threads": 1, "shm_bytes": 2**34, "shm_advice": "",
           "lock_error": "", "locks_wanted": False, "leader": 0, "thread_level": "serialized", "clock_s": 0.0,
           "gflops": 50.0, "link_rate": 1e9, "device_claims": [], "device_probe": None,
           "gpu": {"installed": 0, "granted": 0, "visible": None, "cupy": False, "ids": [], "error": ""}}


def launch_of_four(**odd):
    """Facts of two nodes with two ranks each; `odd`: what rank 3 has otherwise."""
    places = [{"host": "n1", "leader": 0}, {"host": "n1", "leader": 0}, {"host": "n2", "leader": 2},
              {"host": "n2", "leader": 2}]
    facts = [{**HEALTHY, **place} for place in places]
    facts[3].update(odd)
    return facts


@pytest.mark.parametrize("odd, name, words", [
    ({"thread_level": "single"}, "MPI threads", "rank 3 (n2)"),
    ({"library": "MPICH 4"}, "versions", "MPI MPICH 4 there, MPICH 5 on rank 0"),
    ({"host": "n1", "leader": 3}, "launcher", "share no memory"),
    ({"quota": 0.5}, None, None),
])
def test_faults_between_nodes(odd, name, words):
    assert all(finding.ok for finding in check_all(launch_of_four()))
    found = [finding for finding in check_all(launch_of_four(**odd)) if not finding.ok]
    assert [finding.name for finding in found] == ([name] if name else [])
    assert not name or words in found[0].found


def test_a_slow_link_between_nodes_is_named_with_its_hosts():
    facts = [{**HEALTHY, "host": f"n{rank + 1}", "leader": rank, "link_rate": 1e8} for rank in range(4)]
    facts[2]["link_rate"] = 1e7
    found = [finding for finding in check_all(facts) if not finding.ok]
    assert [finding.name for finding in found] == ["links"] and "n2 -> n3 10 MB/s" in found[0].found
