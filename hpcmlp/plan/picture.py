"""The scaling curves as a picture: time of a step and efficiency over ranks, strong and weak."""

import io
import os
from typing import Any

from hpcmlp.data.files import write_atomically

MISSING = "The scaling curves are not drawn: this needs matplotlib (pip install 'hpcmlp[plot]')."
COLORS = {"strong": "C0", "weak": "C1"}


def draw(curves: dict[str, Any], outlook: dict[str, Any], path: str | os.PathLike) -> str | None:
    """Draw `curves` (of `outlook.curves`) into the PNG file `path`, atomically.

    Local. Returns None, or a sentence when matplotlib is not installed. Raises CannotWrite.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return MISSING
    figure = Figure(figsize=(11, 4.6))
    figure.subplots_adjust(0.075, 0.13, 0.985, 0.84, 0.22)
    FigureCanvasAgg(figure)
    time, efficiency = figure.subplots(1, 2)
    for kind, points in (("strong", curves["strong"]), ("weak", curves["weak"])):
        ranks = [p["ranks"] for p in points]
        time.plot(ranks, [1e3 * p["step_s"] for p in points], "o-", markersize=4, color=COLORS[kind], label=kind)
        efficiency.plot(ranks, [100 * p["efficiency"] for p in points], "o-", markersize=4, color=COLORS[kind],
                        label=kind)
    strong = curves["strong"]
    ranks, first = [p["ranks"] for p in strong], strong[0]
    time.plot(ranks, [1e3 * first["step_s"] * first["ranks"] / n for n in ranks], "--", color="0.6", linewidth=1,
              label="ideal, strong")
    best = curves["best"]
    time.axvline(best["shortest"], color="0.8", linewidth=6, zorder=0, label=f"shortest: {best['shortest']:,} ranks")
    wanted = 100 * best["efficiency"]
    efficiency.axhline(wanted, color="0.7", linestyle="--", linewidth=1,
                       label=f"{wanted:.0f} %: up to {best['efficient']:,} ranks")
    efficiency.set_ylim(0, 105)
    time.set_yscale("log")
    for axes, title, unit in ((time, "time of a step", "ms"), (efficiency, "parallel efficiency", "%")):
        axes.set_xscale("log", base=2)
        ticks = ranks[:: max(1, -(-len(ranks) // 7))]
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.set(title=title, xlabel="ranks", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(f"{'-'.join(map(str, outlook['network']))}, global batch {outlook['global_batch_size']:,} "
                    f"(strong), {curves['weak'][0]['global_batch_size']:,} a rank (weak), sync {outlook['sync']}, "
                    f"foretold for {outlook['machine']}", fontsize=10)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": "hpcmlp"})
    write_atomically(path, image.getvalue())
    return None
