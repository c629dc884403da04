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
    return 0


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
