"""A device that needs no GPU: the same launches, with NumPy for the matrix products and a C++ compiler for the kernels.

It keeps cuBLASLt's column-major layouts, epilogues and types (bf16 rounds to nearest, tf32 keeps 10 bits of the
mantissa), and runs the blocks of a kernel one after the other: it shows what is computed, not how fast, nor races.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hpcmlp.errors import Unavailable
from hpcmlp.ops.candidates import MAKERS, choose, offer
from hpcmlp.ops.cublaslt import Product
from hpcmlp.ops.launches import Await, Fork, Join, Kernel, Mark, Multiply, from_bf16, to_bf16
from hpcmlp.ops.small_products import SmallProduct, launch_of, ways_to_cut

SOURCES = {path.name: path for path in sorted(Path(__file__).parent.glob("gpu_*.cu"))}
COMMAND = ("-std=c++20", "-O2", "-w", "-ffp-contract=off", "-shared", "-fPIC", "-U_FORTIFY_SOURCE",
           "-DHPCMLP_EMULATED", "-x", "c++")
SCALARS = {np.dtype("i4"): ctypes.c_int32, np.dtype("f4"): ctypes.c_float, np.dtype("u4"): ctypes.c_uint32,
           np.dtype("u8"): ctypes.c_uint64}


def compile_kernels(source: str = "gpu_kernels.cu") -> Any:
    """Return the kernels of a file as a library of the host, compiled at the first use and kept.

    Local. Raises Unavailable without a C++20 compiler.
    """
    path = SOURCES[source]
    header = path.with_name("gpu_emulated.h")
    digest = hashlib.sha256(path.read_bytes() + header.read_bytes() + " ".join(COMMAND).encode()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"hpcmlp-emulated-{os.getuid()}-{digest}.so"
    if not built.exists():
        part = built.with_suffix(f".{os.getpid()}")
        try:
            subprocess.run([os.environ.get("CXX", "g++"), *COMMAND, str(path), "-o", str(part)], check=True,
                           capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            text = (getattr(error, "stderr", "") or str(error)).strip().splitlines() or ["no message"]
            raise Unavailable(f"the emulated GPU needs a C++20 compiler to build its kernels ({text[0]}); install g++, "
                              "or name another in CXX.") from None
        os.replace(part, built)
    return ctypes.CDLL(str(built))


class EmulatedDevice:
    """Arrays are NumPy's; what is launched has happened when `run` returns.

    refuse : the products that it has no way to compute.
    late : what is on the second stream runs only when the first one waits for it, so that a wait that is missing
        changes the numbers; else as soon as it may.
    seconds_of : the time that a way to compute a product, of this name, pretends to take; the library's is "library",
        and taken where times are equal.
    makers : as `gpu_device.GpuDevice` has them.
    """

    name = "emulated"
    multiprocessors = 2
    free_bytes = 1 << 40
    has_nccl, prefers_nccl = True, False    # a stand-in, where it is asked for
    xp = np

    def __init__(self, refuse: Callable[[Product], bool] = lambda product: False, late: bool = False,
                 seconds_of: Callable[[Product, str], float] = lambda product, name: 0.0,
                 makers: tuple[str, ...] = MAKERS):
        self._libraries = {"gpu_kernels.cu": compile_kernels()}
        self._kernels: dict[str, int] = {}
        self._refuse, self._late, self._seconds_of, self.makers = refuse, late, seconds_of, makers

    def zeros(self, count: int, dtype: Any) -> np.ndarray:
        """Return an array of zeros. Local."""
        return np.zeros(count, dtype)

    def address(self, array: np.ndarray) -> int:
        """Return where an array begins. Local."""
        return int(array.ctypes.data)

    def upload(self, host: np.ndarray, out: np.ndarray) -> None:
        """Copy a host array to the device. Local."""
        out[...] = host

    def download(self, array: np.ndarray, out: np.ndarray) -> None:
        """Copy an array of the device to the host. Local."""
        out[...] = array

    def make_feed(self, arrays: list[tuple[int, Any]]) -> "Feed":
        """Return a way for batches to the device: (elements, dtype) of each array of a batch. Local."""
        return Feed(arrays)

    def multiply(self, product: Product, side: bool = False) -> Multiply | None:
        """Return the launch of a product, or None when the device has no way to compute it. Local."""
        if self._refuse(product):
            return None
        own = [(way.name, way) for way in ways_to_cut(product, self.address)]
        return Multiply(product, offer([("library", multiply)], own, self.makers), side)

    def tune(self, launches: list[Any], known: dict[str, str]) -> dict[str, str]:
        """Choose for every product the way that pretends to be fastest. Local."""
        return choose(launches, known, lambda one, place: self._seconds_of(one.product, one.ways.names[place]))

    def capture(self, launches: list[Any], times: int = 1) -> Callable[[], None]:
        """Return a function that runs the launches `times` times. Local."""
        def replay() -> None:
            for _ in range(times):
                self.run(launches)
        return replay

    def run(self, launches: list[Any]) -> None:
        """Run the launches in order. Local."""
        with np.errstate(all="ignore"):  # a device does not complain either
            for launch in self._delayed(launches) if self._late else launches:
                if isinstance(launch, Kernel):
                    self._launch(launch)
                elif isinstance(launch, Multiply):
                    self._multiply(launch)
                elif not isinstance(launch, Fork | Join | Mark | Await):
                    launch()

    @staticmethod
    def _delayed(launches: list[Any]) -> Iterator[Any]:
        """The launches, those of the second stream as late as the waits of the first one allow."""
        side: list[Any] = []
        for launch in launches:
            if getattr(launch, "side", False) or isinstance(launch, Mark):
                side.append(launch)
                continue
            count = len(side) if isinstance(launch, Join) else 0
            if isinstance(launch, Await) and launch.mark in side:
                count = side.index(launch.mark) + 1
            yield from side[:count]
            del side[:count]
            yield launch
        assert not any(isinstance(launch, Kernel | Multiply) for launch in side), "a graph ends with all its work done"

    def seconds(self, action: Callable[[], None], times: int) -> float:
        """Return a time that means nothing, for devices that measure one. Local."""
        return 1e-4

    def synchronize(self) -> None:
        """Do nothing: all is done. Local."""

    settle = synchronize

    def _multiply(self, multiplied: Multiply) -> None:
        way = multiplied.ways.chosen
        if isinstance(way, SmallProduct):
            self._launch(launch_of(way))
        else:
            way(multiplied.product)

    def _launch(self, kernel: Kernel) -> None:
        if kernel.source not in self._libraries:
            self._libraries[kernel.source] = compile_kernels(kernel.source)
        if kernel.name not in self._kernels:
            find = getattr(self._libraries[kernel.source], f"kernel_{kernel.name}")
            find.restype = ctypes.c_void_p
            self._kernels[kernel.name] = find()
        values = [_argument(a) for a in kernel.arguments]
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int, *(type(v) for v in values))
        prototype(self._kernels[kernel.name])(kernel.grid, kernel.block, *values)


class Feed:
    """As `gpu_device.Feed`: two places for a batch, whose copies are made at once."""

    def __init__(self, arrays: list[tuple[int, Any]]):
        self.host, self.device = ([[np.zeros(count, dtype) for count, dtype in arrays] for _ in range(2)]
                                  for _ in range(2))

    def wait(self, place: int) -> None:
        """Do nothing: all is copied. Local."""

    def send(self, place: int) -> None:
        """Copy the place to the device. Local."""
        for host, array in zip(self.host[place], self.device[place], strict=True):
            array[...] = host
            host[...] = 0   # nobody may count on what was there

    def used(self, place: int) -> None:
        """Do nothing: it is over. Local."""


@cache
def _structure(size: int) -> Any:
    """The type of a structure of so many bytes."""
    return type("Structure", (ctypes.Structure,), {"_fields_": [("words", ctypes.c_uint64 * (size // 8))]})


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        if value.dtype.names:
            return _structure(value.itemsize).from_buffer_copy(value)
        return ctypes.c_void_p(value.ctypes.data)
    return SCALARS[value.dtype](value.item())


def multiply(product: Product) -> None:
    """Compute a product as cuBLASLt defines it. Local."""
    p = product
    a = _operand(p.a, p.lda, *((p.k, p.m) if p.trans_a else (p.m, p.k)), p.compute)
    b = _operand(p.b, p.ldb, *((p.n, p.k) if p.trans_b else (p.k, p.n)), p.compute)
    a, b = a.T if p.trans_a else a, b.T if p.trans_b else b
    d = a @ b  # (m, n)
    if p.epilogue in ("bias", "relu_bias", "relu_aux_bias"):
        assert p.bias.dtype == p.d.dtype, "the bias has the type of the output"
        d += _values(p.bias[:p.m])[:, None]
    if p.epilogue == "relu_aux_bias":
        bits = np.packbits(d > 0, axis=0, bitorder="little")  # (bytes, n)
        assert p.aux_ld % 128 == 0 and p.aux_ld >= p.m
        p.aux[:p.n * p.aux_ld // 8].reshape(p.n, p.aux_ld // 8)[:, :len(bits)] = bits.T
    if p.epilogue in ("relu_bias", "relu_aux_bias"):
        d = np.where(d > 0, d, np.float32(0))  # NaN becomes 0, as there
    if p.epilogue == "drelu":
        bits = p.aux[:p.n * p.aux_ld // 8].reshape(p.n, p.aux_ld // 8)
        d = d * np.unpackbits(bits, axis=1, bitorder="little")[:, :p.m].T
    if p.epilogue == "bgradb":
        assert p.bias.dtype == p.d.dtype, "the bias gradient has the type of the output"
        p.bias[:p.n] = _stored(b.sum(axis=0, dtype=np.float32), p.bias)
    p.d[:p.n * p.ldd].reshape(p.n, p.ldd)[:, :p.m] = _stored(d.T, p.d)


def _operand(array: np.ndarray, ld: int, rows: int, columns: int, compute: str) -> np.ndarray:
    """The column-major matrix at the start of `array`, as (rows, columns) float32."""
    assert ld % 8 == 0 and array.size >= (columns - 1) * ld + rows
    whole = np.lib.stride_tricks.as_strided(array, (columns, rows), (ld * array.itemsize, array.itemsize))
    values = _values(whole)
    if compute == "tf32":
        bits = values.view(np.uint32)
        values = ((bits + np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1)))
                  & np.uint32(0xFFFFE000)).view(np.float32)
    return values.T


def _values(array: np.ndarray) -> np.ndarray:
    return from_bf16(array) if array.dtype == np.uint16 else np.ascontiguousarray(array)


def _stored(values: np.ndarray, array: np.ndarray) -> np.ndarray:
    return to_bf16(values) if array.dtype == np.uint16 else values
