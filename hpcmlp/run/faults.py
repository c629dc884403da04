"""Faults on purpose, for tests: HPCMLP_FAULT="rank=1,step=40,act=kill" in the environment.

`rank` (one, or several as 1+2) and `step` select where; without them every rank, every step. `act` is one of: kill,
stop (SIGSTOP), spin (for ever), hold (hours of C code that keeps the interpreter), sleep:SECONDS, signal:NAME (such as
SIGUSR1, to this rank alone), raise, exit:CODE, flip (one bit of the parameters), nan (a parameter), scale:FACTOR (all
parameters), leave (a worker out of step says good-bye). With a step it is done once. Unset, it costs one `is None` a
step.
"""

import os
import signal
import time
from typing import Any

from hpcmlp.errors import ConfigError


class Fault:
    """One planned fault of this rank."""

    def __init__(self, step: int | None, act: str):
        self.step = step
        self.act, _, self.argument = act.partition(":")
        self._struck = False

    def strike(self, step: int, params: Any) -> bool:
        """Do the fault when its step has come; return whether this rank shall leave the run. Local."""
        if self.step is not None and (step != self.step or self._struck):
            return False  # once, also where a run goes back and takes the step again
        self._struck = True
        if self.act in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self.act == "kill" else signal.SIGSTOP)
        elif self.act == "signal":
            os.kill(os.getpid(), signal.Signals[self.argument])
        elif self.act == "sleep":
            time.sleep(float(self.argument))
        elif self.act == "raise":
            raise RuntimeError(f"fault on purpose at step {step}")
        elif self.act == "exit":
            os._exit(int(self.argument))
        elif self.act == "flip":
            params.view("uint32")[0] ^= 1
        elif self.act == "scale":
            params *= float(self.argument)
        elif self.act == "nan":
            params[0] = float("nan")
        elif self.act == "hold":
            sum(range(10**12))
        elif self.act == "spin":
            while True:
                pass
        return self.act == "leave"


ACTS = ("kill", "stop", "spin", "hold", "leave", "signal", "sleep", "raise", "exit", "flip", "nan", "scale")


def planned_fault(rank: int) -> Fault | None:
    """Return the fault that the environment plans for `rank`, or None. Local; raises ConfigError."""
    text = os.environ.get("HPCMLP_FAULT")
    if not text:
        return None
    try:
        words = dict(word.split("=", 1) for word in text.split(","))
        step = int(words["step"]) if "step" in words else None
        own = str(rank) in words.get("rank", str(rank)).split("+")
        if words["act"].split(":")[0] not in ACTS:
            raise ValueError
    except (ValueError, KeyError):
        raise ConfigError(f"HPCMLP_FAULT = {text!r}: give rank=R,step=N,act=A with A among "
                          f"{', '.join(ACTS)}.") from None
    return Fault(step, words["act"]) if own else None
