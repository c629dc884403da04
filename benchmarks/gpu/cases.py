"""The cases that are timed on a GPU: networks, batches, precisions, and made-up samples for them."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Case:
    """One network with its global batch; `rows` samples lie in the device's memory."""

    name: str
    sizes: tuple[int, ...]
    batch: int
    precision: str
    rows: int
    loss: str = "softmax_cross_entropy"

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products of a step."""
        pairs = list(zip(self.sizes, self.sizes[1:], strict=False))
        return sum(6 * self.batch * a * b for a, b in pairs) - 2 * self.batch * pairs[0][0] * pairs[0][1]


HIGGS = dict(sizes=(28, *[300] * 5, 1), batch=8192, rows=1 << 20, loss="binary_cross_entropy")
CASES = {case.name: case for case in (
    Case("tiny-f32", (784, 256, 10), 128, "float32", 60_000),
    Case("higgs-bf16", precision="bf16", **HIGGS),
    Case("higgs-tf32", precision="tf32", **HIGGS),
    Case("large-bf16", (1024, *[4096] * 4, 1024), 16384, "bf16", 196_608),
)}


@lru_cache(1)
def samples(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return x (rows, d) float32 and y (rows,) int32. Local."""
    random = np.random.default_rng(7)
    x = random.standard_normal((case.rows, case.sizes[0]), dtype=np.float32)
    return x, random.integers(0, max(2, case.sizes[-1]), case.rows).astype(np.int32)
