"""An outlook as lines for people: the four answers first, then parts, curves and advice."""

from typing import Any

BYTE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
COUNT_UNITS = ("", "k", "M", "G", "T", "P", "E")


def num_bytes(value: float) -> str:
    """Return bytes with a unit and three digits. Local."""
    power = 0
    while value >= 1024 and power < len(BYTE_UNITS) - 1:
        value, power = value / 1024, power + 1
    return f"{value:,.0f} {BYTE_UNITS[0]}" if power == 0 else f"{value:,.3g} {BYTE_UNITS[power]}"


def num_flops(value: float) -> str:
    """Return floating-point operations with a unit and three digits. Local."""
    power = 0
    while value >= 1000 and power < len(COUNT_UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:,.3g} {COUNT_UNITS[power]}FLOP"


def duration(seconds: float) -> str:
    """Return a time in a unit that suits it. Local."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds / 3600:,.3g} h"


def lines(o: dict[str, Any]) -> list[str]:
    """Return the lines of an outlook without its curves. Local."""
    rows = [("model scale", _scale(o)), ("compute demand", _demand(o)), ("training needs", _training(o)),
            ("inference needs", _inference(o)), ("", ""), ("network", _network(o)), ("memory", _memory(o)),
            ("storage", _storage(o)), ("traffic", _traffic(o))]
    if "step_s" in o:
        rows += [("step", _step(o)), ("bound", _bound(o)), ("run", _run(o)),
                 ("machine", f"{o['machine']}: {o['machine_source']}")]
    else:
        rows.append(("time", "not foretold: give --machine FILE.json, which 'hpcmlp bench --calibrate FILE.json' "
                     "writes, or a built-in profile"))
    return [f"{name:<16}  {value}".rstrip() for name, value in rows]


def curve_lines(c: dict[str, Any]) -> list[str]:
    """Return the tables of the curves, the best rank counts and the advice. Local."""
    out = []
    for kind, meaning in (("strong", "one global batch"), ("weak", "one local batch")):
        out += ["", f"{kind} scaling ({meaning})",
                f"{'ranks':>7}  {'global batch':>12}  {'step':>9}  {'samples/s':>12}  {'efficiency':>10}  spent on"]
        out += [f"{p['ranks']:>7,}  {p['global_batch_size']:>12,}  {duration(p['step_s']):>9}  "
                f"{p['samples_per_s']:>12,.0f}  {100 * p['efficiency']:>8.0f} %  {p['bound']}" for p in c[kind]]
    b = c["best"]
    out += ["", f"{'shortest step':<16}  {b['shortest']:,} ranks, {duration(b['shortest_step_s'])}",
            f"{'efficient':<16}  up to {b['efficient']:,} ranks keep {100 * b['efficiency']:.0f} % of ideal"]
    for entry in c["advice"]:
        cost = f"; costs: {entry['cost']}" if entry["cost"] else ""
        out.append(f"{'would help':<16}  {entry['option']}: {100 * entry['gain']:+.0f} % less time an epoch, "
                   f"{100 * entry['core_hours_gain']:+.0f} % less computing{cost}")
    if not c["advice"]:
        out.append(f"{'would help':<16}  nothing that was tried")
    return out


def _scale(o: dict[str, Any]) -> str:
    layers = " + ".join(f"{n:,}" for n in o["parameters_per_layer"][:8])
    more = " + ..." if len(o["parameters_per_layer"]) > 8 else ""
    return (f"{o['parameters']:,} parameters in {len(o['parameters_per_layer'])} layers ({layers}{more}), "
            f"{num_bytes(4 * o['parameters'])} in float32")


def _demand(o: dict[str, Any]) -> str:
    return (f"training {num_flops(o['flops_per_sample'])} a sample, {num_flops(o['flops_per_step'])} a step, "
            f"{num_flops(o['flops_per_run'])} in all; inference {num_flops(o['inference_flops_per_sample'])} a sample")


def _training(o: dict[str, Any]) -> str:
    storage = o["storage_bytes"]
    text = (f"{o['ranks']:,} rank(s) on {o['nodes']:,} node(s), {num_bytes(o['memory_bytes_per_node'])} of memory a "
            f"node, {num_bytes(storage['data'] + storage['checkpoints'])} of storage, "
            f"{num_bytes(o['sent_bytes_per_rank_and_step'])} sent a rank and step")
    if "run_s" in o:
        text += f"; {duration(o['run_s'])}, {_hours(o)}"
    return text


def _hours(o: dict[str, Any]) -> str:
    name = "gpu_hours" if "gpu_hours" in o else "core_hours"
    energy = "" if o["energy_kwh"] is None else f", {o['energy_kwh']:.3g} kWh"
    return f"{o[name]:.3g} {name.replace('_', '-')}{energy}"


def _inference(o: dict[str, Any]) -> str:
    i = o["inference"]
    text = f"1 rank, {num_bytes(i['memory_bytes'])} of memory, {num_bytes(i['model_bytes'])} of storage"
    if "s_per_million" in i:
        text += (f"; {i['samples_per_s_per_rank']:,.0f} samples/s a rank, {duration(i['s_per_million'])} for a million "
                 "(reading them not counted)")
    return text


def _network(o: dict[str, Any]) -> str:
    return (f"{'-'.join(map(str, o['network']))}, global batch {o['global_batch_size']:,} ({o['local_batch_size']:,} a "
            f"rank), {o['steps']:,} steps ({o['steps_per_epoch']:,} an epoch), sync {o['sync']}"
            f"{'' if o['wire'] == 'float32' else ', ' + o['wire'] + ' on the wire'}")


def _memory(o: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {num_bytes(size)}" for name, size in o["memory_parts"].items())
    return (f"{num_bytes(o['memory_bytes_per_rank'])} a rank ({parts}); {num_bytes(o['memory_bytes_per_node'])} a "
            f"node ({num_bytes(o['memory_copy_bytes'])} of it rank 0's copy for saving), "
            f"{num_bytes(o['memory_moment_bytes'])} more for a moment while it evaluates or saves")


def _storage(o: dict[str, Any]) -> str:
    s = o["storage_bytes"]
    return f"data {num_bytes(s['data'])}, a checkpoint {num_bytes(s['checkpoint'])}, kept {num_bytes(s['checkpoints'])}"


def _traffic(o: dict[str, Any]) -> str:
    return (f"{o['sent_bytes_per_rank_and_step']:,} bytes sent by a rank in a step, in {o['buckets']} bucket(s)"
            f"{', behind computing' if o['overlap'] else ''}")


def _step(o: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {duration(s)}" for name, s in o["step_parts_s"].items() if s)
    hidden = f"; {duration(o['hidden_s'])} of messages behind computing" if o["hidden_s"] else ""
    return f"{duration(o['step_s'])} ({parts}){hidden}; {o['samples_per_s']:,.0f} samples/s"


def _bound(o: dict[str, Any]) -> str:
    return (f"most is spent on {o['bound']}; {num_flops(o['flops_per_step'] / o['ranks'] / o['step_s'])}/s a rank, "
            f"{o['intensity_flops_per_byte']:.1f} FLOP a byte of memory")


def _run(o: dict[str, Any]) -> str:
    parts = ", ".join(f"{name[:-2]} {duration(s)}" for name, s in o["run_parts_s"].items() if s)
    return f"{duration(o['epoch_s'])} an epoch, {duration(o['run_s'])} in all ({parts}); {_hours(o)}"
