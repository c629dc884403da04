"""A SLURM script for a planned run: one of jobs/ with its values filled in."""

import re
from pathlib import Path
from typing import Any

from hpcmlp.errors import ConfigError, InputMissing

SCRIPTS = {"cpu": "train-cpu.sh", "gpu": "train-gpu.sh"}
TASKS_LINE = "#SBATCH --cpus-per-task="
MEMORY_MARGIN = 1.15


def template(device: str) -> str:
    """Return the text of the job script for `device`: of jobs/ here, else beside the installed sources.

    Local. Raises InputMissing where there is none.
    """
    name = SCRIPTS[device]
    places = (Path("jobs"), Path(__file__).resolve().parents[2] / "jobs")
    for place in places:
        try:
            return (place / name).read_text(encoding="utf-8")
        except OSError:
            continue
    raise InputMissing(f"jobs/{name} is not here; run 'hpcmlp plan --write-job' in the directory that holds jobs/.")


def fill_in(text: str, outlook: dict[str, Any], threads: int, device: str, data: str | None, run: str | None,
            options: list[str]) -> str:
    """Return the script `text` with nodes, ranks, cores, memory, time limit, data, run directory and options.

    Local. The memory is what is foretold and a margin, the time limit `time_limit_s` of the outlook where times are
    known. Raises ConfigError when the script has no line for a value, or a value cannot stand in it.
    """
    per_node = -(-outlook["ranks"] // outlook["nodes"])
    mib = round(MEMORY_MARGIN * (outlook["memory_bytes_per_node"] + outlook["memory_moment_bytes"]) / 2**20) + 64
    values = {"nodes": outlook["nodes"], "ntasks-per-node": per_node, "cpus-per-task": threads}
    if device == "gpu":
        values["gpus-per-node"] = per_node
    if "time_limit_s" in outlook:
        values["time"] = clock(outlook["time_limit_s"])
        options = [*options, f"--time-limit {max(1.0, outlook['time_limit_s'] / 60 - 2):.0f}"]
    for name, value in values.items():
        text = _replace(text, rf"^#SBATCH --{name}=.*$", f"#SBATCH --{name}={value}", f"#SBATCH --{name}=")
    text = re.sub(r"^#SBATCH --mem=.*\n", "", text, flags=re.MULTILINE)
    text = _replace(text, rf"^({TASKS_LINE}.*)$", rf"\1\n#SBATCH --mem={mib}M", TASKS_LINE)
    for name, given in (("DATA", data), ("RUN", run), ("OPTIONS", " ".join(options))):
        if given is None:
            continue
        if re.search(r"[\"'`$\\\n}]", given) or (name != "OPTIONS" and re.search(r"\s", given)):
            raise ConfigError(f"{given!r} cannot stand in a job script: use names without spaces, quotes, $ and "
                              "braces.")
        quoted = f'"{given}"' if name == "OPTIONS" else given
        text = _replace(text, rf"^{name}=\$\{{{name}:-.*?\}}(\s+#.*)?$",
                        lambda m, n=name, q=quoted: f"{n}=${{{n}:-{q}}}{m[1] or ''}", f"{name}=")
    return text


def clock(seconds: float) -> str:
    """Return seconds as SLURM's hours:minutes:seconds, whole minutes. Local."""
    minutes = max(1, -(-int(seconds) // 60))
    return f"{minutes // 60:02d}:{minutes % 60:02d}:00"


def _replace(text: str, pattern: str, by: Any, what: str) -> str:
    text, count = re.subn(pattern, by, text, flags=re.MULTILINE)
    if count != 1:
        raise ConfigError(f"the job script has {count or 'no'} lines '{what}...' to fill in; take the one that came "
                          "with this version.")
    return text
