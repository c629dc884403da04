"""What a run says of itself: its header, the meta data of its checkpoints, its summary."""

import os
from dataclasses import asdict
from typing import Any

import hpcmlp
from hpcmlp.comm.topology import mpi_library
from hpcmlp.run.account import Account
from hpcmlp.run.coordinator import versions
from hpcmlp.run.parts import Parts

KERNEL_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def header_rows(p: Parts) -> list[tuple[str, str]]:
    """Return names and values of the lines that a run begins with. Local."""
    c, m, t = p.config, p.manifest, p.topology
    rows = ", ".join(f"{m.rows(s):,} {s}" for s in m.splits)
    return [("hpcmlp", hpcmlp.__version__),
            ("ranks", f"{t.size} on {t.num_nodes} node{'s' * (t.num_nodes > 1)}{_uneven(t.local_sizes)}; "
                      f"{_spread(t.cores)} cores and {_spread(t.threads)} BLAS thread(s) each{_kernels()}"),
            ("MPI", f"{mpi_library()}, sync {p.exchange.name}{p.exchange.why and f' ({p.exchange.why})'}"
                    f"{f', {p.exchange.wire} on the wire' if p.exchange.wire != 'float32' else ''}"
                    f"{', whole update' if c.full_update else ''}{_overlap(p)}{_servers(p)}"
                    f"{', parameters in slices' if p.sharded else ''}"),
            ("device", f"{c.device}, {p.path}"),
            ("data", f"{m.name}: {rows} rows of {m.num_features} features, {m.task}, {p.loader.mode}"),
            ("network", f"{'-'.join(map(str, p.spec.sizes))} {c.activation}, "
                        f"{p.network.layout.num_params:,} parameters, {p.loss.kind}"),
            ("training", f"{c.optimizer} lr {c.lr:g} {c.schedule}, global batch {c.global_batch_size}, "
                         f"{p.total_steps:,} steps ({p.steps_per_epoch} an epoch)"),
            *([("rounds", f"of up to {c.local_steps} local steps, then {p.step.describe()}")] if p.local else [])]


def _spread(counts: tuple[int, int]) -> str:
    low, high = counts
    return ("default" if high == 0 else str(high)) if low == high else f"{low} to {high}"


def _kernels() -> str:
    """What makes OpenBLAS use other kernels than it would find: a wrong one can halve the speed."""
    return "".join(f", {name}={os.environ[name]}" for name in KERNEL_VARIABLES if os.environ.get(name))


def _uneven(local_sizes: tuple[int, int]) -> str:
    return "" if local_sizes[0] == local_sizes[1] else f" ({_spread(local_sizes)} each)"


def _servers(p: Parts) -> str:
    if p.roles is None:
        return ""
    what = "dedicated to" if p.roles.dedicated else "that also train, with"
    return (f", {p.roles.servers} server(s) {what} {len(p.roles.workers)} worker(s), staleness "
            f"{p.config.staleness or 0}{', learning rate by staleness' if p.config.staleness_lr else ''}")


def _overlap(p: Parts) -> str:
    number = len(p.plan.buckets)
    if not p.plan.overlap or p.sharded:
        return ""
    return f", overlapped in {number} bucket{'s' * (number > 1)} of {p.plan.bucket_mb:g} MiB"


def checkpoint_meta(p: Parts) -> dict[str, Any]:
    """Return what a checkpoint holds beside arrays and progress, as plain values. Local.

    What stays the same in a run is made once: its digests take as long as half a copy of 100 MB.
    """
    if p.constant_meta is None:
        p.constant_meta = _constant_meta(p)
    return {**p.constant_meta, **_storage(p),
            **({"algorithms": p.on_device.steps.algorithms} if p.on_device is not None else {}),
            "sync": {"name": p.exchange.name, "ranks": p.topology.size, "nodes": p.topology.num_nodes}}


def _constant_meta(p: Parts) -> dict[str, Any]:
    m = p.manifest
    model = {name: getattr(m, name) for name in ("task", "classes", "target_names", "feature_names", "x_dtype",
                                                 "preprocessing", "load_shift", "load_scale", "target_shift",
                                                 "target_scale")}
    return {"config": options(p.config), "network": asdict(p.spec), "loss": p.loss.metadata(),
            "data": os.path.abspath(p.config.data), "dataset_digest": m.digest(),
            "versions": versions(), "model": {**model, "preprocessing_digest": m.preprocessing_digest()}}


def options(config: Any) -> dict[str, Any]:
    """Return the options of a run as JSON would give them back: tuples as lists. Local."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()}


def _storage(p: Parts) -> dict[str, Any]:
    """Who stores which slice, for `inspect`."""
    if p.roles is None:
        return {}
    from hpcmlp.sync.storage import describe_slices
    return {"server": describe_slices(p.network.layout.size, p.roles, len(p.step.optimizer.state),
                                      p.session.progress.step, p.config.staleness or "0")}


def summary(p: Parts, account: Account, parts_s: dict[str, float], digest: str, test: dict[str, Any],
            served: list[dict[str, Any]], plan: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of summary.json, the durable record of success, for a run that has finished. Local.

    parts_s : what a step was spent on (`Account.median_parts_s`); digest : sha256 of the parameters that the run
    recommends; test : their metrics; served : what servers did, by epoch.
    """
    c, progress = p.config, p.session.progress
    median = account.median_step_s
    return {"status": "finished", "steps": progress.step, "epochs": progress.step / p.steps_per_epoch,
            "ranks": p.topology.size, "nodes": p.topology.num_nodes, "sync": p.exchange.name,
            "wire": p.exchange.wire, "shard": "params" if p.sharded else "none",
            "overlap": p.plan.overlap, "buckets": len(p.plan.buckets),
            "bucket_mb": p.plan.bucket_mb, "hidden": account.hidden, "device": c.device, **_served(p, served),
            **({"local": p.step.statistics(p.exchange.wire)} if p.local else {}),
            "test": test, "val": progress.best_val or {}, "best_step": progress.best_step,
            "skipped_updates": progress.skipped, "loss_spikes": progress.spikes, "rollbacks": progress.rollbacks,
            "lr_factor": progress.lr_factor,
            "parameters_sha256": digest, "num_params": p.network.layout.num_params,
            "samples_per_s": min(c.global_batch_size, p.manifest.rows("train")) / median if median else None,
            "step_s": median, "step_parts_s": parts_s, **({"plan": plan} if plan else {}),
            "wall_s": progress.seconds, "versions": versions()}


def _served(p: Parts, served: list[dict[str, Any]]) -> dict[str, Any]:
    if p.roles is None:
        return {}
    from hpcmlp.sync.storage import add_reports
    return {"server": {"servers": p.roles.servers, "staleness_bound": p.config.staleness or "0",
                       **add_reports(served)}}
