"""Which options of a run go together: with each other, the data set, the ranks, and the run that is resumed.

`config` is the options of `train`, by their names as attributes.
"""

from collections.abc import Iterable
from typing import Any

from hpcmlp.data.manifest import Manifest
from hpcmlp.errors import ConfigError, DataError, flag
from hpcmlp.nn.losses import Loss, balanced_class_weights, default_loss
from hpcmlp.traffic import check_wire

# Options that a resumed run may change: they alter how long or how fast it runs, not what a step computes
# (but for its rounding).
FREE_ON_RESUME = {"data", "out", "resume", "epochs", "steps", "early_stopping", "validate_every", "checkpoint_every",
                  "keep", "log_every", "print_every", "progress", "test", "device", "sync", "wire", "full_update",
                  "overlap", "bucket_mb", "replica_check_every", "verify", "time_limit", "watchdog", "elastic",
                  "trace", "trace_steps", "servers", "staleness", "staleness_lr", "worker_timeout", "on_nonfinite",
                  "machine", "network", "shard", "recompute"}
SERVER_OPTIONS = ("servers", "staleness", "staleness_lr", "worker_timeout")


def check_fits(config: Any, manifest: Manifest, size: int) -> None:
    """Raise ConfigError or DataError when the options cannot work with the data set or on `size` ranks. Local."""
    if config.epochs is not None and config.steps is not None:
        raise ConfigError("both --epochs and --steps are given; give one of them.")
    check_wire(config.sync, config.wire)
    if config.sync == "server":
        from hpcmlp.sync.server import check_options  # few runs want it
        check_options(config, size)
    else:
        for name in SERVER_OPTIONS:
            if getattr(config, name) not in (None, False):
                raise ConfigError(f"{flag(name)} has no effect with --sync {config.sync}; it belongs to --sync server.")
    alone = {f"--sync {config.sync}": config.sync in ("native", "server"), "--full-update": config.full_update,
             "--local-steps": config.local_steps > 1, "--outer-optimizer": config.outer_optimizer != "none"}
    odd = [name for name, given in alone.items() if given]
    if config.overlap and odd:
        raise ConfigError(f"--overlap has no effect with {odd[0]}, which sends nothing while it computes; leave one "
                          "out.")
    if config.on_nonfinite != "skip" and config.staleness not in (None, "0"):
        raise ConfigError(f"--on-nonfinite {config.on_nonfinite} needs ranks in step; with --staleness above 0 such "
                          "gradients are skipped.")
    odd = [name for name, given in {
        f"--sync {config.sync}": config.sync not in ("auto", "native"), "--local-steps": config.local_steps > 1,
        "--outer-optimizer": config.outer_optimizer != "none", "--overlap": bool(config.overlap),
        f"--wire {config.wire}": config.wire != "float32", "--trace": config.trace,
        "--on-nonfinite rollback": config.on_nonfinite == "rollback"}.items() if given]
    if config.elastic and odd:
        raise ConfigError(f"--elastic does not go with {odd[0]}: survivors go on with --sync native --full-update, "
                          "step by step; leave one out.")
    if config.shard == "params":
        _check_shard(config)
    if config.sync in ("nccl", "direct") and config.device == "cpu":
        raise ConfigError(f"--sync {config.sync} has no effect with --device cpu; it belongs to --device gpu.")
    if config.sync == "nccl" and config.full_update:
        raise ConfigError("--sync nccl has no effect with --full-update, which sums on the hosts; leave one out.")
    if config.precision != "float32" and config.device == "cpu":
        raise ConfigError(f"--precision {config.precision} has no effect with --device cpu, which computes in float32; "
                          "it belongs to --device gpu.")
    if config.trace_steps is not None and not config.trace:
        raise ConfigError("--trace-steps has no effect without --trace; give both.")
    for name in ("outer_lr", "outer_momentum"):
        if getattr(config, name) is not None and config.outer_optimizer == "none":
            raise ConfigError(f"{flag(name)} has no effect with --outer-optimizer none; it belongs to nesterov.")
    if manifest.rows("train") == 0:
        raise DataError(f"{config.data}: the data set has no training rows; prepare it with more rows or smaller "
                        "--val-fraction and --test-fraction.")
    if config.early_stopping is not None and manifest.rows("val") == 0:
        raise ConfigError("--early-stopping needs validation rows; prepare the data set with --val-fraction above 0.")


def _check_shard(config: Any) -> None:
    """Raise ConfigError for what does not go with parameters in slices. Local."""
    whole = "every rank then holds all parameters"
    wrong = {"--full-update": (config.full_update, whole), "--local-steps": (config.local_steps > 1, whole),
             "--outer-optimizer": (config.outer_optimizer != "none", whole),
             "--sync server": (config.sync == "server", "workers hold all parameters"),
             "--elastic": (config.elastic, "who is lost takes its slice along"),
             "--wire": (config.wire != "float32", "layers are gathered and reduced in float32"),
             "--device gpu": (config.device == "gpu", "layers are gathered in the host's memory"),
             "--bucket-mb": (config.bucket_mb is not None, "a bucket is a layer"),
             "--overlap": (config.overlap is not None, "the next layer always travels while one is computed, where the "
                                                       "collectives can"),
             "--trace": (config.trace, "the timeline does not know of layers that come and go")}
    for name, (given, why) in wrong.items():
        if given:
            raise ConfigError(f"{name} does not go with --shard params: {why}; leave one of them out.")


def chosen(config: Any, owner: str, own: Iterable[str], table: dict[str, Iterable[str]]) -> dict[str, Any]:
    """Return the options named in `own` that were given; one given that only others of `table` have is an error.

    Local. Raises ConfigError: a setting that cannot take effect is never passed over in silence.
    """
    every = {name for names in table.values() for name in names if hasattr(config, name)}
    given = {name: getattr(config, name) for name in every if getattr(config, name) not in (None, False)}
    odd = sorted(set(given) - set(own))
    if odd:
        users = [key for key, names in table.items() if odd[0] in names]
        raise ConfigError(f"{flag(odd[0])} has no effect with {owner}; it belongs to {', '.join(users)}.")
    return given


def make_loss(config: Any, manifest: Manifest) -> Loss:
    """Return the loss that the options and the task ask for. Local; raises ConfigError when they do not go together."""
    kind = default_loss(manifest.task) if config.loss == "auto" else config.loss
    options: dict[str, Any] = {}
    if kind == "softmax_cross_entropy":
        options["label_smoothing"] = config.label_smoothing
        options["class_weights"] = class_weights(config.class_weights, manifest)
    elif config.label_smoothing or config.class_weights != "none":
        raise ConfigError(f"--label-smoothing and --class-weights act on softmax_cross_entropy only, not on {kind}.")
    if kind == "huber":
        options["delta"] = config.huber_delta
    if kind == "quantile":
        options["quantiles"] = tuple(config.quantiles)
    return Loss(kind, **options)


def class_weights(text: str, manifest: Manifest) -> tuple[float, ...] | None:
    """Return one weight per class for 'none', 'balanced' or a comma-separated list. Local; raises ConfigError."""
    if text == "none":
        return None
    if text == "balanced":
        return balanced_class_weights(manifest.class_counts["train"])
    try:
        weights = tuple(float(word) for word in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != len(manifest.classes or ()) or not all(0 <= w < float("inf") for w in weights):
        raise ConfigError(f"--class-weights {text!r}: give 'none', 'balanced' or {len(manifest.classes or ())} numbers "
                          "of at least 0, comma-separated.")
    return weights
