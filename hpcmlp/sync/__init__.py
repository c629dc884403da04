"""Keep the replicas of all ranks equal: joins the mathematics and the communication."""

from collections.abc import Callable

from hpcmlp.sync.strategy import SlicedUpdate, WholeUpdate


def make_strategy(whole: bool, narrow: bool = False) -> Callable[..., SlicedUpdate]:
    """Return the class of the strategy: WholeUpdate when `whole`, else NarrowUpdate when `narrow`, else SlicedUpdate.

    Local. `narrow` as the collective's attribute says. With `whole` the summed gradient is gathered in float32.
    """
    if whole or not narrow:
        return WholeUpdate if whole else SlicedUpdate
    from hpcmlp.sync.narrow import NarrowUpdate  # few runs want it
    return NarrowUpdate
