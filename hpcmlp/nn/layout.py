"""Where each tensor of a network stands in the one flat vector of parameters, gradients or moments.

Tensors follow each other in layer order, each start rounded up to `ALIGN` elements (64 bytes of float32), so that
per-layer views are aligned and a bucket, a slice or a checkpoint data set is a plain range of the vector. The gaps
stay zero.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

ALIGN = 16  # elements


@dataclass(frozen=True)
class Tensor:
    """One named tensor: elements `start` to `stop` of the flat vector, in C order."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Layout:
    """The places of named tensors in one flat vector.

    Local. The same tensors always give the same layout, so ranks need not exchange it.

    Parameters
    ----------
    tensors : (name, shape) pairs in the order of the vector; names are unique.

    Attributes
    ----------
    tensors : list of Tensor
    names, shapes, starts : lists over the tensors
    size : elements of the vector with padding, a multiple of `ALIGN`
    num_params : elements of all tensors, without padding
    """

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        self.tensors: list[Tensor] = []
        start = 0
        for name, shape in tensors:
            length = math.prod(shape)
            self.tensors.append(Tensor(name, tuple(shape), start, start + length))
            start += -(-length // ALIGN) * ALIGN
        self.size = start
        self.names = [t.name for t in self.tensors]
        self.shapes = [t.shape for t in self.tensors]
        self.starts = [t.start for t in self.tensors]
        self.num_params = sum(t.stop - t.start for t in self.tensors)
        assert len(set(self.names)) == len(self.names), "tensor names must be unique"

    def views(self, flat: Any) -> dict[str, Any]:
        """Return every tensor as a view of `flat`. Local. flat : (size,), of any array module."""
        assert flat.shape == (self.size,)
        return {t.name: self._view(flat, t) for t in self.tensors}

    def _view(self, flat: Any, tensor: Tensor) -> Any:
        return flat[tensor.start:tensor.stop].reshape(tensor.shape)

    def pack(self, tensors: Mapping[str, np.ndarray], dtype: Any = np.float32) -> np.ndarray:
        """Return a new flat host vector holding `tensors`, with zero padding.

        Local. Raises ValueError naming the tensor when names or shapes are not those of the layout.
        """
        if set(tensors) != set(self.names):
            odd = sorted(set(tensors) ^ set(self.names))
            raise ValueError(f"tensors {', '.join(odd)} are either missing or unknown; "
                             f"the layout holds {', '.join(self.names)}")
        flat = np.zeros(self.size, dtype)
        for name, view in self.views(flat).items():
            given = np.asarray(tensors[name])
            if given.shape != view.shape:
                raise ValueError(f"tensor {name} has shape {given.shape}; the layout wants {view.shape}")
            view[...] = given
        return flat

    def unpack(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Return copies of all tensors of the host vector `flat`, by name. Local."""
        return {name: view.copy() for name, view in self.views(flat).items()}

    def sha256(self, flat: np.ndarray) -> str:
        """Return the sha256 of the logical parameters: unpadded float32, layer order, little-endian.

        Local. The value does not depend on padding, byte order of the host, device or rank count.
        """
        digest = hashlib.sha256()
        for t in self.tensors:
            digest.update(np.ascontiguousarray(self._view(flat, t), dtype="<f4"))
        return digest.hexdigest()

    def parts(self, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """Return (tensor index, start, stop) for every piece of a tensor that lies in `ranges`.

        Local. `ranges` are ascending, disjoint element ranges; so are the pieces. Padding belongs to no piece.
        """
        pieces, first = [], 0
        for start, stop in ranges:
            while first < len(self.tensors) and self.tensors[first].stop <= start:
                first += 1
            for index in range(first, len(self.tensors)):
                tensor = self.tensors[index]
                if tensor.start >= stop:
                    break
                if max(start, tensor.start) < min(stop, tensor.stop):
                    pieces.append((index, max(start, tensor.start), min(stop, tensor.stop)))
        return pieces


class PaddedLayout(Layout):
    """The same tensors as a GPU likes them: every width rounded up to `WIDTH` elements, every start to `SLOT`.

    Local. Weights are (out, in) matrices whose rows and columns are both padded; padding is zero and stays so. Views,
    packing and hashes are of the logical tensors, so that files never see the padding.
    """

    WIDTH = 16   # rows of bf16 matrices begin at multiples of 32 bytes
    SLOT = 128   # elements: 256 bytes of bf16, which the matrix products of a GPU assume

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        tensors = list(tensors)
        super().__init__(tensors)
        self.num_params = sum(math.prod(shape) for _, shape in tensors)
        self.padded = {name: tuple(pad(n, self.WIDTH) for n in shape) for name, shape in tensors}
        self.tensors, start = [], 0
        for name, shape in tensors:
            length = math.prod(self.padded[name])
            self.tensors.append(Tensor(name, tuple(shape), start, start + length))
            start += pad(length, self.SLOT)
        self.size = start
        self.starts = [t.start for t in self.tensors]

    def slot(self, flat: Any, name: str) -> Any:
        """Return the elements of a tensor with its padding as a one-dimensional view of `flat`. Local."""
        tensor = self.tensors[self.names.index(name)]
        return flat[tensor.start:tensor.stop]

    def _view(self, flat: Any, tensor: Tensor) -> Any:
        whole = flat[tensor.start:tensor.stop].reshape(self.padded[tensor.name])
        return whole[tuple(slice(n) for n in tensor.shape)]


def pad(count: int, multiple: int) -> int:
    """Return `count` rounded up to a multiple. Local."""
    return -(-count // multiple) * multiple
