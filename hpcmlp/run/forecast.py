"""The plan of the run that is under way, and what became of it: foretold and measured side by side at the end."""

from dataclasses import replace
from typing import Any

import numpy as np

from hpcmlp.comm import messages
from hpcmlp.comm.agreement import agreed
from hpcmlp.run.account import Account
from hpcmlp.run.parts import Parts


class Forecast:
    """What was foretold for a run.

    Collective: rank 0 plans, all ranks tell what memory they hold. Raises what `plan.profiles.find_machine` and
    `plan.outlook.outlook` raise, on all ranks.
    """

    def __init__(self, parts: Parts):
        self.parts, self.outlook = parts, None
        with agreed(parts.comm):
            if parts.topology.rank == 0:
                from hpcmlp.plan.outlook import outlook  # the other ranks do without
                from hpcmlp.plan.profiles import find_machine
                c = parts.config
                machine = find_machine(c.machine, c.network)
                on_disk = sum(e.bytes for entries in parts.manifest.splits.values() for e in entries)
                name = parts.exchange.name
                w = replace(parts.workload(name), only_messages=name == "server" and bool(parts.exchange.note))
                self.outlook: dict[str, Any] | None = outlook(w, machine, on_disk)

    def line(self) -> tuple[str, str]:
        """Return name and value of the header's line. Local, on rank 0."""
        from hpcmlp.plan.text import duration, num_bytes, num_flops
        o = self.outlook
        text = (f"{num_flops(o['flops_per_step'])} a step, {num_bytes(o['memory_bytes_per_node'])} a node, "
                f"{o['sent_bytes_per_rank_and_step']:,} bytes sent a rank and step")
        if "step_s" in o:
            text += f"; {duration(o['step_s'])} a step, {duration(o['run_s'])} in all on {o['machine']}"
        return "plan", text

    def compare(self, account: Account, parts_s: dict[str, float]) -> dict[str, Any] | None:
        """Return foretold and measured side by side on rank 0, None elsewhere.

        Collective. parts_s : what a step spent on what (`Account.median_parts_s`).
        """
        from hpcmlp.run.memory import held_bytes  # at the end
        p = self.parts
        own, code = (np.array([float(value)]) for value in held_bytes())
        messages.sum_in_place(p.topology.node, own)
        messages.max_in_place(p.topology.node, code)
        if self.outlook is None:
            return None
        from hpcmlp.plan.compare import compare
        # What is foretold is the mean over a round of local steps; out of step nobody counts by steps.
        alike = not p.local and p.apart is None
        measured = {"step_s": account.median_step_s or None, "parts_s": parts_s,
                    "memory_bytes_per_node": float(own[0] + code[0]) or None,
                    "sent_bytes_per_rank_and_step": account.bytes_sent if alike else None}
        names = ("flops_per_step", "flops_per_run", "memory_parts", "step_parts_s", "run_s", "bound", "machine")
        return {**{name: self.outlook[name] for name in names if name in self.outlook},
                **compare(self.outlook, measured)}
