"""Make the table and the picture of a scaling study from what jobs/scaling.sh has measured.

    python jobs/scaling_table.py DIRECTORY

Reads DIRECTORY/steps.jsonl, one line per run: {"kind": "rank", "strong" or "weak", "nodes", "batch", "result": what
`bench step --json` printed}. Writes DIRECTORY/scaling.md and, where matplotlib is installed, DIRECTORY/scaling.png.
Speed-up and efficiency are against one node of the same study; the time of a point is the median of its repetitions.
"""

import json
import statistics
import sys
from pathlib import Path


def read_points(path):
    """Return {(kind, nodes): point} of the file; a point has ranks, batch, all step times in ms, and its medians."""
    points = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            result = record["result"]
            point = points.setdefault((record["kind"], record["nodes"]), {
                "kind": record["kind"], "nodes": record["nodes"], "ranks": result["ranks"], "batch": record["batch"],
                "times": [], "waits": [], "sync": result["sync"], "sizes": result["sizes"]})
            point["times"].append(result["step_ms"])
            point["waits"].append(result["parts"]["comm"])
        except (ValueError, KeyError, TypeError):
            sys.exit(f"{path}: line {number} is not a result of bench step; its job's output says what went wrong.")
    for point in points.values():
        point["step_ms"] = statistics.median(point["times"])
        point["comm"] = min(1.0, statistics.median(point["waits"]) / point["step_ms"])
        point["rate"] = 1000 * point["batch"] / point["step_ms"]
    return points


def efficiency(point, points):
    """Return (speed-up, efficiency) against one node, of the single rank against itself."""
    if point["kind"] == "rank":
        return 1.0, 1.0
    base = points["strong", 1]      # a weak study starts at the same point
    speedup = point["rate"] / base["rate"]
    return speedup, speedup / point["nodes"]


def table(points):
    """Return the study as a Markdown table."""
    sizes = "-".join(map(str, next(iter(points.values()))["sizes"]))
    lines = [f"Scaling of one training step, network {sizes}; median of "
             f"{max(len(p['times']) for p in points.values())} runs.", "",
             "| study | nodes | ranks | global batch | step ms | spread | samples/s | speed-up | efficiency | "
             "communication | sync |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for point in points.values():
        speedup, share = efficiency(point, points)
        spread = (max(point["times"]) - min(point["times"])) / point["step_ms"]
        name = {"rank": "one rank"}.get(point["kind"], point["kind"])
        lines.append(f"| {name} | {point['nodes']} | {point['ranks']} | {point['batch']} | {point['step_ms']:.3g} | "
                     f"{100 * spread:.0f} % | {point['rate']:,.0f} | {speedup:.2f} | {100 * share:.0f} % | "
                     f"{100 * point['comm']:.0f} % | {point['sync']} |")
    return "\n".join(lines) + "\n"


def draw(points, path):
    """Draw speed-up (strong) and efficiency (weak) over the nodes."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, kind, pick in ((left, "strong", 0), (right, "weak", 1)):
        shown = sorted((p for p in points.values() if p["kind"] == kind or (kind, p["kind"], p["nodes"]) ==
                        ("weak", "strong", 1)), key=lambda p: p["nodes"])
        nodes = [p["nodes"] for p in shown]
        axes.plot(nodes, [efficiency(p, points)[pick] for p in shown], "o-", label="measured")
        axes.plot(nodes, nodes if kind == "strong" else [1.0] * len(nodes), ":", color="gray", label="ideal")
        axes.set(xlabel="nodes", ylabel="speed-up" if kind == "strong" else "efficiency", xscale="log", xticks=nodes,
                 xticklabels=nodes, title=f"{kind} scaling", ylim=(0, None))
        axes.minorticks_off()
        axes.legend()
    figure.savefig(path, dpi=120)


def main(folder):
    folder = Path(folder)
    points = read_points(folder / "steps.jsonl")
    text = table(points)
    (folder / "scaling.md").write_text(text)
    print(text, end="")
    try:
        draw(points, folder / "scaling.png")
    except ImportError:
        print("No picture: matplotlib is not installed (pip install 'hpcmlp[plot]').")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python jobs/scaling_table.py DIRECTORY")
    main(sys.argv[1])
