"""Who is late: a judgement over the signs of life of all ranks, and the one line that says it.

A rank's own age says nothing: the ranks that wait are as old as the one they wait for. So somebody must have waited
longer than the limit, and late is who does not wait: first who gives no sign of life at all, else who stands earliest
in the run. A slow rank moves on and is never late in this sense.
"""

from dataclasses import dataclass, replace

from hpcmlp.run.signs import Sign

# A silent rank is ended at twice the limit, one that shows life at five times, thirty times outside of steps: reading,
# evaluating and saving may take long, and a wait is no harm in itself.
SILENT, STUCK, LONG = 2.0, 5.0, 30.0
NEARLY = 0.75   # of the limit, and a rank is named among those that wait when one of them reaches it
NAMED = 8       # ranks that a line names one by one


@dataclass(frozen=True)
class Verdict:
    """Who waits, who is late (nobody: all wait for one another), and by what multiple of the limit all must end."""

    waiting: tuple[Sign, ...]
    late: tuple[Sign, ...]
    patience: float

    @property
    def waited_s(self) -> float:
        return max(sign.still_s for sign in self.waiting)

    @property
    def key(self) -> tuple:
        """What makes it the same wait when it is seen again."""
        return self.waiting[0].place, tuple(sign.rank for sign in self.late)


def judge(signs: list[Sign], limit_s: float) -> Verdict | None:
    """Return who is late, None while nobody has waited for `limit_s` seconds. Local."""
    silent_s = limit_s / 2
    present = [sign for sign in signs if not sign.leaves]
    waiting = sorted((sign for sign in present if sign.waits and sign.still_s >= NEARLY * limit_s
                      and sign.silent_s < silent_s), key=lambda sign: sign.rank)
    if not any(sign.still_s >= limit_s for sign in waiting):
        return None
    silent = [sign for sign in present if sign.silent_s >= silent_s]
    if silent:
        return Verdict(tuple(waiting), tuple(silent), SILENT)
    others = [sign for sign in present if not sign.waits and sign.place <= max(w.place for w in waiting)]
    first = min((sign.place for sign in others), default=None)
    if first is None:       # all wait: who stands behind the others, if anybody does
        others = [sign for sign in present if sign.waits]
        first = min(sign.place for sign in others)
        if all(sign.place == first for sign in others):
            return Verdict(tuple(waiting), (), STUCK)
    late = tuple(sign for sign in others if sign.place == first)
    in_steps = all(sign.phase in ("input", "step") for sign in late)
    return Verdict(tuple(waiting), late, STUCK if in_steps else LONG)


def sentence(verdict: Verdict, after: str) -> str:
    """Return the line: operation and step, who waits, who is late, where; `after` closes it. Local."""
    first = verdict.waiting[0]
    names = _ranks([sign.rank for sign in verdict.waiting])
    have = "has" if len(verdict.waiting) == 1 else "have"
    begin = f"{first.operation} of {_place(first)}: {names} {have} waited for {verdict.waited_s:.1f} s"
    if not verdict.late:
        return f"{begin}, and none is late: they wait for one another, or messages are lost between hosts; {after}"
    return f"{begin}; late: {'; '.join(map(_late, verdict.late[:NAMED]))}{_more(len(verdict.late))}; {after}"


def _late(sign: Sign) -> str:
    who = f"rank {sign.rank} (host {sign.host}, pid {sign.pid})"
    at = f" at {sign.line}" if sign.line else ""
    if not sign.state and sign.silent_s < 0.25 * sign.still_s:
        return f"{who} is alive in {_place(sign)}{at}"
    why = {"stopped": "is stopped", "gone": "is gone", "busy": "is in C code that holds the interpreter, or gets no "
           "processor", "": "cannot be reached: its host or the link to it is down, or it is stopped"}[sign.state]
    step = f", in {_place(sign)}" if sign.line else ""      # nothing has been heard of it yet
    return f"{who} {why}{step}, last sign of life {sign.silent_s:.1f} s ago{at}"


def _place(sign: Sign) -> str:
    return f"step {sign.step}" + (f" ({sign.phase})" if sign.phase != "step" else "")


def _ranks(ranks: list[int]) -> str:
    text = ", ".join(map(str, ranks[:NAMED])) + _more(len(ranks))
    return f"rank{'s' * (len(ranks) > 1)} {text}"


def _more(count: int) -> str:
    return f" and {count - NAMED} more" if count > NAMED else ""


def with_age(sign: Sign, seconds: float) -> Sign:
    """Return the sign as it stands `seconds` after it was sent: it has been silent since. Local."""
    return replace(sign, silent_s=sign.silent_s + seconds, still_s=sign.still_s + seconds)
