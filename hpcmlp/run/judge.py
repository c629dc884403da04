"""Validation within a run: metrics of the usable parameters, and whether they are the best so far."""

import math
from typing import Any

import numpy as np

from hpcmlp.comm.agreement import alike
from hpcmlp.errors import ConfigError
from hpcmlp.nn.network import EVALUATION_ROWS, Network
from hpcmlp.run.parts import Parts

HIGHER_IS_BETTER = ("accuracy", "label_accuracy", "subset_accuracy", "top", "auc", "f1", "precision", "recall", "r2")


class Judge:
    """Evaluates parameters of a run while it goes on.

    Local.

    parts : of the run. monitor : the metric to get better, "auto" for accuracy of classes and loss of other tasks.
    """

    def __init__(self, parts: Parts, monitor: str):
        self._parts = parts
        self.monitor = monitor if monitor != "auto" else \
            ("accuracy" if parts.manifest.task == "classification" else "loss")
        self._network: Any = None   # for parameters that are not the live ones

    def validate(self) -> dict[str, Any]:
        """Evaluate the validation rows with the usable parameters and keep them when they are the best so far.

        Collective. Raises ConfigError when there is no metric of the monitored name.
        """
        session = self._parts.session
        usable, progress = session.usable(), session.progress
        val = self.evaluate(self._parts.val, usable)
        if self.monitor not in val:
            raise alike(ConfigError(f"--monitor {self.monitor!r} is not a validation metric of this run; legal: "
                                    f"{', '.join(sorted(val))}."))
        value = val[self.monitor]
        sign = -1.0 if self.monitor.startswith(HIGHER_IS_BETTER) else 1.0
        if math.isfinite(value) and (progress.best_value is None or sign * value < sign * progress.best_value):
            progress.best_value, progress.best_step, progress.best_val = value, progress.step, val
            progress.worse = 0
            session.keep_best(usable)
        else:
            progress.worse += 1
        return val

    def evaluate(self, loader: Any, flat: np.ndarray) -> dict[str, Any]:
        """Return the metrics of the parameters `flat`, as the session gives them; the live ones stay as they are.

        Collective.
        """
        from hpcmlp.run.evaluation import evaluate_split  # after the first epoch, not before the first step
        p = self._parts
        network = p.network
        if p.sharded:
            from hpcmlp.run.together import Entered, InTurns  # only where layers are gathered
            turns = InTurns(loader, network.max_rows)
            with p.strategy.showing(flat):
                found = evaluate_split(Entered(network, p.strategy, turns.count), p.ops, p.loss, turns, p.comm,
                                       p.manifest, full=False)
            network.forget()
            return found
        if p.on_device or flat is not network.params:
            if self._network is None:
                self._network = self._open()
            network = self._network
            if p.on_device:     # its vectors are padded, to other lengths
                network.set_params(network.layout.pack(p.network.layout.views(flat)))
            else:
                p.ops.from_host(flat, network.params)
        found = evaluate_split(network, p.ops, p.loss, loader, p.comm, p.manifest, full=False)
        if not p.on_device:
            network.forget()    # the samples' buffer, which training has no use for
        return found

    def _open(self) -> Any:
        p = self._parts
        rows = min(EVALUATION_ROWS, max(p.manifest.rows("val"), p.manifest.rows("test")))
        if not p.on_device:
            return Network(p.spec, p.ops, rows)
        from hpcmlp.nn.planned_forward import Predictor
        return Predictor(p.spec, p.on_device.device, rows)
