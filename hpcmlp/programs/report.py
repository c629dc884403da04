"""Draw learning curves and the split of time from a run's log."""

from pathlib import Path
from typing import Any

from hpcmlp.comm.agreement import agreed
from hpcmlp.config import ReportConfig
from hpcmlp.errors import CannotWrite, ConfigError
from hpcmlp.run.curves import draw_curves


def main(config: ReportConfig, comm: Any) -> int:
    """Draw `curves.png` of the runs over each other. Collective over `comm`; rank 0 draws.

    Returns 0, or raises HpcmlpError: 78 without matplotlib, 66 without a log.
    """
    with agreed(comm):
        if comm.rank == 0:
            print(draw(config))
            for line in served(config.runs):
                print(line)
    return 0


def served(runs: tuple[str, ...]) -> list[str]:
    """Return the lines that tell what the servers of runs with --sync server did, over all epochs. Local."""
    import json
    lines = []
    for run in runs:
        try:
            text = Path(run, "metrics.jsonl").read_text(encoding="utf-8")
        except OSError:
            continue    # the picture's own message says so
        told = [json.loads(line) for line in text.splitlines() if '"kind": "server"' in line]
        if told:
            from hpcmlp.sync.server import add_reports, report_table
            lines += [f"{run}:", *report_table(add_reports(told))]
    return lines


def draw(config: ReportConfig) -> Path:
    """Draw the picture and return its path. Local."""
    directory = Path(config.out or config.runs[0])
    if config.out:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotWrite(f"{directory}: cannot make this directory ({error.strerror}).") from None
    path = directory / "curves.png"
    missing = draw_curves(config.runs, path)
    if missing:
        raise ConfigError(missing[0].upper() + missing[1:])
    return path
