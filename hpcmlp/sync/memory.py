"""What a rank holds of parameters, gradients and optimizer state, in closed form."""

from typing import Any


def buffer_elements(spec: Any) -> tuple[int, int]:
    """Return the elements of the largest even and of the largest odd layer, padding included. Local.

    spec : `nn.network.NetworkSpec`. Layers of a sharded run take two buffers in turn; see `sync.sharded`.
    """
    lengths = [stop - start for start, stop in spec.layer_spans()]
    return max(lengths[0::2]), max(lengths[1::2], default=0)


def state_bytes(spec: Any, moments: int, ranks: int, *, sharded: bool = False, whole_update: bool = False,
                common: int = 1) -> float:
    """Return the bytes of float32 parameters, gradients and optimizer state of one rank.

    Local. Parts of layers are rounded to 16 elements, which is not counted.

    Parameters
    ----------
    spec : `nn.network.NetworkSpec`.
    moments : vectors that the optimizer keeps (2 for Adam).
    ranks : of the job.
    sharded : parameters in slices (`sync.sharded`): 4 ((2 + moments) n / ranks + (1 / common + 1) (e + o)), with n
        elements in all, e and o in the largest even and odd layer. Else 4 (1 / common + 1 + moments / ranks) n.
    whole_update : every rank keeps the whole optimizer state; one rank alone holds 4 (2 + moments) n.
    common : ranks of a node that share one copy of what is the same on all of them: its ranks with `--sync shared`, 1
        else. A rank counts for its share of it.
    """
    total = spec.layout().size
    if sharded:
        return 4 * ((2 + moments) * total / ranks + (1 / common + 1) * sum(buffer_elements(spec)))
    return 4 * total * (1 / common + 1 + (moments if whole_update else moments / ranks))
