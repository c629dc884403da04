"""Learning curves as a picture: loss, validation metric, learning rate and the split of time, for one or more runs.

matplotlib (the extra `plot`) is imported when a picture is drawn, and only its figure and its PNG canvas: no pyplot, no
window system, no state that outlives the call.
"""

import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcmlp.data.files import write_atomically
from hpcmlp.errors import DataError, InputMissing

MAIN_METRICS = ("accuracy", "label_accuracy", "rmse")  # the first one that a run has is drawn
_LARGEST = 1e100
TIME_PARTS = ("compute", "comm", "wait", "input")
MISSING = "learning curves are not drawn: this needs matplotlib (pip install 'hpcmlp[plot]')."


def figure_classes() -> tuple[Any, Any]:
    """Return matplotlib's figure and its PNG canvas; ImportError where it is not installed.

    Local. Its list of fonts is kept with the temporary files of this user, not in the home directory, where thousands
    of jobs would meet; MPLCONFIGDIR wins.
    """
    if "MPLCONFIGDIR" not in os.environ:
        folder = os.path.join(tempfile.gettempdir(), f"hpcmlp-{os.getuid()}-fonts")
        try:
            os.mkdir(folder, 0o700)
        except OSError:     # most often it is there already
            pass
        status = os.lstat(folder) if os.path.isdir(folder) else None
        if status is None or status.st_uid != os.getuid():
            folder = tempfile.mkdtemp(prefix="hpcmlp-fonts-")
        os.environ["MPLCONFIGDIR"] = folder
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    return Figure, FigureCanvasAgg


def read_records(run: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl, in order; a torn last line is left out.

    Local. Raises InputMissing when there is no such file, DataError for a line that is no JSON object.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputMissing(f"{path}: cannot read this log ({error.strerror}); give the --out of a 'hpcmlp train'."
                           ) from None
    records = []
    for number, line in enumerate(lines[:-1]):  # what follows the last newline was cut off while being written
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise DataError(f"{path}: line {number + 1} is not a JSON object.")
        records.append(record)
    return records


def draw_curves(runs: Sequence[str | os.PathLike], out: str | os.PathLike) -> str | None:
    """Draw the learning curves of `runs` over each other into the PNG file `out`, atomically.

    Local. Returns None, or one sentence when there is no picture because matplotlib is not installed.

    Raises
    ------
    InputMissing, DataError : a run has no log, or a damaged one.
    CannotWrite : `out` cannot be written.
    """
    try:
        Figure, FigureCanvasAgg = figure_classes()
    except ImportError:
        return MISSING
    figure = Figure(figsize=(11, 7))
    figure.subplots_adjust(0.07, 0.07, 0.98, 0.95, 0.15, 0.28)  # a computed layout would double the time of drawing
    FigureCanvasAgg(figure)
    (loss, metric), (rate, time) = figure.subplots(2, 2)
    names = _short_names([Path(run) for run in runs])
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        records = read_records(run)
        steps = [r for r in records if r.get("kind") == "step"]
        epochs = [r for r in records if r.get("kind") == "epoch"]
        color = f"C{number % 10}"
        _draw_loss(loss, steps, epochs, color, name)
        _draw_metric(metric, epochs, color, name)
        rate.plot(*_points(steps, "step", "lr"), color=color, label=name)
        _draw_time(time, steps, epochs, number, name)
    time.set(title="share of time", xlim=(0, 100), ylim=(-0.6, len(names)), yticks=[], xlabel="% of the time in steps")
    time.legend(fontsize="small", loc="upper center", ncols=len(TIME_PARTS))
    _finish(loss, "loss", True)
    _finish(metric, metric.get_title() or "validation metric", len(names) > 1)
    rate.set_ylim(bottom=0.0)
    _finish(rate, "learning rate", len(names) > 1)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": "hpcmlp"})
    write_atomically(out, image.getvalue())
    return None


def _short_names(runs: list[Path]) -> list[str]:
    """Names of the runs in the legend: the last part of the path, the whole path where that is not unique."""
    last = [Path(os.path.abspath(run)).name for run in runs]
    return [name if last.count(name) == 1 else str(run) for name, run in zip(last, runs, strict=True)]


def _points(records: list[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """The records that hold numbers for both keys (a loss that was not finite is null)."""
    pairs = [(r[x], r[y]) for r in records if _drawable(r.get(x)) and _drawable(r.get(y))]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _drawable(value: Any) -> bool:
    """Whether a value out of a log is a number that axes can have."""
    return type(value) in (int, float) and abs(value) < _LARGEST


def _draw_loss(axes: Any, steps: list[dict], epochs: list[dict], color: str, name: str) -> None:
    axes.plot(*_points(steps, "step", "loss"), color=color, linewidth=0.7, alpha=0.5)
    axes.plot(*_points(epochs, "step", "train_loss"), color=color, marker="o", markersize=3, label=f"{name} train")
    val = [{"step": r.get("step"), "loss": _val(r).get("loss")} for r in epochs]
    x, y = _points(val, "step", "loss")
    if x:
        axes.plot(x, y, color=color, linestyle="--", marker="s", markersize=3, label=f"{name} validation")
    values = [v for line in axes.get_lines() for v in line.get_ydata()]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")


def _val(record: dict[str, Any]) -> dict[str, Any]:
    val = record.get("val")
    return val if isinstance(val, dict) else {}


def _draw_metric(axes: Any, epochs: list[dict], color: str, name: str) -> None:
    key = next((k for k in MAIN_METRICS if any(k in _val(r) for r in epochs)), None)
    if key is None:
        return
    drawn = axes.get_title()
    axes.set_title(f"validation {key}" if not drawn or drawn.endswith(key) else "validation metric")
    points = _points([{"step": r.get("step"), key: _val(r).get(key)} for r in epochs], "step", key)
    axes.plot(*points, color=color, marker="o", markersize=3, label=name)


def _draw_time(axes: Any, steps: list[dict], epochs: list[dict], number: int, name: str) -> None:
    """One bar: seconds of all epochs, or of the logged steps of a run shorter than an epoch."""
    spent = [r["seconds"] for r in epochs if isinstance(r.get("seconds"), dict)]
    seconds = [sum(s[part] for s in spent if _drawable(s.get(part))) for part in TIME_PARTS]
    if not sum(seconds):
        seconds = [sum(_points(steps, "step", f"{part}_s")[1]) for part in TIME_PARTS]
    total = sum(seconds)
    axes.text(1.0, number + 0.25, name)
    left = 0.0
    for i, (part, value) in enumerate(zip(TIME_PARTS, seconds, strict=True)):
        share = 100.0 * value / total if total else 0.0
        axes.barh(number, share, left=left, height=0.4, color=("0.35", "0.55", "0.72", "0.87")[i],
                  label=part if number == 0 else None)
        if share > 6:
            axes.text(left + share / 2, number, f"{share:.0f} %", ha="center", va="center", color="w" if i < 1 else "k")
        left += share


def _finish(axes: Any, title: str, legend: bool) -> None:
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
