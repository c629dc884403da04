"""Python code tried in a process of its own, where a crash or a hang does no harm."""

import os
import subprocess
import sys

LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "OMPI_COMM", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "SLURM_")
PATIENCE_S = 60


def run_child(code: str, patience_s: float = PATIENCE_S) -> tuple[int, str]:
    """Run Python code in a process without this one's launcher; return its exit code (124: too slow) and output. Local.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    try:
        done = subprocess.run([sys.executable, "-c", code], env=environ, stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=patience_s, errors="replace")
    except subprocess.TimeoutExpired:
        return 124, f"no answer in {patience_s:g} s"
    return done.returncode, done.stdout


def last_line(text: str) -> str:
    """Return the last line that says something. Local."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no word")
