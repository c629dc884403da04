"""The harness: one suite at any number of ranks, in which a failing rank neither hangs the others nor fails unseen.

After each phase (setup, call, teardown) of a test marked `mpi` the ranks agree on the outcome, so no rank enters a
body that another has left; rank 0 alone prints. A rank that has failed while the others wait in a collective prints
its failure and aborts the job. For hangs in which no rank has failed there is pytest's faulthandler_timeout.
"""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hpcmlp import launch

REPOSITORY = Path(__file__).resolve().parent.parent
# Seconds that a failed rank waits for the others before it ends the job.
PATIENCE = float(os.environ.get("HPCMLP_TEST_PATIENCE", "5"))
MARK_KEYWORDS = {"mpi": {"min_size"}, "mpi_skip": set(), "mpi_xfail": set(), "mpi_break": set()}
MAKERS = ("Dup", "Split", "Split_type", "Create_group")    # methods of a communicator that make another
FAILED = pytest.StashKey[bool]()
LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "SLURM_")


def lending(kind):
    """Return a subclass of the communicators `kind` whose instances note in `made` what is made of them, and where.

    An MPI library has some 2,000 communicators: a suite whose tests do not give theirs back dies in the end.
    """
    class Lent(kind):
        made: list

        def note(self, new):
            caller = sys._getframe(2)
            new = Lent(new)
            new.made = self.made
            self.made.append((new, f"{caller.f_code.co_filename}:{caller.f_lineno}"))
            return new

    for name in MAKERS:
        def make(self, *given, name=name, **named):
            return self.note(getattr(kind, name)(self, *given, **named))
        setattr(Lent, name, make)
    return Lent


class Harness:
    """The ranks of this pytest run and how they agree: registered as a plugin when MPI tests run."""

    def __init__(self):
        self.world = launch.open_world()     # before any test module imports NumPy: it sets the BLAS threads
        # Own communicators, so that the harness's messages can never match a test's.
        self.comm = self.world.comm.Dup()
        self.tests_comm = self.world.comm.Dup()
        self.lending = lending(type(self.world.comm))
        self.collection_errors = []

    def lend(self):
        """A communicator of all ranks, for one test."""
        lent = self.lending(self.tests_comm)
        lent.made = []
        return lent

    def gather(self, value, failure=""):
        """Return all ranks' values; end the job when this rank has failed and the others do not come."""
        request = self.comm.Ibarrier()
        give_up = time.monotonic() + PATIENCE
        pause = 1e-4
        while not request.Test():
            if failure and time.monotonic() > give_up:
                self.abort(failure)
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        return self.comm.allgather(value)

    def abort(self, failure):
        sys.__stderr__.write(f"\n--- rank {self.comm.rank} failed while others wait; the run ends ---\n{failure}\n")
        launch.end_all(self.world.comm, 1)

    def agree(self, report):
        """Make `report` what all ranks together say of this phase."""
        text = report.longreprtext if report.failed else ""
        said = self.gather((report.outcome, text), text)
        if all(outcome == said[0][0] for outcome, _ in said) and said[0][0] != "failed":
            return report
        lines = []
        for rank, (outcome, text) in enumerate(said):
            lines.append(f"--- rank {rank} of {len(said)}: {outcome} ---")
            if text:
                lines.append(text)
        report.outcome = "failed"
        report.longrepr = "\n".join(lines)
        return report

    def pytest_report_header(self):
        world = self.world
        return f"{world.size} ranks, {world.library}, {world.blas_threads} BLAS threads each ({world.threads_source})"

    def pytest_collectreport(self, report):
        if report.failed:
            self.collection_errors.append(report.longreprtext)

    def pytest_collection_finish(self, session):
        # Ranks that collected different tests would wait for one another for ever.
        digest = hashlib.sha256("\n".join(item.nodeid for item in session.items).encode()).hexdigest()
        text = "\n".join(self.collection_errors)
        said = self.gather((digest, bool(text)), text)
        if len(set(said)) > 1 and (text or not any(failed for _, failed in said)):
            self.abort(text or "the ranks collected different tests")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        if item.get_closest_marker("mpi"):
            report = self.agree(report)
            item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
        return report

    def pytest_internalerror(self, excrepr):
        if self.comm.size > 1:
            self.abort(str(excrepr))


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if not (config.getoption("--with-mpi") or config.getoption("--only-mpi")):
        return
    harness = Harness()
    config.pluginmanager.register(harness, "harness")
    # Ranks that end together would remove the same old directories of pytest's and fail over each other.
    own = Path(tempfile.gettempdir()) / f"hpcmlp-tests-of-{os.getuid()}" / f"rank-{harness.comm.rank}"
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["PYTEST_DEBUG_TEMPROOT"] = str(own)
    if harness.comm.rank > 0:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        reporter._tw._file = open(os.devnull, "w", encoding="utf-8")     # rank 0 speaks for all


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark in item.iter_markers():
            unknown = set(mark.kwargs) - MARK_KEYWORDS.get(mark.name, set(mark.kwargs))
            if unknown:
                raise pytest.UsageError(f"{item.nodeid}: the marker {mark.name!r} does not know {sorted(unknown)}")
    if config.getoption("--with-mpi"):
        return
    wanted = bool(config.getoption("--only-mpi"))
    left_out = [item for item in items if bool(item.get_closest_marker("mpi")) != wanted]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if bool(item.get_closest_marker("mpi")) == wanted]


@pytest.fixture
def comm(request):
    """All ranks of the test run: a communicator duplicated from COMM_WORLD for the tests.

    A test that passes has given back all communicators that were made of it.
    """
    harness = request.config.pluginmanager.get_plugin("harness")
    if harness is None:
        pytest.fail("a test that uses `comm` must be marked @pytest.mark.mpi")
    lent = harness.lend()
    yield lent
    kept = [where for made, where in lent.made if made]     # one that was freed is COMM_NULL
    if kept and not request.node.stash[FAILED]:
        pytest.fail("communicators were not given back, made at\n" + "\n".join(kept), pytrace=False)


@pytest.fixture(scope="module")
def device():
    """The emulated GPU; a test that uses it is skipped where no compiler builds its kernels."""
    from hpcmlp.errors import Unavailable  # after `open_world`
    from hpcmlp.ops.emulated import EmulatedDevice
    try:
        return EmulatedDevice()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def given_back(request, comm):
    """A function that returns what it is given; its `free` is called when the test has ended, last things first.

    `how` names another method. Not after a failure: the ranks may have come to different places, and it is collective.
    """
    ends = []

    def keep(thing, how="free"):
        ends.append(getattr(thing, how))
        return thing
    yield keep
    if not request.node.stash[FAILED]:
        for end in reversed(ends):
            end()


@pytest.fixture
def topology(comm, given_back):
    """The topology of all ranks."""
    from hpcmlp.comm.topology import Topology
    return given_back(Topology(comm))


@pytest.fixture
def nodes_of(comm, given_back):
    """A function that returns a topology which pretends that every `per_node` ranks are a node of their own."""
    from hpcmlp.comm.topology import Topology

    def pretend(per_node):
        made = Topology(comm)
        made.free()
        made.node = comm.Split(comm.rank // per_node, comm.rank)
        made.local_rank, made.local_size = made.node.rank, made.node.size
        made.cross = comm.Split(made.local_rank, comm.rank)
        made.cross_rank, made.cross_size = made.cross.rank, made.cross.size
        made.num_nodes = -(-comm.size // per_node)
        return given_back(made)
    return pretend


FAKE_CUPY = '''
import ctypes, os
wrong = int(os.environ.get("FAKE_WRONG", "0"))
class runtime:
    deviceSynchronize = staticmethod(lambda: None)
class Device:
    def __init__(self, number):
        assert number < int(os.environ.get("FAKE_GPUS", "1")), "no such GPU"
    use = lambda self: None
class cuda:
    runtime, Device = runtime, Device
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


@pytest.fixture(scope="session")
def fake_cupy(tmp_path_factory):
    """A folder for PYTHONPATH with as much of CuPy as the child uses that tries messages from GPU memory.

    Its arrays are the host's. In the environment FAKE_WRONG is the length of those whose numbers change on their way,
    FAKE_GPUS how many GPUs there are (1).
    """
    folder = tmp_path_factory.mktemp("cupy")
    (folder / "cupy.py").write_text(FAKE_CUPY)
    return folder


def find_mpiexec():
    """Return the launcher: $MPIEXEC, else the one beside this Python, else the one in PATH."""
    given = os.environ.get("MPIEXEC")
    if given:
        return str(Path(given).resolve()) if "/" in given else given
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else "mpiexec"


def clean_environment(**changes):
    """Return the environment without what a launcher or `open_world` has set in it, then `changes` (None removes)."""
    kept = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_rmaps", "PRTE_MCA_rmaps")
    environ = {name: value for name, value in os.environ.items()
               if name.startswith(kept) or not name.startswith(LAUNCHER_PREFIXES)}
    # The last: without byte code on the disk each of some thousand starts compiles the package anew.
    for name in (*launch.BLAS_VARIABLES, *launch.YIELD_VARIABLES, "PYTHONDONTWRITEBYTECODE"):
        environ.pop(name, None)
    environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [environ.get("PYTHONPATH")])])
    for name, value in changes.items():
        environ.pop(name, None)
        if value is not None:
            environ[name] = value
    return environ


@pytest.fixture(scope="session")
def start_ranks():
    """A function that starts `python *arguments` on `ranks` ranks (0: without a launcher) and returns the process.

    start_ranks(2, "-m", "hpcmlp", "train", ..., cwd=None, env={"NAME": "value"}) -> Popen with text pipes, leader of a
    process group of its own. Whoever starts it waits for it. `within`: a command that runs the launcher, as a prefix.
    """
    def start(ranks, *arguments, cwd=None, env=None, within=()):
        command = [sys.executable, *map(str, arguments)]
        if ranks:
            command = [find_mpiexec(), "-n", str(ranks), *command]
        command = [*within, *command]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                text=True, cwd=cwd, env=clean_environment(**(env or {})), start_new_session=True)
    return start


@pytest.fixture(scope="session")
def run_ranks(start_ranks):
    """A function that runs what `start_ranks` starts to its end and returns a CompletedProcess with text output.

    run_ranks(..., timeout=60): past `timeout` seconds the processes are killed and the test fails.
    """
    def run(ranks, *arguments, timeout=60, **how):
        process = start_ranks(ranks, *arguments, **how)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"{' '.join(process.args)} did not end in {timeout} s\n{out[-4000:]}\n{err[-4000:]}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)
    return run
