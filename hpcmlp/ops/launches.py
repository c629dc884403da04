"""What a device is asked to do, as a list that can be replayed: kernels, matrix products, meetings of two streams."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hpcmlp.ops.candidates import Ways
from hpcmlp.ops.cublaslt import Product

# The structures of gpu_kernels.cu.
STEP = np.dtype([("rate", "f4"), ("keep", "f4"), ("second", "f4"), ("starts", "i4"), ("number", "u8"), ("first", "u8"),
                 ("rows", "i4"), ("unused", "i4")])
RESULT = np.dtype([("loss", "f8"), ("weight", "f8"), ("square", "f8"), ("skipped", "i4"), ("rows", "i4")])
CONTROL = np.dtype([("at", "i4"), ("ticket", "i4"), ("skip", "i4"), ("factor", "f4"), ("rate", "f4"), ("keep", "f4"),
                    ("second", "f4"), ("starts", "i4"), ("loss", "f8"), ("weight", "f8"), ("square", "f8"),
                    ("bad", "f8")])
SHARD = np.dtype([("rows", "i4"), ("a", "i4"), ("b", "i4"), ("table", "i4"), ("keys", "u4", (6,)), ("base", "i4"),
                  ("unused", "i4")])
PARTIAL = np.dtype([("partial", "u8"), ("bias", "u8"), ("parts", "i4"), ("stride", "i4"), ("first_block", "i4"),
                    ("unused", "i4")])
HYPER = np.dtype([("rule", "i4"), ("decoupled", "i4"), ("nesterov", "i4"), ("unused", "i4"), ("beta1", "f4"),
                  ("beta2", "f4"), ("eps", "f4"), ("decay", "f4"), ("momentum", "f4"), ("dampening", "f4"),
                  ("average", "f4"), ("clip", "f4")])


@dataclass
class Kernel:
    """A kernel over a one-dimensional grid.

    arguments : arrays, None for a null pointer, NumPy scalars, and structures by value: host arrays of size 1.
    source : the file that it is in.
    """

    name: str
    grid: int
    block: int
    arguments: tuple[Any, ...]
    side: bool = False
    source: str = "gpu_kernels.cu"


@dataclass
class Multiply:
    """A matrix product, and the ways there are to compute it."""

    product: Product
    ways: Ways
    side: bool = False

    @property
    def name(self) -> str:
        return self.product.key()


@dataclass
class Fork:
    """From here on the side stream may use what the main stream has done so far."""


@dataclass
class Join:
    """From here on the main stream may use what the side stream has done so far."""


@dataclass(eq=False)
class Mark:
    """What the side stream has done so far, for `Await`."""


@dataclass(eq=False)
class Await:
    """From here on the main stream may use what the side stream had done at `mark`, earlier in the list."""

    mark: Mark


def on_one_stream(launches: list[Any]) -> list[Any]:
    """Return the launches without a second stream, in the same order. Local."""
    return [replace(launch, side=False) if isinstance(launch, Kernel | Multiply) else launch
            for launch in launches if not isinstance(launch, Fork | Join)]


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Return float32 values rounded to bf16, to nearest with ties to even, as uint16. Local."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where((bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000), np.uint16(0x7FFF), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Return bf16 numbers, held as uint16, as float32. Local."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
