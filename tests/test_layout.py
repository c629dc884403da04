"""The house as design.md draws it: who imports whom and what, opening sentences, no pickles."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "hpcmlp"

# Left may not import right. Folders that share a place do not import each other.
LAYERS = [("errors",), ("node_memory",), ("traffic",), ("launch",), ("ops",), ("nn", "comm", "data"), ("sync",),
          ("plan",), ("run",), ("programs",), ("cli",), ("__main__",)]
# Within a folder a module imports only what stands before it; the folder's own name is its __init__.
INSIDE = {
    "ops": "counter activations losses gpu_places staging device_sums plain blocked _fused host device cublaslt "
           "candidates launches small_products emulated gpu_device ops",
    "nn": "nn layout losses network planned_forward planned initializers optimizers schedules metrics auc",
    "comm": "exact_sum messages reach topology agreement survive prepared ring wire ring_wire native nccl shared "
            "choice served served_node post comm",
    "data": "data files links guard layouts tables csv_numbers manifest order device_order arrays csv_reader "
            "hdf5_reader idx_reader npz_reader parquet_reader probe readers row_file splits statistics download "
            "sources targets preprocess cleaning selection summary shards describe samples resident streamed loader",
    "sync": "buckets control memory strategy narrow overlap sync step sharded planned device_step local ledger "
            "storage tasks server",
    "plan": "plan workload record machine profiles demand events scaling outlook compare text picture job fit",
    "run": "run memory faults signals signs lateness beacon watchdog sealed pieces state_file writer checkpoint "
           "directory coordinator options session slices numbers checkup gpus child device_messages on_device parts "
           "waiting account forecast roc evaluation together judge record elastic curves trace timeline io_rates "
           "device_rates facts speeds calibrate",
    "programs": "programs prepare train evaluate predict inspect report plan bench doctor launch",
}
# config stands beside the row: it imports errors only, and programs and cli alone import it.
CONFIG_USERS = ("programs", "cli", "config")
EXTENSIONS = {"hpcmlp.ops._fused"}      # compiled, optional

MAY_IMPORT = {
    "mpi4py": ("launch", "comm", "sync", "programs"),
    "h5py": ("data", "run.state_file"),
    "cupy": ("ops", "comm.nccl"),
}
ONLY_INSIDE_FUNCTIONS = {"matplotlib", "tqdm", "pyarrow", "sklearn", "CoolProp", "hdf5plugin", "numcodecs", "cupy"}
NOT_IN_NN = {"os", "io", "pathlib", "shutil", "tempfile", "glob", "time", "datetime", "socket", "subprocess", "h5py",
             "mpi4py", "threading"}
PICKLES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
PICKLING_CALLS = {"bcast", "allgather", "allreduce", "isend", "irecv", "sendrecv", "alltoall"}    # lower-case mpi4py


def find_modules():
    """Return module name -> parsed source, for the whole package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


MODULES = find_modules()
KNOWN = set(MODULES) | EXTENSIONS


def short(name):
    return name.removeprefix("hpcmlp").removeprefix(".")


def imports(tree):
    """Yield (imported module, line), late imports inside functions included; relative ones are an error."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name of the module"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in KNOWN else node.module), node.lineno


def place(name):
    """Return (number of the layer, number inside the folder) of a module."""
    folder, _, module = short(name).partition(".")
    for number, layer in enumerate(LAYERS):
        if folder in layer:
            if folder not in INSIDE:
                return number, 0
            return number, INSIDE[folder].split().index(module or folder)
    raise ValueError(f"{name} has no place in the order: give it one in tests/test_layout.py")


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("hpcmlp", "hpcmlp.config")])
def test_module_imports_only_what_stands_before_it(name):
    layer, inside = place(name)
    folder = short(name).partition(".")[0]
    for imported, line in imports(MODULES[name]):
        if imported.partition(".")[0] != "hpcmlp" or imported == "hpcmlp":
            continue
        where = f"{name} line {line} imports {imported}"
        if imported == "hpcmlp.config":
            assert folder in CONFIG_USERS, where + ": only programs and cli may"
            continue
        other_layer, other_inside = place(imported)
        if short(imported).partition(".")[0] == folder:
            assert imported == name or other_inside < inside, where + ", which does not stand before it in its folder"
        else:
            assert other_layer < layer, where + ", which does not stand in a layer below"


def test_config_and_package_import_almost_nothing():
    inner = {imported for imported, _ in imports(MODULES["hpcmlp.config"]) if imported.startswith("hpcmlp")}
    assert inner <= {"hpcmlp.errors", "hpcmlp"}
    assert not list(imports(MODULES["hpcmlp"]))


def test_every_place_has_a_module():
    listed = {f"hpcmlp.{folder}.{word}" if word != folder else f"hpcmlp.{folder}"
              for folder, words in INSIDE.items() for word in words.split()}
    assert listed - KNOWN == set()


def test_there_are_no_circles():
    edges = {name: {imported for imported, _ in imports(tree) if imported in MODULES and imported != name}
             for name, tree in MODULES.items()}
    done: set[str] = set()
    while ready := [name for name in edges if name not in done and edges[name] <= done]:
        done.update(ready)
    assert set(edges) == done


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_library_is_imported_only_where_it_belongs(library):
    for name, tree in MODULES.items():
        allowed = any(short(name) == where or short(name).startswith(where + ".") for where in MAY_IMPORT[library])
        lines = [line for imported, line in imports(tree) if imported.partition(".")[0] == library]
        assert allowed or not lines, f"{name} line {lines} imports {library}"


def test_mathematics_knows_no_files_and_no_clocks():
    for name, tree in MODULES.items():
        if short(name).partition(".")[0] != "nn":
            continue
        wrong = {imported for imported, _ in imports(tree)} & NOT_IN_NN
        assert not wrong, f"{name} imports {wrong}"
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "open"], name


def test_optional_libraries_are_imported_inside_functions():
    for name, tree in MODULES.items():
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for imported, line in imports(ast.Module(top, [])):
            assert imported.partition(".")[0] not in ONLY_INSIDE_FUNCTIONS, f"{name} line {line} imports {imported}"


def test_nothing_is_pickled_or_evaluated():
    for name, tree in MODULES.items():
        assert not {imported.partition(".")[0] for imported, _ in imports(tree)} & PICKLES, name
        for node in ast.walk(tree):
            where = f"{name} line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Name):
                assert node.id not in ("eval", "exec", "__import__"), where
            if isinstance(node, ast.Attribute):
                assert node.attr not in PICKLING_CALLS, where
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, where


def opening_sentence(name):
    doc = ast.get_docstring(MODULES[name])
    assert doc, f"{name} has no docstring"
    first = " ".join(doc.split("\n\n")[0].split())
    assert first.endswith("."), f"{name}: the opening sentence stands alone and ends with a full stop: {first!r}"
    return first


@pytest.mark.parametrize("name", MODULES)
def test_module_opens_with_one_sentence(name):
    first = opening_sentence(name)
    assert not re.search(r"[.!?] [A-Z]", first), f"{name}: one sentence, then an empty line: {first!r}"
    assert first.isascii()


def read_captions():
    """Return path in the package -> caption, from the fenced block after "## The tree" in the README."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## The tree\n.*?^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no fenced block after the heading '## The tree'"
    found = {}
    for line in block[1].split("\n"):
        match = re.match(r"\s*(?:hpcmlp/)?([\w/]+(?:\.py|/))\s+(\S.*)", line)
        if match:
            found[match[1]] = match[2].strip()
    return found


def test_readme_tree_is_the_real_one():
    captions = read_captions()
    for name, _ in MODULES.items():
        parts = short(name).split(".")
        path = "/".join(parts) + ".py"
        if name == "hpcmlp":
            continue
        if (PACKAGE / "/".join(parts)).is_dir():
            path = "/".join(parts) + "/"
        assert path in captions, f"README.md, The tree: no line for {path}"
        assert captions[path].rstrip(".") == opening_sentence(name).rstrip("."), f"README.md, The tree: {path}"
    real = {path for path in captions if (PACKAGE / path).exists() or (REPOSITORY / path).exists()}
    assert set(captions) == real, f"README.md, The tree: there is no {sorted(set(captions) - real)}"


def test_importing_the_package_starts_nothing():
    code = ("import sys, hpcmlp\n"
            "assert not {'numpy', 'mpi4py', 'h5py'} & set(sys.modules), sorted(sys.modules)\n"
            "import hpcmlp.launch, hpcmlp.config, hpcmlp.cli\n"
            "assert not {'numpy', 'mpi4py', 'h5py', 'importlib.metadata', 'asyncio'} & set(sys.modules)\n")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=60)


def test_no_path_of_one_machine_is_written_anywhere():
    # One person's directories in a committed file are wrong on every other machine.
    pattern = re.compile(r"/(?:home|work|Users|scratch)/[a-z]")
    for path in [*PACKAGE.rglob("*.py"), REPOSITORY / "Makefile", *(REPOSITORY / "jobs").glob("*")]:
        if path.is_file():
            assert not pattern.search(path.read_text(encoding="utf-8")), path
