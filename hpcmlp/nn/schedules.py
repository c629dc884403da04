"""The learning rate as a pure function of the step.

After `warmup_steps` steps of linear growth to `lr` the schedule runs over the remaining steps: t = step - warmup_steps,
T = total_steps - warmup_steps (conventions of torch.optim.lr_scheduler, in closed form):
  constant     lr
  step         lr * gamma ** (t // step_size)
  exponential  lr * gamma ** (t / interval), so `gamma` is the factor of one interval (1 step, or the steps of an epoch)
  cosine       min_lr + (lr - min_lr) * (1 + cos(pi * t / T)) / 2, and min_lr after the end
  one_cycle    cosine growth from lr / div_factor to lr over the first `pct_start` of all steps, then cosine decay to
               lr / (div_factor * final_div_factor) at the last (Smith and Topin 2017, arXiv:1708.07120). It warms up by
               itself: here `warmup_steps`, when given, is the length of the growth instead of `pct_start`.
"""

import math

from hpcmlp.errors import ConfigError

DEFAULTS: dict[str, dict[str, float]] = {
    "constant": {},
    "step": {"step_size": 1000, "gamma": 0.1},
    "exponential": {"gamma": 0.99, "interval": 1},
    "cosine": {"min_lr": 0.0},
    "one_cycle": {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4},
}
DEFAULT_EPOCHS = 10


def num_steps(steps: int | None, epochs: int | None, steps_per_epoch: int) -> int:
    """Return the steps of a run of so many `steps`, or else `epochs`, or else `DEFAULT_EPOCHS`. Local."""
    if steps is not None:
        return steps
    return (DEFAULT_EPOCHS if epochs is None else epochs) * steps_per_epoch


class Schedule:
    """The learning rate of every step.

    Local. Raises ConfigError when the numbers cannot work.

    Parameters
    ----------
    kind : constant, step, exponential, cosine or one_cycle.
    lr : peak learning rate.
    total_steps : steps of the whole run.
    warmup_steps : steps of linear warm-up; step s < warmup_steps has lr * (s + 1) / warmup_steps.
    options : of the kind, with the defaults of `DEFAULTS`.
    """

    def __init__(self, kind: str, lr: float, total_steps: int, warmup_steps: int = 0, **options: float) -> None:
        if kind not in DEFAULTS:
            raise ConfigError(f"schedule = {kind!r} is not known (legal: {', '.join(DEFAULTS)}).")
        odd = sorted(set(options) - set(DEFAULTS[kind]))
        if odd:
            raise ConfigError(f"schedule {kind} has no option {', '.join(odd)} "
                              f"(it has: {', '.join(DEFAULTS[kind]) or 'none'}).")
        if not 0 <= warmup_steps <= max(total_steps, 0):
            raise ConfigError(f"warmup_steps = {warmup_steps} does not fit into a run of {total_steps} steps; "
                              "give at most that many.")
        self.kind, self.peak, self.total_steps, self.warmup_steps = kind, float(lr), total_steps, warmup_steps
        self.options = DEFAULTS[kind] | options
        self._check()

    def _check(self) -> None:
        o = self.options
        if o.get("min_lr", 0.0) > self.peak:
            raise ConfigError(f"min_lr = {o['min_lr']} is above the peak lr = {self.peak}; give a smaller one.")
        for name in ("step_size", "interval", "gamma", "div_factor", "final_div_factor"):
            if name in o and not o[name] > 0:
                raise ConfigError(f"{name} = {o[name]} is out of range; it must be above 0.")
        if not 0.0 <= o.get("pct_start", 0.0) <= 1.0:
            raise ConfigError(f"pct_start = {o['pct_start']} is out of range; it must be from 0 to 1.")

    def lr(self, step: int) -> float:
        """Return the learning rate of `step` = 0, 1, ... Local."""
        if self.kind == "one_cycle":
            return self._one_cycle(step)
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        t, o = step - self.warmup_steps, self.options
        if self.kind == "step":
            return self.peak * o["gamma"] ** (t // o["step_size"])
        if self.kind == "exponential":
            return self.peak * o["gamma"] ** (t / o["interval"])
        if self.kind == "cosine":
            return _cosine(self.peak, o["min_lr"], t, self.total_steps - self.warmup_steps)
        return self.peak

    def _one_cycle(self, step: int) -> float:
        o = self.options
        start = self.peak / o["div_factor"]
        top = self.warmup_steps - 1.0 if self.warmup_steps else o["pct_start"] * self.total_steps - 1.0
        if step <= top:
            return _cosine(start, self.peak, step, top)
        top = max(top, 0.0)
        return _cosine(self.peak, start / o["final_div_factor"], step - top, self.total_steps - 1.0 - top)


def _cosine(first: float, last: float, t: float, steps: float) -> float:
    """Half a cosine from `first` at t = 0 to `last` at t >= steps."""
    if t >= steps:
        return last
    return last + (first - last) * (1.0 + math.cos(math.pi * t / steps)) / 2.0
