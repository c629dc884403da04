"""What servers store and did: the slices of the flat vector, and reports as values, lines and tables."""

import math
from typing import Any

import numpy as np

from hpcmlp.comm.served import Roles
from hpcmlp.sync.buckets import Bucket, part_bounds


def slice_bounds(length: int, servers: int) -> np.ndarray:
    """Return (servers + 1,) int64 offsets of the servers' slices, multiples of 16. Local."""
    return part_bounds(length, servers)


def one_bucket(length: int, roles: Roles) -> list[Bucket]:
    """Return the flat vector as one bucket whose parts are the servers' slices; empty ones for workers. Local."""
    bounds = slice_bounds(length, roles.servers)
    return [Bucket(0, length, np.concatenate([bounds, np.full(roles.size - roles.servers, length)]))]


def describe_slices(length: int, roles: Roles, moments: int, version: int, staleness: str) -> dict[str, Any]:
    """Return who stores, trains and loads what, as JSON-able values for a checkpoint's meta. Local."""
    bounds = slice_bounds(length, roles.servers).tolist()
    slices = [{"rank": rank, "start": a, "stop": b, "version": version, "bytes": 4 * (b - a),
               "optimizer_bytes": 4 * moments * (b - a)}
              for rank, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))]
    return {"servers": roles.servers, "workers": list(roles.workers), "staleness": staleness, "slices": slices}


def in_step_report(collective: Any, steps: int) -> dict[str, Any]:
    """Return what `Apart.report` returns, for `comm.served`'s collectives after `steps` steps. Local.

    The bytes are those of rank 0, a server; the collective counts anew. In node memory nothing is pulled: parameters
    are read where they stand.
    """
    workers = len(collective.roles.workers)
    report = {"staleness": {"0": workers * steps} if steps else {}, "workers": [],
              "bytes_pushed": collective.bytes_received, "bytes_pulled": collective.bytes_sent}
    collective.bytes_sent = collective.bytes_received = 0
    return report


def report_line(report: dict[str, Any]) -> str:
    """Return the console's line of a report. Local."""
    pushes = sum(report["staleness"].values()) or 1
    shares = " ".join(f"{k}: {100 * count / pushes:.0f} %" for k, count in report["staleness"].items())
    waits = "  ".join(f"rank {w['rank']} {w['pushes']} pushes, waited {w['wait_s']:.1f} s" for w in report["workers"])
    return (f"  servers  staleness {shares or '-'}  {waits}{'  ' if waits else ''}"
            f"{report['bytes_pushed'] / 2**20:,.1f} MiB pushed, {report['bytes_pulled'] / 2**20:,.1f} MiB pulled")


def add_reports(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of several reports. Local."""
    total: dict[str, Any] = {"staleness": {}, "workers": {}, "bytes_pushed": 0, "bytes_pulled": 0}
    for report in reports:
        for key, count in report["staleness"].items():
            total["staleness"][key] = total["staleness"].get(key, 0) + count
        for worker in report["workers"]:
            kept = total["workers"].setdefault(worker["rank"], dict.fromkeys(worker, 0) | {"rank": worker["rank"]})
            kept |= {name: kept[name] + worker[name] for name in ("pushes", "compute_s", "wait_s")}
        for name in ("bytes_pushed", "bytes_pulled"):
            total[name] += report[name]
    return total | {"workers": [total["workers"][rank] for rank in sorted(total["workers"])],
                    "staleness": {k: total["staleness"][k] for k in sorted(total["staleness"], key=int)}}


def report_table(total: dict[str, Any]) -> list[str]:
    """Return the histogram of staleness and what each worker did, as lines of text. Local."""
    pushes = sum(total["staleness"].values()) or 1
    rows = [(int(key), count) for key, count in total["staleness"].items()]
    lines = ["  staleness   pushes"]
    lines += [f"  {key:>9} {count:>8} {'#' * math.ceil(40 * count / pushes)}" for key, count in rows]
    if total["workers"]:
        lines.append("  worker      pushes  computed s  waited s")
        lines += [f"  rank {w['rank']:<4} {w['pushes']:>8} {w['compute_s']:>11.2f} {w['wait_s']:>9.2f}"
                  for w in total["workers"]]
    return [*lines, f"  {total['bytes_pushed']:,} bytes pushed, {total['bytes_pulled']:,} pulled"]
