"""The arithmetic that a program computes with: for GPUs the ranks choose together, so that each has its own."""

import json
import os
from typing import Any

from hpcmlp.comm import messages
from hpcmlp.comm.agreement import agreed
from hpcmlp.ops import open_ops


def open_arithmetic(device: str, comm: Any) -> tuple[Any, str]:
    """Return the operations for `device` ("cpu" or "gpu"), and a sentence where ranks share a GPU, else "".

    Collective over `comm`: all ranks tell which GPUs they see, and find the same (`ops.gpu_places`).
    Raises Unavailable, on all ranks, where one has no such device.
    """
    if device == "cpu":
        return open_ops("cpu"), ""
    from hpcmlp.ops.device import open_device, see_gpus  # pulls in CuPy, which only a GPU run pays for
    from hpcmlp.ops.gpu_places import take_places
    with agreed(comm):
        own = see_gpus()
    told = messages.all_gather_bytes(comm, json.dumps({"host": os.uname().nodename, "gpus": own}).encode())
    facts = [json.loads(text) for text in told]
    place = take_places([fact["gpus"] for fact in facts])[comm.rank]
    assert place is not None, "every rank sees a GPU"
    with agreed(comm):
        ops = open_device(place, own[place])
    return ops, _shared(facts)


def _shared(facts: list[dict[str, Any]]) -> str:
    from hpcmlp.ops.gpu_places import ONE_EACH, sharing
    groups = sharing([fact["gpus"] for fact in facts])
    if not groups:
        return ""
    from hpcmlp.run.checkup import named
    more = f", and so do {len(groups) - 1} more groups of ranks" if len(groups) > 1 else ""
    return f"{named(groups[0], facts)} share a GPU{more}; faster is {ONE_EACH}."
