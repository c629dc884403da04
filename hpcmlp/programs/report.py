"""Draw learning curves and the split of time from a run's log, and the timeline of a run that was traced."""

from pathlib import Path
from typing import Any

from hpcmlp.comm.agreement import agreed
from hpcmlp.config import ReportConfig
from hpcmlp.errors import CannotWrite, ConfigError
from hpcmlp.run import timeline
from hpcmlp.run.curves import draw_curves, read_records


def main(config: ReportConfig, comm: Any) -> int:
    """Draw `curves.png` of the runs over each other, and tell and draw the timeline of a single one that has a trace.

    Collective over `comm`; rank 0 does all. Returns 0, or raises HpcmlpError: 78 without matplotlib, 66 without a log,
    65 for a damaged log or trace, 73 where nothing can be written.
    """
    with agreed(comm):
        if comm.rank == 0:
            directory = _directory(config)
            traces = [path for path in (Path(run) / "trace.json" for run in config.runs) if path.exists()]
            if len(config.runs) == 1 and traces:
                ranks = timeline.read_trace(traces[0])
                print("\n".join(timeline.table(traces[0], ranks)))
            print(_drawn(draw_curves(config.runs, directory / "curves.png"), directory / "curves.png"))
            if len(config.runs) == 1 and traces:
                print(_drawn(timeline.draw(ranks, directory / "timeline.png"), directory / "timeline.png"))
            elif traces:
                print(f"timelines are drawn of one run at a time: {', '.join(map(str, traces))}")
            for line in [*planned(config.runs), *served(config.runs)]:
                print(line)
    return 0


def planned(runs: tuple[str, ...]) -> list[str]:
    """Return the lines that set what was foretold beside what was measured, of runs that have finished. Local."""
    import json

    from hpcmlp.plan.compare import lines
    told = []
    for run in runs:
        try:
            summary = json.loads(Path(run, "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue    # not finished
        if isinstance(summary, dict) and isinstance(summary.get("plan"), dict):
            told += [f"{run}:", *lines(summary["plan"])]
    return told


def served(runs: tuple[str, ...]) -> list[str]:
    """Return the lines that tell what the servers of runs with --sync server did, over all epochs. Local."""
    lines = []
    for run in runs:
        told = [record for record in read_records(run) if record.get("kind") == "server"]
        if told:
            from hpcmlp.sync.storage import add_reports, report_table
            lines += [f"{run}:", *report_table(add_reports(told))]
    return lines


def _directory(config: ReportConfig) -> Path:
    """Return where the pictures go, made if need be."""
    directory = Path(config.out or config.runs[0])
    if config.out:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotWrite(f"{directory}: cannot make this directory ({error.strerror}).") from None
    return directory


def _drawn(missing: str | None, path: Path) -> Path:
    """Return the path of the picture, or raise the sentence that says why there is none."""
    if missing:
        raise ConfigError(missing[0].upper() + missing[1:])
    return path
