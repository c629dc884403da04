"""Matrix products of small shapes in float32 by a kernel of our own, offered beside the library's algorithms.

A step of 784-256-10 with 128 rows is five products of 1 us of arithmetic together, for each of which cuBLASLt takes
about 6.4 us on an H100: what counts is how many multiprocessors work, how many loads are under way at once, and how
often the device waits. `gpu_products.cu`: a block computes one tile of D, its warps share k, and so do groups of lanes
inside a warp. A lane holds 8 x 8 sums (4 x 4 in the smallest tile) and loads four columns of its 8 + 8 rows straight
from the L2 cache into registers: 16 loads of 16 bytes for 256 multiplications and additions. Sums of groups are folded
by shuffles, half of them at a time, those of warps through shared memory; the order is fixed, so that bits repeat. The
epilogue runs in the same kernel. relu's derivative is read from the sign of the layer's output, not from a mask.

Foretold for 132 multiprocessors of 1.75 GHz and 128 float32 units, L2 at 5.7 TB/s, 0.5 us until the first numbers
arrive; `bytes` are read from L2, `issue` is what the busiest multiprocessor issues (340 instructions for 256 useful
ones), which overlaps with the bytes; `end` is folding, exchange and epilogue. Without the launch itself, about 1 us:

    product (n x m x k)          tile    blocks  bytes            issue    end     sum
    forward 128 x 256 x 784      16x16      128  12.8 MB  2.2 us  1.2 us   0.4 us  3.1 us
                                 32x16       64   9.6 MB  1.7 us  2.4 us   0.4 us  3.3 us
    forward 128 x 16 x 256         8x8       32   0.5 MB  0.1 us  0.1 us   0.3 us  0.9 us
    input   128 x 256 x 16       16x16      128   0.4 MB  0.1 us  0.2 us   0.3 us  1.0 us
    weight   16 x 256 x 128        8x8       64   0.5 MB  0.1 us  0.1 us   0.3 us  0.9 us
    weight  256 x 784 x 128      32x32      200   6.6 MB  1.2 us  1.6 us   0.6 us  2.7 us
                                 16x16      784  12.8 MB  2.2 us  1.2 us   0.4 us  3.1 us

Neighbours in a list of launches that do not touch what the other writes go in one launch (`together`): the input and
the weight gradient of a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcmlp.ops.cublaslt import Product
from hpcmlp.ops.launches import Kernel, Multiply, on_one_stream

SOURCE = "gpu_products.cu"
NAME = "own 1"      # the number changes when the order of sums does: choices are remembered by name
MOST_FLOPS = 1 << 28
TILES = ((8, 8), (16, 16), (32, 16), (32, 32))      # (along n, along m), by the numbers that the kernel knows them by
LANES = (4, 4, 8, 16)                               # that share a tile; the other lanes of a warp take other k
WARPS = (4, 6, 12)                                  # most that share k; 12 fill the registers of a multiprocessor
MOST_PARTS = 8192                                   # warps x elements of a tile: 32 KiB of shared memory
FORMS = {(True, False): 0, (False, False): 1, (False, True): 2}     # (trans_a, trans_b)
EPILOGUES = {"none": 0, "bias": 1, "relu_bias": 2, "relu_aux_bias": 2, "drelu": 3, "bgradb": 4}
# The structure of gpu_products.cu.
SMALL = np.dtype([(name, "u8") for name in ("a", "b", "d", "bias", "gate")]
                 + [(name, "i4") for name in ("m", "n", "k", "lda", "ldb", "ldd", "form", "epilogue", "tile", "warps",
                                              "across", "blocks")])


@dataclass(frozen=True, eq=False)
class SmallProduct:
    """One way to cut a product into tiles; `record` is what the kernel is told, of dtype `SMALL` and size 1."""

    name: str
    record: np.ndarray

    @property
    def warps(self) -> int:
        return int(self.record["warps"][0])

    @property
    def blocks(self) -> int:
        return int(self.record["blocks"][0])


def fits(product: Product) -> bool:
    """Return whether the kernel can compute the product, and may be the fastest to do so. Local."""
    p = product
    arrays = [v for v in (p.a, p.b, p.d, p.bias) if v is not None]
    if p.compute != "float32" or any(v.dtype != np.float32 for v in arrays) or p.flops > MOST_FLOPS:
        return False
    form = FORMS.get((p.trans_a, p.trans_b))
    along = {0: (p.k,), 1: (p.m, p.k), 2: (p.m, p.n)}.get(form)    # what is loaded in pieces of 16 bytes
    return (along is not None and not any(n % 4 for n in (*along, p.lda, p.ldb, p.ldd))
            and (p.epilogue != "drelu" or p.gate is not None) and (p.epilogue != "bgradb" or form == 2))


def ways_to_cut(product: Product, address: Callable[[Any], int]) -> list[SmallProduct]:
    """Return the ways in which the kernel may compute a product, none where it cannot. Local."""
    p = product
    if not fits(p) or any(address(v) % 16 for v in (p.a, p.b)):
        return []
    ways = {}
    for number, ((high, wide), lanes) in enumerate(zip(TILES, LANES, strict=True)):
        if number and (high >= 2 * p.n or wide >= 2 * p.m):
            continue    # more than half of every tile would be empty
        steps = -(-p.k // (4 * (32 // lanes)))
        for most in WARPS:
            most = min(most, MOST_PARTS // (high * wide))
            warps = -(-steps // -(-steps // most))      # no more than needed for as few turns
            way = _cut(p, address, number, warps)
            ways[way.name] = way
    return list(ways.values())


def _cut(p: Product, address: Callable[[Any], int], number: int, warps: int) -> SmallProduct:
    high, wide = TILES[number]
    record = np.zeros(1, SMALL)
    for name in ("a", "b", "d", "bias", "gate"):
        array = getattr(p, name)
        record[name] = 0 if array is None else address(array)
    for name in ("m", "n", "k", "lda", "ldb", "ldd"):
        record[name] = getattr(p, name)
    across = -(-p.m // wide)
    record["form"], record["epilogue"] = FORMS[p.trans_a, p.trans_b], EPILOGUES[p.epilogue]
    record["tile"], record["warps"] = number, warps
    record["across"], record["blocks"] = across, across * -(-p.n // high)
    return SmallProduct(f"{NAME} {high}x{wide} {warps}", record)


def launch_of(first: SmallProduct, second: SmallProduct | None = None, side: bool = False) -> Kernel:
    """Return the launch of one product, or of two that do not touch what the other writes. Local."""
    both = [first] if second is None else [first, second]
    records = [way.record for way in both] + [np.zeros(1, SMALL)] * (2 - len(both))
    return Kernel("small_products", sum(way.blocks for way in both), 32 * max(way.warps for way in both),
                  tuple(records), side, SOURCE)


def together(launches: list[Any], address: Callable[[Any], int]) -> list[Any]:
    """Return the launches on one stream, where neighbours that are products of our own share a launch if they can.

    Local. Every number is what it is without; the choice of ways must have been made.
    """
    out: list[Any] = []
    for new in on_one_stream(launches):
        last = out[-1] if out else None
        if _is_own(last) and _is_own(new) and not _meet(last.product, new.product, address):
            out[-1] = launch_of(last.ways.chosen, new.ways.chosen)
        else:
            out.append(new)
    return out


def _is_own(launch: Any) -> bool:
    return isinstance(launch, Multiply) and isinstance(launch.ways.chosen, SmallProduct)


def _meet(p: Product, q: Product, address: Callable[[Any], int]) -> bool:
    """Whether one of two products writes what the other reads or writes."""
    def spans(arrays: list[Any]) -> list[tuple[int, int]]:
        return [(address(v), address(v) + v.nbytes) for v in arrays if v is not None]

    def reads(product: Product) -> list[Any]:
        return [product.a, product.b, product.gate, product.bias]

    def writes(product: Product) -> list[Any]:
        return [product.d, product.bias if product.epilogue == "bgradb" else None]

    return any(start < other_stop and other_start < stop
               for one, other in ((p, q), (q, p)) for start, stop in spans(writes(one))
               for other_start, other_stop in spans(reads(other) + writes(other)))
