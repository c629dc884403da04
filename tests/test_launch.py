"""What is decided before NumPy and MPI load, and what starting costs."""

import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from hpcmlp import launch

REPOSITORY = Path(__file__).resolve().parent.parent
SHOW = """
import sys
from hpcmlp import launch
assert "numpy" not in sys.modules
world = launch.open_world()
assert "numpy" not in sys.modules
import os
sys.stdout.write(" ".join(map(str, (world.rank, world.size, world.blas_threads, os.environ["OPENBLAS_NUM_THREADS"],
                 world.oversubscribed, world.thread_level, os.environ.get("MPIR_CVAR_ENABLE_HEAVY_YIELD", "unset"),
                 os.environ["HDF5_USE_FILE_LOCKING"]))) + "\\n")
"""


def shown(result):
    assert result.returncode == 0, result.stderr
    return [line.split() for line in sorted(result.stdout.strip().split("\n"))]


@pytest.mark.parametrize("cores, holders, expected", [
    ({0}, [1], 1.0),                            # bound to a core of its own
    ({0, 1}, [2, 2], 1.0),                      # two ranks on two cores, not bound
    ({0, 1}, [1, 1], 2.0),                      # alone
    ({0, 1, 2, 3}, [3, 3, 3, 3], 4 / 3),
    ({4, 5}, [0, 0, 0, 0, 1, 1], 2.0),          # a mask that is already this rank's: not divided again
    ({0, 1, 2}, [1, 1, 2, 1], 2.5),             # masks that overlap in one core
])
def test_cores_fall_to_the_ranks_that_may_use_them(cores, holders, expected):
    assert launch.share_of_cores(frozenset(cores), holders) == pytest.approx(expected)


def test_threads_follow_the_share_unless_the_user_has_set_them():
    assert launch.choose_threads({}, 0.5)[0] == 1
    assert launch.choose_threads({}, 4 / 3)[0] == 1
    assert launch.choose_threads({}, 3 * (1 / 3))[0] == 1
    assert launch.choose_threads({}, 7.9999999)[0] == 8
    assert launch.choose_threads({"OMP_NUM_THREADS": "3"}, 8.0) == (3, "OMP_NUM_THREADS is set")
    assert launch.choose_threads({"OMP_NUM_THREADS": "3,2"}, 8.0)[0] == 3
    assert launch.choose_threads({"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "3"}, 8.0)[0] == 2
    assert launch.choose_threads({"OMP_NUM_THREADS": "no"}, 8.0)[0] == 8
    assert "NumPy was loaded" in launch.choose_threads({}, 8.0, numpy_loaded=True)[1]


def test_a_child_is_no_rank_but_has_the_settings_of_the_library():
    """The launcher's: of MPICH, of Open MPI 5, and of Open MPI 4, whose mpirun forbids processes of their own."""
    told = ("PMI_RANK", "PMI_FD", "MPI_LOCALNRANKS", "HYDI_CONTROL_FD", "PMIX_RANK", "PRTE_LAUNCHED", "SLURM_PROCID",
            "OMPI_COMM_WORLD_RANK", "OMPI_MCA_ess", "OMPI_MCA_ess_base_vpid", "OMPI_MCA_pmix", "OMPI_MCA_orte_hnp_uri")
    kept = {"PATH": "/bin", "OMPI_MCA_opal_cuda_support": "1", "OMPI_MCA_osc": "^ucx", "MPICH_GPU_SUPPORT_ENABLED": "1",
            "MPIR_CVAR_ENABLE_GPU": "1", "MPI4PY_LIBMPI": "libmpi.so"}
    assert launch.without_launcher(dict.fromkeys(told, "1") | kept) == kept


SLURM_STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}


@pytest.mark.parametrize("environ, size", [
    ({}, None),
    ({"PMI_SIZE": "4", "PMI_RANK": "1"}, 4),
    ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
    (SLURM_STEP, 4),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),                         # python in a batch script
    ({**SLURM_STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, None),  # shell of an allocation
    ({**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "4", "PMI_RANK": "0"}, 4),  # the step counts daemons
    ({**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, 4),
    ({**SLURM_STEP, "PMIX_RANK": "1"}, 4),                                      # srun --mpi=pmix
    ({"PMI_SIZE": "many"}, None),
])
def test_number_of_ranks_that_the_launcher_started(environ, size):
    assert launch.launcher_size(environ)[0] == size


@pytest.mark.parametrize("files, quota", [
    ({}, None),
    ({"cpu.max": "max 100000\n"}, None),
    ({"cpu.max": "150000 100000\n"}, 1.5),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
    ({"cpu.max": "what\n"}, None),
])
def test_quota_of_a_container(tmp_path, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert launch.cpu_quota(str(tmp_path)) == quota


def test_two_ranks_share_the_cores(run_ranks):
    cores = len(os.sched_getaffinity(0))
    lines = shown(run_ranks(2, "-c", SHOW))
    assert [line[:2] for line in lines] == [["0", "2"], ["1", "2"]]
    threads = str(max(1, cores // 2))
    for line in lines:
        assert line[2:4] == [threads, threads]
        assert line[7] == "FALSE"
    if cores >= 2 and launch.cpu_quota() is None:
        assert all(line[4:7] == ["False", "serialized", "unset"] for line in lines)


def test_more_ranks_than_cores_yield(run_ranks):
    cores = len(os.sched_getaffinity(0))
    if cores > 8:
        pytest.skip(f"would need {cores + 1} ranks")
    for line in shown(run_ranks(cores + 1, "-c", SHOW)):
        assert line[2] == "1" and line[4:7] == ["True", "multiple", "1"]


def test_values_that_the_user_has_set_are_kept(run_ranks):
    environ = {"OPENBLAS_NUM_THREADS": "3", "HDF5_USE_FILE_LOCKING": "BEST_EFFORT", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "0"}
    for line in shown(run_ranks(2, "-c", SHOW, env=environ)):
        assert line[2:4] == ["3", "3"] and line[6:] == ["0", "BEST_EFFORT"]


def test_ranks_that_the_launcher_binds_do_not_yield(run_ranks):
    # Each rank takes one core for itself before it starts, as a binding launcher does.
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 or launch.cpu_quota() is not None:
        pytest.skip("needs two cores")
    bind = "import os; os.sched_setaffinity(0, {" + repr(cores[:2]) + "[int(os.environ['PMI_RANK'])]})\n"
    result = run_ranks(2, "-c", "import os\nif 'PMI_RANK' not in os.environ: raise SystemExit\n" + bind + SHOW)
    if not result.stdout:
        pytest.skip("this launcher does not set PMI_RANK")
    for line in shown(result):
        assert line[2] == "1" and line[4:7] == ["False", "serialized", "unset"]


def test_launcher_that_does_not_fit_the_library_is_refused_in_one_sentence(run_ranks, tmp_path):
    # What a rank sees under a foreign launcher: it says 2 ranks, MPI says a world of 1.
    result = run_ranks(0, "-m", "hpcmlp", "train", "--data", tmp_path, "--out", tmp_path / "run",
                       env={"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"})
    assert result.returncode == 78 and result.stdout == ""
    assert len(result.stderr.strip().split("\n")) == 1
    assert "started 2 ranks" in result.stderr and "world of 1" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()
    other = run_ranks(0, "-m", "hpcmlp", "train", "--data", tmp_path, "--out", tmp_path / "run",
                      env={"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"})
    assert other.returncode == 78 and other.stderr == ""        # rank 0 speaks for all


def test_no_mpi_library_is_said_in_one_sentence(run_ranks, tmp_path):
    (tmp_path / "libmpi.so.12").write_text("not a library")
    result = run_ranks(0, "-m", "hpcmlp", "train", "--data", tmp_path, "--out", tmp_path / "run",
                       env={"MPI4PY_LIBMPI": str(tmp_path / "libmpi.so.12")})
    assert result.returncode == 78
    assert "No MPI library can be opened" in result.stderr and len(result.stderr.strip().split("\n")) == 1


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["train", "--no-such-option"]])
def test_help_and_wrong_usage_start_no_mpi(run_ranks, arguments):
    code = ("import sys\nfrom hpcmlp.cli import main\ntry:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n"
            "    code = end.code\nassert not {'mpi4py', 'numpy', 'h5py'} & set(sys.modules)\nsys.exit(code)\n")
    result = run_ranks(0, "-c", code, *arguments)
    assert result.returncode == (2 if "--no-such-option" in arguments else 0), result.stderr


def test_end_all_ends_every_rank_and_what_was_printed_is_not_lost(run_ranks):
    code = ("from hpcmlp import launch\nw = launch.open_world()\nimport sys\n"
            "if w.rank == 1:\n    sys.stdout.write('last words\\n')\n    launch.end_all(w.comm, 70)\n"
            "w.comm.Barrier()\n")
    result = run_ranks(2, "-c", code, timeout=30)
    assert result.returncode == 70 and "last words" in result.stdout
    alone = run_ranks(0, "-c", "from hpcmlp import launch\nprint('alone')\nlaunch.end_all(None, 71)")
    assert alone.returncode == 71 and "alone" in alone.stdout


def test_h5py_starts_no_process(run_ranks):
    code = ("import sys\nfrom hpcmlp import launch\nlaunch.open_world()\n"
            "def hook(event, args):\n    assert event not in ('subprocess.Popen', 'os.fork', 'os.posix_spawn'), args\n"
            "sys.addaudithook(hook)\nimport h5py\n")
    result = run_ranks(0, "-c", code)
    assert result.returncode == 0, result.stderr


MAX_CALLS = 1250
# Folders that glibc's loader tries beside every library folder, more of them the more the processor can do.
OF_THE_PROCESSOR = re.compile(r"/(?:tls|haswell|xeon_phi|avx512_1|x86_64|glibc-hwcaps)(?:/|$)")


def test_a_rank_is_ready_after_few_calls_to_the_installation(run_ranks, tmp_path):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    import numpy as np
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "t.npz", x=rng.standard_normal((200, 4)).astype(np.float32), y=rng.integers(0, 2, 200))
    result = run_ranks(0, "-m", "hpcmlp", "prepare", tmp_path / "t.npz", "--out", tmp_path / "data", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    train = ["-m", "hpcmlp", "train", "--data", "data", "--hidden", "8", "--steps", "3", "--no-test", "--out"]
    # So that all byte code is there and fresh: a stale file costs one more call each, a missing one several.
    result = run_ranks(2, *train, "run0", cwd=tmp_path, env={"PYTHONDONTWRITEBYTECODE": None})
    assert result.returncode == 0, result.stderr
    # Each rank under its own strace; rank 0 has the log, the pictures and the checkpoints besides.
    script = ("import os, sys\nfrom hpcmlp.launch import launcher_rank\nos.execvp('strace', ['strace', '-f', '-e', "
              "'trace=%file', '-o', f'calls.{launcher_rank()}', sys.executable, *sys.argv[1:]])")
    # A path in PYTHONPATH costs one more call for each import; an installed package does without.
    installed = run_ranks(0, "-c", "import hpcmlp", cwd=tmp_path, env={"PYTHONPATH": None}).returncode == 0
    result = run_ranks(2, "-c", script, *train, "run", cwd=tmp_path, env={"PYTHONPATH": None} if installed else {})
    if "ptrace" in result.stderr:
        pytest.skip("strace may not trace here")
    assert result.returncode == 0, result.stderr
    groups = count_calls(tmp_path / "calls.1")
    calls = sum(groups.values())
    assert calls <= MAX_CALLS, f"{calls} calls by rank 1, most of them in {groups.most_common(40)}"


def test_a_run_writes_nothing_into_the_home_directory(run_ranks, tmp_path):
    import numpy as np
    home = tmp_path / "home"
    home.mkdir()
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "t.npz", x=rng.standard_normal((200, 4)).astype(np.float32), y=rng.integers(0, 2, 200))
    unset = dict.fromkeys(("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"))
    for ranks, words in ((0, ("prepare", "t.npz", "--out", "data")),
                         (2, ("train", "--data", "data", "--out", "run", "--hidden", "8", "--epochs", "2")),
                         (2, ("evaluate", "run")), (0, ("report", "run"))):
        done = run_ranks(ranks, "-m", "hpcmlp", *words, cwd=tmp_path, env={"HOME": str(home), **unset})
        assert done.returncode == 0, done.stderr
        assert not list(home.rglob("*")), f"{words[0]} has written {list(home.rglob('*'))}"


def count_calls(path):
    """Count the calls that name a file of Python, of its packages or of ours, by the file's folder."""
    prefixes = tuple({str(Path(p).resolve()) + "/" for p in (sys.prefix, sys.base_prefix, REPOSITORY / "hpcmlp")}
                     | {sys.prefix + "/", str(REPOSITORY / "hpcmlp") + "/"})
    groups = Counter()
    # The rank is ready to train when it has opened its last training shard: the first step follows.
    ready = path.read_text(errors="replace").rpartition("/train-0")[0]
    assert ready, "no training shard was opened"
    for line in ready.split("\n"):
        match = re.search(r'\b\w+\((?:AT_FDCWD, )?"([^"]*)"', line)
        if match and match[1].startswith(prefixes) and not OF_THE_PROCESSOR.search(match[1]):
            groups[match[1].rpartition("/")[0][-40:]] += 1
    return groups


def test_open_mpis_launcher_with_another_library_is_one_sentence(run_ranks):
    which = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    if "Open MPI" in run_ranks(0, "-c", which).stdout:
        pytest.skip("this Python's library belongs to that launcher")
    result = run_ranks(0, "-m", "hpcmlp", "bench", "gemm", env={"OMPI_COMM_WORLD_SIZE": "2",
                                                                "OMPI_COMM_WORLD_RANK": "0"})
    assert result.returncode == 78 and "The launcher started 2 ranks" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("text, counts", [("2(x3)", [2, 2, 2]), ("3(x2),1", [3, 3, 1]), ("4", [4]), ("", []),
                                          ("2(x3", [2, 2, 2]), ("two", []), ("2(xx)", [])])
def test_slurms_short_form_of_tasks_per_node(text, counts):
    assert launch.tasks_per_node(text) == counts
