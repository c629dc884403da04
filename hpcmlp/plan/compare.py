"""Foretold beside measured: time, memory and traffic of a run, and which part was off."""

from typing import Any

LARGE = 0.15        # a difference of a step's time, or of memory, that is worth naming its part
NAMES = {"compute_s": "computing", "comm_s": "communication", "wait_s": "waiting for late ranks", "input_s": "input"}


def compare(outlook: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Return {quantity: {"foretold", "measured", "ratio"}} for what both know, and "off": sentences.

    Local.

    measured : any of "step_s", "parts_s" ("compute", "comm", "wait", "input"), "memory_bytes_per_node",
        "sent_bytes_per_rank_and_step"; None where it was not measured.
    """
    found: dict[str, Any] = {}
    for name in ("step_s", "memory_bytes_per_node", "sent_bytes_per_rank_and_step"):
        if outlook.get(name) is not None and measured.get(name) is not None:
            found[name] = _pair(outlook[name], measured[name])
    parts = _parts(outlook)
    for name, seconds in (measured.get("parts_s") or {}).items():
        if name in parts:
            found[f"{name}_s"] = _pair(parts[name], seconds)
    return {**found, "off": _off(found)}


def _pair(foretold: float, measured: float) -> dict[str, Any]:
    return {"foretold": foretold, "measured": measured, "ratio": measured / foretold if foretold else None}


def _parts(outlook: dict[str, Any]) -> dict[str, float]:
    """The parts as a run measures them."""
    parts = outlook.get("step_parts_s")
    if parts is None:
        return {}
    return {"compute": sum(parts[name] for name in ("products", "passes", "update", "fixed")),
            **{name: parts.get(name, 0.0) for name in ("comm", "wait", "input")}}


def _off(found: dict[str, Any]) -> list[str]:
    """One sentence for each quantity that is far off, with the part that was."""
    sentences = []
    step = found.get("step_s")
    if step and abs(step["measured"] - step["foretold"]) > LARGE * step["foretold"]:
        parts = {name: pair["measured"] - pair["foretold"] for name, pair in found.items() if name in NAMES}
        part = max(parts, key=lambda name: abs(parts[name])) if parts else None
        what = f"; most of it is {NAMES[part]}: {1e3 * found[part]['measured']:.3g} ms, foretold " \
               f"{1e3 * found[part]['foretold']:.3g}" if part else ""
        longer = "longer" if step["ratio"] > 1 else "shorter"
        sentences.append(f"a step took {abs(100 * (step['ratio'] - 1)):,.0f} % {longer} than foretold{what}")
    memory = found.get("memory_bytes_per_node")
    if memory and abs(memory["ratio"] - 1) > LARGE:
        sentences.append(f"memory is off by {(memory['measured'] - memory['foretold']) / 2**20:+,.0f} MiB")
    sent = found.get("sent_bytes_per_rank_and_step")
    if sent and sent["measured"] != sent["foretold"]:
        sentences.append(f"a rank sent {sent['measured']:,.0f} bytes a step, foretold {sent['foretold']:,.0f}")
    return sentences


def lines(comparison: dict[str, Any]) -> list[str]:
    """Return the lines that a run ends with. Local."""
    shown = []
    for name, factor, unit in (("step_s", 1e3, "ms"), ("compute_s", 1e3, "ms"), ("comm_s", 1e3, "ms"),
                               ("wait_s", 1e3, "ms"), ("input_s", 1e3, "ms"),
                               ("memory_bytes_per_node", 2.0**-20, "MiB"),
                               ("sent_bytes_per_rank_and_step", 1, "bytes")):
        pair = comparison.get(name)
        if pair:
            label = {"memory_bytes_per_node": "memory a node", "sent_bytes_per_rank_and_step": "sent a step"}.get(
                name, name[:-2])
            shown.append(f"{label} {factor * pair['measured']:,.5g} {unit} (foretold {factor * pair['foretold']:,.5g})")
    out = [f"plan      measured: {', '.join(shown)}"] if shown else []
    return out + [f"plan      {sentence}" for sentence in comparison["off"]]
