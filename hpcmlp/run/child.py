"""Python code tried in a process of its own, where a crash or a hang does no harm."""

import os
import subprocess
import sys

from hpcmlp.launch import without_launcher

PATIENCE_S = 60


def run_child(code: str, patience_s: float = PATIENCE_S) -> tuple[int, str]:
    """Run Python code in a process without this one's launcher; return its exit code (124: too slow) and output. Local.
    """
    try:
        done = subprocess.run([sys.executable, "-c", code], env=without_launcher(os.environ), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=patience_s, text=True,
                              errors="replace")
    except subprocess.TimeoutExpired:
        return 124, f"no answer in {patience_s:g} s"
    return done.returncode, done.stdout


def last_line(text: str) -> str:
    """Return the last line that says something. Local."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no word")
