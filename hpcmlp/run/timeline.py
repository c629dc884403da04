"""A run's trace.json read back: what share of its steps each rank spent on what, and a picture of a few steps.

Events nest, so each counts with the time that no event inside it covers: a wait inside a reduce is a wait. Events of
other threads than the one that takes the steps go on behind it and are told apart. matplotlib (the extra `plot`) is
imported when a picture is drawn.
"""

import io
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hpcmlp.data.files import write_atomically
from hpcmlp.errors import DataError, InputMissing
from hpcmlp.run.curves import figure_classes

KINDS = ("input", "forward", "backward", "check", "reduce", "wait", "update", "share", "validation", "other", "behind")
# How an event's name begins: its kind. "other" is what a step spends outside all of them.
BEGINNINGS = {"input": "input", "gather rows": "input", "forward": "forward", "loss": "forward",
              "backward": "backward", "check": "check", "reduce": "reduce", "norm": "reduce", "wait": "wait",
              "update": "update", "share": "share", "all_gather": "share", "validation": "validation",
              "save": "validation"}
COLORS = {"input": "tab:brown", "forward": "tab:blue", "backward": "tab:cyan", "check": "tab:olive",
          "reduce": "tab:orange", "wait": "tab:red", "update": "tab:green", "share": "tab:purple",
          "validation": "0.4", "other": "0.85", "behind": "tab:pink"}
DRAWN_STEPS = 3
DRAWN_RANKS = 32
MISSING = "the timeline is not drawn: this needs matplotlib (pip install 'hpcmlp[plot]')."


@dataclass
class Span:
    """One event, whole nanoseconds; `own_ns` is its time without the events inside it."""

    name: str
    begin_ns: int
    end_ns: int
    step: int
    own_ns: int = 0

    @property
    def kind(self) -> str:
        """Return what it counts as."""
        return next((kind for start, kind in BEGINNINGS.items() if self.name.startswith(start)), "other")


@dataclass
class RankSpans:
    """The events of one rank, outer before inner: those of the thread that takes the steps, and all others."""

    main: list[Span] = field(default_factory=list)
    behind: list[Span] = field(default_factory=list)

    def steps(self) -> list[Span]:
        """Return the whole steps, in order."""
        return [span for span in self.main if span.name == "step"]


def read_trace(path: str | os.PathLike) -> list[RankSpans]:
    """Return the events of each rank of a trace.json.

    Local. Raises InputMissing when it cannot be read, DataError when it is no timeline of ours.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        # The file has microseconds with three places: only as whole numbers does one step end where the next begins.
        events = [(e["pid"], e["tid"], Span(e["name"], round(1e3 * e["ts"]), round(1e3 * (e["ts"] + e["dur"])),
                                            e["args"]["step"])) for e in content["traceEvents"] if e["ph"] == "X"]
        ranks = [RankSpans() for _ in range(content["otherData"]["ranks"])]
    except OSError as error:
        raise InputMissing(f"{path}: cannot read this timeline ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path}: not a timeline written by 'hpcmlp train --trace'.") from None
    threads: dict[tuple[int, int], list[Span]] = {}
    for pid, tid, span in events:
        threads.setdefault((pid, tid), []).append(span)
    for (pid, _), spans in threads.items():
        spans.sort(key=lambda span: (span.begin_ns, -span.end_ns))
        _find_own_times(spans)
        if not 0 <= pid < len(ranks):
            raise DataError(f"{path}: an event of rank {pid} in a timeline of {len(ranks)} ranks.")
        (ranks[pid].main if any(span.name == "step" for span in spans) else ranks[pid].behind).extend(spans)
    return ranks


def _find_own_times(spans: list[Span]) -> None:
    """Set `own_ns` of the spans of a thread, which come in the order of their beginnings, outer first."""
    around: list[Span] = []
    for span in spans:
        span.own_ns = span.end_ns - span.begin_ns
        while around and around[-1].end_ns <= span.begin_ns:
            around.pop()
        if around:
            around[-1].own_ns -= span.own_ns
        around.append(span)


def shares(rank: RankSpans) -> dict[str, float]:
    """Return the share of the time in steps by kind; those of one thread sum to 1, `behind` comes on top. Local."""
    total = sum(step.end_ns - step.begin_ns for step in rank.steps())
    found = dict.fromkeys(KINDS, 0.0)
    for span in rank.main:
        found[span.kind] += span.own_ns
    found["behind"] = sum(span.own_ns for span in rank.behind)
    return {kind: ns / total if total else 0.0 for kind, ns in found.items()}


def table(path: str | os.PathLike, ranks: list[RankSpans]) -> Iterator[str]:
    """Yield the lines of a table: per rank the median step and the shares in per cent. Local."""
    steps = [len(rank.steps()) for rank in ranks]
    yield f"{path}: {max(steps, default=0)} steps of {len(ranks)} rank(s), % of their time; open it at " \
          "ui.perfetto.dev or chrome://tracing"
    parts = [shares(rank) for rank in ranks]
    kinds = [kind for kind in KINDS if any(part[kind] > 0 for part in parts)]
    yield "rank  step ms  " + "  ".join(kinds)
    for number, (rank, part) in enumerate(zip(ranks, parts, strict=True)):
        ms = [(step.end_ns - step.begin_ns) / 1e6 for step in rank.steps()]
        cells = "  ".join(f"{100 * part[kind]:{len(kind)}.1f}" for kind in kinds)
        yield f"{number:4d}  {statistics.median(ms) if ms else 0.0:7.3f}  {cells}"


def draw(ranks: list[RankSpans], out: str | os.PathLike) -> str | None:
    """Draw the middle steps of all ranks under each other into the PNG file `out`, atomically.

    Local. Returns None, or one sentence when there is no picture because matplotlib is not installed. Of more than
    DRAWN_RANKS ranks the first are drawn. Raises CannotWrite.
    """
    try:
        Figure, FigureCanvasAgg = figure_classes()
    except ImportError:
        return MISSING
    drawn = ranks[:DRAWN_RANKS]
    numbers = sorted({span.step for rank in drawn for span in rank.steps()})
    middle = len(numbers) // 2
    numbers = set(numbers[max(0, middle - DRAWN_STEPS // 2):][:DRAWN_STEPS])
    figure = Figure(figsize=(12, 1.5 + 0.5 * max(1, len(drawn))))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    chosen = [[span for span in rank.main if span.step in numbers] for rank in drawn]
    zero = min((span.begin_ns for spans in chosen for span in spans), default=0)
    labelled = set()
    for number, (rank, spans) in enumerate(zip(drawn, chosen, strict=True)):
        behind = [span for span in rank.behind if span.step in numbers]
        # inner events come after outer ones and are painted over them
        for rows, low, high in ((spans, -0.4, 0.25), (behind, 0.27, 0.4)):
            for kind, bars in _runs(rows, "behind" if rows is behind else None):
                places = [((begin - zero) / 1e3, (end - begin) / 1e3) for begin, end in bars]
                axes.broken_barh(places, (number + low, high - low), color=COLORS[kind],
                                 label=None if kind in labelled else kind)
                labelled.add(kind)
        for step in (span for span in spans if span.name == "step"):
            axes.vlines((step.begin_ns - zero) / 1e3, number - 0.45, number + 0.45, color="k", linewidth=0.8)
    named = f"steps {min(numbers)} to {max(numbers)}" if numbers else "no steps"
    axes.set(xlabel="us", yticks=range(len(drawn)), yticklabels=[f"rank {k}" for k in range(len(drawn))],
             ylim=(len(drawn) - 0.4, -0.6),
             title=f"{named}, {len(drawn)} of {len(ranks)} ranks" if len(drawn) < len(ranks) else named)
    if labelled:
        figure.legend(fontsize="small", loc="lower center", ncols=len(KINDS))
    figure.subplots_adjust(0.07, 0.75 / figure.get_figheight() + 0.1, 0.98, 0.9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": "hpcmlp"})
    write_atomically(out, image.getvalue())
    return None


def _runs(spans: list[Span], kind: str | None) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Yield (kind, bars) for runs of spans of one kind, in order, so that few artists are drawn."""
    last, bars = None, []
    for span in spans:
        this = kind or span.kind
        if this != last and bars:
            yield last, bars
            bars = []
        last = this
        bars.append((span.begin_ns, span.end_ns))
    if bars:
        yield last, bars
