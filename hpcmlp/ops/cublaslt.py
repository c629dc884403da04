"""Matrix products planned once and replayed: cuBLASLt through ctypes, with its epilogues and choice of algorithms.

CuPy refuses its own cuBLAS calls while a stream is captured into a graph; `cublasLtMatmul` takes the stream as an
argument and allocates nothing, so a planned call can be captured. Numbers and structures are those of cublasLt.h, the
same since CUDA 11; `Blas` is told addresses only and knows no array module.
"""

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FLOAT32, BFLOAT16 = 0, 14                                   # cudaDataType
COMPUTE = {"float32": 68, "tf32": 77}                       # cublasComputeType_t
COMPUTE_ATTRIBUTES = {"trans_a": 3, "trans_b": 4, "epilogue": 7, "bias": 8, "aux": 11, "aux_ld": 12}
EPILOGUES = {"none": 1, "bias": 4, "relu_bias": 6, "relu_aux_bias": 134, "drelu": 136, "bgradb": 512}
MAX_WORKSPACE, MIN_ALIGNMENTS = 1, (5, 6, 7, 8)
ALIGNMENT_BYTES = 16
WORKSPACE_BYTES = 32 << 20
CANDIDATES = 16


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t: opaque."""

    _fields_ = [("data", ctypes.c_uint64 * 8)]


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [("algorithm", Algorithm), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
                ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4)]


@dataclass
class Product:
    """D = epilogue(op(A) op(B)), all column-major: D is (m, n), op(A) (m, k), op(B) (k, n).

    a, b, d : one-dimensional arrays that begin with the matrix; float32, or uint16 that holds bf16.
    lda, ldb, ldd : elements between columns.
    epilogue : "none"; "bias": + bias (m,) of D's type; "relu_bias": the same, then relu; "relu_aux_bias": whose mask
        goes to `aux`; "drelu": times the mask in `aux`; "bgradb": op(B) summed over k goes to `bias` (n,) of D's type.
    aux : uint8, opaque, `aux_ld` bits a column. gate : what the product that wrote `aux` has as its D, in the shape of
        this one's: above zero where the mask is set.
    compute : "float32" or "tf32".
    """

    m: int
    n: int
    k: int
    a: Any
    b: Any
    d: Any
    lda: int
    ldb: int
    ldd: int
    trans_a: bool = False
    trans_b: bool = False
    epilogue: str = "none"
    bias: Any = None
    aux: Any = None
    aux_ld: int = 0
    gate: Any = None
    compute: str = "float32"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def key(self) -> str:
        """Return what decides which algorithms there are: shapes, types, epilogue. Local."""
        kinds = "".join("b" if x.dtype.itemsize == 2 else "f" for x in (self.a, self.b, self.d))
        return (f"{self.m}x{self.n}x{self.k} {'T' if self.trans_a else 'N'}{'T' if self.trans_b else 'N'} {kinds} "
                f"{self.compute} {self.epilogue}")


class Blas:
    """The library, with one workspace for every stream that products run on at a time.

    Local. Raises OSError when the library is not there, RuntimeError when it answers an error.

    Parameters
    ----------
    address : gives the device address of an array of the module in use.
    workspaces : device addresses of WORKSPACE_BYTES each.
    """

    def __init__(self, address: Callable[[Any], int], workspaces: list[int]):
        self.library = load_library()
        self.address, self.workspaces = address, workspaces
        self.handle = ctypes.c_void_p()
        self._check(self.library.cublasLtCreate(ctypes.byref(self.handle)), "cublasLtCreate")
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        preference = self._preference = ctypes.c_void_p()
        self._check(self.library.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "PreferenceCreate")
        for attribute, value in [(MAX_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES)),
                                 *((k, ctypes.c_uint32(ALIGNMENT_BYTES)) for k in MIN_ALIGNMENTS)]:
            self._check(self.library.cublasLtMatmulPreferenceSetAttribute(
                preference, attribute, ctypes.byref(value), ctypes.sizeof(value)), "PreferenceSetAttribute")

    @property
    def version(self) -> int:
        """The library's version, 130100 for 13.1."""
        return int(self.library.cublasLtGetVersion())

    def _check(self, status: int, what: str) -> None:
        if status:
            text = self.library.cublasLtGetStatusString(status)
            raise RuntimeError(f"{what} answered {status} ({(text or b'').decode()})")

    def plan(self, product: Product) -> "list[tuple[str, Planned]]":
        """Return the product with each algorithm that fits, and its name, the one thought fastest first. Local."""
        description, layouts = self.describe(product)
        return [(bytes(algorithm).hex(), Planned(self, product, description, layouts, algorithm))
                for algorithm in self.algorithms(description, layouts)]

    def describe(self, product: Product) -> tuple[Any, list[Any]]:
        """Return the descriptor of the product, and the layouts of A, B, D. Local."""
        p, library = product, self.library
        description = ctypes.c_void_p()
        self._check(library.cublasLtMatmulDescCreate(ctypes.byref(description), COMPUTE[p.compute], FLOAT32),
                    "MatmulDescCreate")
        values: dict[str, Any] = {"trans_a": ctypes.c_int32(p.trans_a), "trans_b": ctypes.c_int32(p.trans_b),
                                  "epilogue": ctypes.c_uint32(EPILOGUES[p.epilogue])}
        if p.bias is not None:
            values["bias"] = ctypes.c_void_p(self.address(p.bias))
        if p.aux is not None:
            values |= {"aux": ctypes.c_void_p(self.address(p.aux)), "aux_ld": ctypes.c_int64(p.aux_ld)}
        for name, value in values.items():
            self._check(library.cublasLtMatmulDescSetAttribute(description, COMPUTE_ATTRIBUTES[name],
                                                               ctypes.byref(value), ctypes.sizeof(value)), name)
        layouts = []
        for array, shape, transposed, ld in [(p.a, (p.m, p.k), p.trans_a, p.lda), (p.b, (p.k, p.n), p.trans_b, p.ldb),
                                             (p.d, (p.m, p.n), False, p.ldd)]:
            layout = ctypes.c_void_p()
            rows, columns = shape[::-1] if transposed else shape
            self._check(library.cublasLtMatrixLayoutCreate(
                ctypes.byref(layout), BFLOAT16 if array.dtype.itemsize == 2 else FLOAT32, rows, columns, ld),
                "MatrixLayoutCreate")
            layouts.append(layout)
        return description, layouts

    def algorithms(self, description: Any, layouts: list[Any]) -> list[Algorithm]:
        """Return the algorithms that fit, the one thought fastest first. Local."""
        results, got = (Heuristic * CANDIDATES)(), ctypes.c_int()
        a, b, d = layouts
        status = self.library.cublasLtMatmulAlgoGetHeuristic(
            self.handle, description, a, b, d, d, self._preference, CANDIDATES, results, ctypes.byref(got))
        return [] if status else [r.algorithm for r in results[:got.value] if r.state == 0]

    def run(self, planned: "Planned", stream: int, workspace: int) -> None:
        """Put the product into a stream. Local. Raises RuntimeError."""
        p, (a, b, d) = planned.product, planned.layouts
        out = self.address(p.d)
        self._check(self.library.cublasLtMatmul(
            self.handle, planned.description, ctypes.byref(self._one), self.address(p.a), a, self.address(p.b), b,
            ctypes.byref(self._zero), out, d, out, d, ctypes.byref(planned.algorithm),
            self.workspaces[workspace], WORKSPACE_BYTES, stream), f"cublasLtMatmul {p.key()}")


@dataclass(eq=False)
class Planned:
    """A product with its descriptors and one algorithm."""

    blas: Blas
    product: Product
    description: Any
    layouts: list[Any]
    algorithm: Algorithm

    def __call__(self, stream: int, workspace: int) -> None:
        """Put the product into a stream. Local."""
        self.blas.run(self, stream, workspace)


def load_library() -> Any:
    """Return cuBLASLt with the types of its arguments declared. Local. Raises OSError when it is not there."""
    path = None
    try:
        pathfinder = importlib.import_module("cuda.pathfinder")
        path = pathfinder.load_nvidia_dynamic_lib("cublasLt").abs_path
    except Exception:  # its own errors, for whatever reason: the names below are then tried
        path = None
    library, failure = None, None
    for name in [path] if path else ["libcublasLt.so.13", "libcublasLt.so.12"]:
        try:
            library = ctypes.CDLL(name)
            break
        except OSError as error:
            failure = error
    if library is None:
        raise failure
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name, arguments in {
            "cublasLtCreate": [pointer], "cublasLtMatmulDescCreate": [pointer, number, number],
            "cublasLtMatmulDescSetAttribute": [pointer, number, pointer, size],
            "cublasLtMatrixLayoutCreate": [pointer, number, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64],
            "cublasLtMatmulPreferenceCreate": [pointer],
            "cublasLtMatmulPreferenceSetAttribute": [pointer, number, pointer, size],
            "cublasLtMatmulAlgoGetHeuristic": [pointer] * 7 + [number, pointer, pointer],
            "cublasLtMatmul": [pointer] * 14 + [size, pointer],
            "cublasLtGetStatusString": [number], "cublasLtGetVersion": []}.items():
        getattr(library, name).argtypes = arguments
    library.cublasLtGetStatusString.restype = ctypes.c_char_p
    library.cublasLtGetVersion.restype = size
    return library
