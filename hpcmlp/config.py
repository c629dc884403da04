"""Every option: its default, its check, its help; frozen dataclasses from TOML and the command line."""

import math
import reprlib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from hpcmlp.errors import ConfigError, InputMissing, flag

TOML_LIMIT_BYTES = 64 * 1024
_MOST_BITS = 128
_MOST_KEY_PARTS = 100
# Values in messages: of nested ones the outer levels, as repr itself may run out of stack.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def option(default: Any = MISSING, help: str = "", *, kind: type | None = None, choices: tuple | None = None,
           low: float | None = None, high: float | None = None, above: float | None = None, below: float | None = None,
           many: bool = False, positional: bool = False, metavar: str | None = None, short: str | None = None):
    """Declare one option: a dataclass field whose metadata says how to read, check and explain it.

    Local. `kind` is the type of one value (`bool` makes a switch with a `--no-` form), `many` a comma-separated tuple;
    `low <= value <= high` and `above < value < below` are the legal range.
    """
    meta = dict(help=help, kind=kind or (type(default) if default not in (MISSING, None) else str), choices=choices,
                low=low, high=high, above=above, below=below, many=many, positional=positional, metavar=metavar,
                short=short)
    if default is MISSING:
        return field(metadata=meta)
    return field(default=default, metadata=meta)


ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "elu", "selu", "tanh", "sigmoid", "softplus", "identity")
LOSSES = ("softmax_cross_entropy", "binary_cross_entropy", "mean_squared", "mean_absolute", "huber", "quantile")
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "adagrad", "lamb", "lars")
SCHEDULES = ("constant", "step", "exponential", "cosine", "one_cycle")
INITIALIZERS = ("auto", "he", "he_normal", "he_uniform", "glorot", "glorot_normal", "glorot_uniform", "lecun",
                "lecun_normal", "lecun_uniform", "torch")
SYNCS = ("auto", "shared", "ring", "native", "nccl", "direct", "server")
WIRES = ("float32", "bf16", "float16", "int8")
DEVICES = ("cpu", "gpu")
PRECISIONS = ("float32", "tf32", "bf16")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class PrepareConfig:
    """Turn a named data set or files into a data set directory of HDF5 shards."""

    source: str = option(positional=True, help="named data set (mnist, covertype, diamonds, water, digits) or a file, "
                         "directory, glob or list file: CSV, NPZ, idx, HDF5, Parquet")
    out: str = option(help="data set directory to write; must not exist or be empty", metavar="DIR")
    shards: int = option(8, low=1, high=99999, help="training shards (files); other splits get a share")
    target: str | None = option(None, help="target column or columns, comma-separated (files)", metavar="COL")
    task: str = option("auto", choices=("auto", "classification", "regression", "multilabel"),
                       help="what the targets are; auto: text or few integers are classes, numbers are regressed")
    x: str | None = option(None, help="name of the input array in NPZ or HDF5 files (else found by habit: x, X, ...)")
    y: str | None = option(None, help="name of the target array in NPZ or HDF5 files")
    columns: tuple | None = option(None, kind=str, many=True, help="columns to use as inputs (default: all others)")
    weight: str | None = option(None, help="column or array of sample weights")
    categorical: tuple | None = option(None, kind=str, many=True,
                                       help="columns to one-hot even though they look numeric")
    val_fraction: float = option(0.1, low=0.0, below=1.0, help="share of the training rows kept for validation")
    test_fraction: float = option(0.2, low=0.0, below=1.0, help="share of rows for the test split, where the source "
                                  "has none of its own")
    stratify: bool = option(True, help="keep class proportions in every split (classification)")
    normalize: str = option("standard", choices=("standard", "min-max", "robust", "none"),
                            help="scaling of inputs, fitted on training rows only")
    normalize_targets: str = option("standard", choices=("standard", "none"), help="scaling of regression targets")
    missing: str = option("median", choices=("median", "mean", "drop", "error"),
                          help="missing inputs: fill by a statistic of the training rows, drop the row, or refuse")
    invalid: str = option("error", choices=("error", "drop", "missing"),
                          help="infinite inputs (and NaN in binary formats): refuse, drop the row, or treat as missing")
    max_levels: int = option(1000, low=2, help="most levels a categorical column may have")
    rows: int | None = option(None, kind=int, low=1, help="rows to generate (water) or to take from the start of files")
    seed: int = option(0, low=0, high=2**63 - 1, help="seed of shuffle, splits and generated data")
    from_dir: str | None = option(None, help="directory with the raw files of a named data set, instead of fetching",
                                  metavar="DIR")
    cache: str | None = option(None, help="where fetched files are kept (default: $HPCMLP_CACHE or ~/.cache/hpcmlp)",
                               metavar="DIR")
    compression: str = option("none", choices=("none", "gzip", "lzf"), help="compression of the shards")


@dataclass(frozen=True)
class TrainConfig:
    """Train a network on all ranks and keep everything needed to use or resume it."""

    data: str = option(help="data set directory made by prepare", metavar="DIR")
    out: str = option(help="run directory", metavar="RUN")
    resume: bool = option(False, help="go on from the newest good checkpoint in RUN, or start when there is none")
    # network
    hidden: tuple = option((256, 128), kind=int, many=True, low=1, high=2**24, help="widths of the hidden layers; "
                           "'none' for a linear model")
    activation: str = option("relu", choices=ACTIVATIONS, help="activation of the hidden layers")
    dropout: float = option(0.0, low=0.0, below=1.0, help="probability of dropping a hidden activation")
    layer_norm: bool = option(False, help="layer normalisation before each activation")
    residual: bool = option(False, help="residual connection wherever neighbouring hidden layers have one width")
    initializer: str = option("auto", choices=INITIALIZERS, help="auto: PyTorch's for the ReLU family, Glorot "
                              "for saturating activations, LeCun for selu")
    # loss
    loss: str = option("auto", choices=("auto", *LOSSES), help="auto: cross entropy for classes, binary cross entropy "
                       "for labels, mean squared for numbers")
    label_smoothing: float = option(0.0, low=0.0, below=1.0, help="softmax cross entropy: weight of the uniform target")
    class_weights: str = option("none", help="'none', 'balanced', or one weight per class, comma-separated")
    huber_delta: float = option(1.0, above=0.0, help="Huber loss: where it turns linear (standardised units)")
    quantiles: tuple = option((0.1, 0.5, 0.9), kind=float, many=True, above=0.0, below=1.0, help="quantile loss")
    # duration and batches
    epochs: int | None = option(None, kind=int, low=0, help="passes over the training rows (default 10)")
    steps: int | None = option(None, kind=int, low=0, help="optimizer steps, instead of epochs")
    global_batch_size: int = option(256, low=1, high=2**31 - 1, help="samples of one step over all ranks")
    accumulate: int = option(1, low=1, help="micro-batches that each local batch is cut into (saves memory)")
    # optimizer
    optimizer: str = option("adamw", choices=OPTIMIZERS, help="update rule")
    lr: float = option(0.001, above=0.0, help="peak learning rate")
    momentum: float | None = option(None, kind=float, low=0.0, below=1.0, help="momentum of sgd, rmsprop and lars "
                                    "(default: 0, 0, 0.9)")
    nesterov: bool = option(False, help="Nesterov's form of the momentum (sgd)")
    beta1: float | None = option(None, kind=float, low=0.0, below=1.0, help="decay of the first moment of adam, adamw "
                                 "and lamb (default: 0.9)")
    beta2: float | None = option(None, kind=float, low=0.0, below=1.0, help="decay of the second moment of adam, adamw "
                                 "and lamb (default: 0.999)")
    alpha: float | None = option(None, kind=float, low=0.0, below=1.0, help="decay of the mean square of rmsprop "
                                 "(default: 0.99)")
    eps: float | None = option(None, kind=float, above=0.0, help="added to the root of the second moment (default: "
                               "1e-8; adagrad 1e-10, lamb 1e-6)")
    weight_decay: float | None = option(None, kind=float, low=0.0, help="weight decay, decoupled for adamw, else added "
                                        "to the gradient (default: 0; adamw 0.01)")
    clip_norm: float | None = option(None, kind=float, above=0.0, help="largest global norm of the gradient")
    ema: float | None = option(None, kind=float, above=0.0, below=1.0, help="decay of an exponential moving average of "
                               "the weights, used for validation and the final model")
    # schedule
    schedule: str = option("constant", choices=SCHEDULES, help="learning rate over the run")
    warmup_steps: int = option(0, low=0, help="steps of linear warm-up")
    min_lr: float | None = option(None, kind=float, low=0.0, help="final learning rate of cosine (default: 0)")
    step_size: int | None = option(None, kind=int, low=1, help="steps between the decays of step (default: 1000)")
    gamma: float | None = option(None, kind=float, above=0.0, high=1.0, help="factor of a decay of step, or of an "
                                 "epoch of exponential (default: 0.1)")
    # validation
    validate_every: int = option(1, low=1, help="epochs between validations")
    monitor: str = option("auto", help="validation metric that picks the best state (auto: accuracy for classes, loss "
                          "for numbers)")
    early_stopping: int | None = option(None, kind=int, low=1, help="stop after this many validations without a better "
                                        "one")
    # saving
    checkpoint_every: int | None = option(None, kind=int, low=1, help="steps between checkpoints (default: each epoch)",
                                          metavar="STEPS")
    keep: int = option(2, low=1, help="newest checkpoints kept, beside the best")
    log_every: int = option(50, low=1, help="steps between step records in metrics.jsonl", metavar="STEPS")
    print_every: int | None = option(None, kind=int, low=1, help="print 'Step %%d, loss = %%.2f' every so many steps",
                                     metavar="STEPS")
    progress: bool = option(True, help="progress bar when standard output is a terminal")
    test: bool = option(True, help="evaluate the test split once at the end")
    # how it runs
    device: str = option("cpu", choices=DEVICES, help="where the arithmetic runs")
    precision: str = option("float32", choices=PRECISIONS, help="arithmetic of the matrix products on a GPU: tf32 "
                            "keeps 10 bits of the mantissa, bf16 also of activations 8; parameters and sums stay "
                            "float32")
    sync: str = option("auto", choices=SYNCS, help="how gradients are combined: shared (node memory, ring between "
                       "nodes), ring, native (the MPI library's own), nccl (between GPUs, one per rank), direct (ring "
                       "straight from GPU memory, by a CUDA-aware MPI), or server (parameters on servers); auto: with "
                       "--device gpu nccl where it can be had, else on one node direct where that is claimed and "
                       "proven, else shared on one node, else the fastest in a short trial")
    servers: int | None = option(None, kind=int, low=1, help="--sync server: ranks that hold the parameters; when "
                                 "fewer than all they do nothing else (default: 1)")
    staleness: str | None = option(None, help="--sync server: steps that parameters may change between a worker's pull "
                                   "and its push; 0: all workers in step; 'async': any number (default: 0)",
                                   metavar="STEPS")
    staleness_lr: bool = option(False, help="--staleness above 0: divide a push by its staleness")
    worker_timeout: float | None = option(None, kind=float, above=0.0, help="--staleness above 0: go on without a "
                                          "worker that has given no sign for so long (default: 60)",
                                          metavar="SECONDS")
    wire: str = option("float32", choices=WIRES, help="numbers that the ring sends gradients and parameters in, "
                       "between nodes (auto, shared) or between all ranks (ring); what is rounded away is in the next "
                       "message; not with --sync native")
    full_update: bool = option(False, help="update all parameters on every rank after a whole all-reduce (the plain "
                               "form, for comparison)")
    local_steps: int = option(1, low=1, metavar="K", help="steps that every rank takes by itself, on its share of the "
                              "global batches, before all meet and average their parameters; 1: every step is one of "
                              "all ranks. For slow networks: a round sends what one step sends")
    outer_optimizer: str = option("none", choices=("none", "nesterov"), help="where ranks meet: none averages, "
                                  "nesterov takes what the mean has moved as the gradient of an outer SGD (DiLoCo)")
    outer_lr: float | None = option(None, kind=float, above=0.0, help="learning rate of the outer optimizer (default: "
                                    "0.7)")
    outer_momentum: float | None = option(None, kind=float, low=0.0, below=1.0, help="its momentum (default: 0.9)")
    shard: str = option("none", choices=("none", "params"), help="params: every rank keeps its slice of parameters and "
                        "gradients only, layers are gathered just before they are used, for networks larger than one "
                        "rank's memory")
    recompute: bool = option(False, help="keep activations at some layers only and compute the others again in "
                             "backward: less memory for deep networks and large batches, up to a third more work")
    overlap: bool | None = option(None, kind=bool, help="send buckets of gradients while backward goes on, and gather "
                                  "parameters while the next forward pass does (default: between nodes)")
    bucket_mb: float | None = option(None, kind=float, above=0.0, help="size of a bucket of gradients, MiB (default: "
                                     "32; with overlap as latency and bandwidth of the links, measured at the start, "
                                     "have it: give it where runs are to have the same bits)")
    memory_limit: float | None = option(None, kind=float, above=0.0, help="memory for the samples of one rank, MiB; "
                                        "larger sets are streamed", metavar="MIB")
    replica_check_every: int = option(100, low=0, help="steps between checks that all ranks hold the same parameters; "
                                      "0: never", metavar="STEPS")
    on_nonfinite: str = option("skip", choices=("skip", "stop", "rollback"), help="what to do when a loss or gradient "
                               "is not finite on any rank: skip that update (10 in a row end the run), stop, or go "
                               "back to the last good checkpoint with half the learning rate (at most 8 times)")
    verify: bool = option(True, help="verify the shards' checksums when they are opened")
    time_limit: float | None = option(None, kind=float, above=0.0, help="stop, save and exit 75 before so many minutes "
                                      "have passed", metavar="MINUTES")
    elastic: bool = option(False, help="go on without ranks that die or hang, with the same global batch and no step "
                           "lost; needs Open MPI 5 started with 'mpirun --with-ft ulfm'. Implies --sync native "
                           "--full-update: every rank keeps all moments")
    watchdog: float = option(60.0, low=0.0, help="say which rank the others wait for, and where it is, after so many "
                             "seconds, and end the job with 75 after twice as many when it gives no sign of life, else "
                             "5 times (30 times while it reads, evaluates or saves); 0: never", metavar="SECONDS")
    trace: bool = option(False, help="write RUN/trace.json: one timeline of all ranks (layers, buckets, waits, update) "
                         "for a browser's trace viewer")
    trace_steps: int | None = option(None, kind=int, low=1, high=10_000, help="steps of the timeline, after a short "
                                     "warm-up (default: 200)", metavar="STEPS")
    seed: int = option(0, low=0, high=2**63 - 1, help="seed of parameters, order of samples and dropout")
    machine: str | None = option(None, metavar="FILE.json", help="machine file of 'hpcmlp bench --calibrate', or a "
                                 "built-in profile by name: then times are foretold too, and compared at the end")
    network: str | None = option(None, metavar="NAME", help="links between nodes by a built-in profile, where the "
                                 "machine file says nothing of them")


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Foretell what a training run needs and how long it takes, before it is submitted; needs no MPI."""

    data: str | None = option(None, help="data set directory made by prepare (or --rows, --features and --classes)",
                              metavar="DIR")
    out: str | None = option(None, help="run directory that a written job is to use", metavar="RUN")
    rows: int | None = option(None, kind=int, low=1, high=2**48, help="training rows, where there is no data set yet")
    features: int | None = option(None, kind=int, low=1, high=2**24, help="inputs of a row, likewise")
    classes: int | None = option(None, kind=int, low=1, high=2**24, help="classes, or numbers to predict, likewise "
                                 "(default: 10)")
    ranks: int = option(1, low=1, high=2**24, help="ranks of the run")
    ranks_per_node: int | None = option(None, kind=int, low=1, help="ranks on a node (default: all where the machine "
                                        "is not known, else its cores over its BLAS threads)")
    up_to: int = option(4096, low=1, high=2**24, help="ranks at the end of the scaling curves, which go by powers of 2")
    efficiency: float = option(0.8, above=0.0, high=1.0, help="parallel efficiency for which the rank count is wanted")
    watts: float | None = option(None, kind=float, above=0.0, help="power of a core (or GPU) in use, W, for the energy "
                                 "(default: the machine file's)")
    picture: str | None = option(None, help="draw the scaling curves into this PNG file", metavar="FILE.png")
    write_job: str | None = option(None, help="write a SLURM script for the run, filled in from jobs/: ranks, memory, "
                                   "time limit and options", metavar="FILE.sh")
    json: bool = option(False, help="print one JSON object and nothing else")


@dataclass(frozen=True)
class EvaluateConfig:
    """Compute exact metrics over every sample of a split once."""

    run: str = option(positional=True, help="run directory", metavar="RUN")
    data: str | None = option(None, help="data set directory (default: the one it was trained on)", metavar="DIR")
    split: str = option("test", choices=SPLITS, help="split to evaluate")
    which: str = option("best", choices=("best", "last"), help="the best state by validation, or the newest")
    top_k: int = option(5, low=1, help="k of the top-k accuracy")
    rows_per_batch: int = option(4096, low=1, help="samples that one rank takes through the network at once")
    device: str = option("cpu", choices=DEVICES, help="where the arithmetic runs")
    watchdog: float = option(60.0, low=0.0, help="say which rank the others wait for, and where it is, after so many "
                             "seconds, and end the job with 75 after twice as many when it gives no sign of life, else "
                             "30 times; 0: never", metavar="SECONDS")
    json: bool = option(False, help="print one JSON object and nothing else")


@dataclass(frozen=True)
class PredictConfig:
    """Predict for new rows, in input order, into one HDF5 file."""

    run: str = option(positional=True, help="run directory", metavar="RUN")
    input: str = option(positional=True, help="CSV, NPZ, idx, HDF5 or Parquet file, or a data set directory "
                        "(then --split)", metavar="INPUT")
    out: str = option(help="HDF5 file to write", metavar="FILE.h5")
    split: str = option("test", choices=SPLITS, help="split, when INPUT is a data set directory")
    x: str | None = option(None, help="name of the input array in NPZ or HDF5 files")
    which: str = option("best", choices=("best", "last"), help="the best state by validation, or the newest")
    rows_per_batch: int = option(4096, low=1, help="samples that one rank takes through the network at once")
    device: str = option("cpu", choices=DEVICES, help="where the arithmetic runs")
    watchdog: float = option(60.0, low=0.0, help="say which rank the others wait for, and where it is, after so many "
                             "seconds, and end the job with 75 after twice as many when it gives no sign of life, else "
                             "30 times; 0: never", metavar="SECONDS")
    force: bool = option(False, help="replace FILE.h5 when it exists")


@dataclass(frozen=True)
class InspectConfig:
    """Show what a shard, data set, run or checkpoint holds, and whether it is whole."""

    path: str = option(positional=True, help="shard, data set directory, run directory or checkpoint", metavar="PATH")
    verify: bool = option(True, help="read everything and compare checksums")
    json: bool = option(False, help="print one JSON object and nothing else")


@dataclass(frozen=True)
class ReportConfig:
    """Draw learning curves and the split of time from a run's log, and the timeline of a run that was traced."""

    runs: tuple = option(positional=True, many=True, kind=str, help="run directories", metavar="RUN")
    out: str | None = option(None, help="directory for the pictures (default: the run directory)", metavar="DIR")


@dataclass(frozen=True)
class BenchConfig:
    """Time the parts of a step on this machine."""

    what: str | None = option(None, positional=True, choices=("step", "comm", "gemm", "io"), help="step: a whole "
                       "training step on "
                       "made-up samples, and its matrix products alone, ms; gemm: these products, ms and GFLOP/s; "
                       "comm: an all-reduce over sizes for each algorithm, beside MPI's own and a copy of memory, us "
                       "and GB/s; io: how fast the shards of a data set are read, verified, gathered and streamed, "
                       "samples/s and MB/s")
    calibrate: str | None = option(None, metavar="FILE.json", help="measure this machine for 'hpcmlp plan', with as "
                                   "many ranks on a node as runs are to have and on two nodes where there are more, "
                                   "and write its machine file; about a minute; instead of WHAT")
    rounds: int = option(3, low=1, help="times that every rate is taken, far apart (--calibrate)")
    watts: float | None = option(None, kind=float, above=0.0, help="power of a core in use, W, to be written into the "
                                 "machine file (--calibrate)")
    sizes: tuple = option((784, 256, 128, 10), kind=int, many=True, low=1, help="widths from input to output (step, "
                          "gemm)")
    global_batch_size: int = option(128, low=1, help="samples of one step over all ranks (step, gemm, io)")
    steps: int = option(200, low=5, help="timed steps; of comm the most calls per size, of io batches per stage")
    sync: str = option("auto", choices=SYNCS, help="how gradients are combined (step)")
    servers: int | None = option(None, kind=int, low=1, help="ranks that hold the parameters, with --sync server "
                                 "(step; default: 1)")
    wire: str = option("float32", choices=WIRES, help="numbers that the ring sends (step)")
    overlap: bool | None = option(None, kind=bool, help="messages travel while the ranks compute (step; default: "
                                  "between nodes)")
    bucket_mb: float | None = option(None, kind=float, above=0.0, help="size of a bucket of gradients, MiB (step; "
                                     "default as for train)")
    optimizer: str = option("adam", choices=OPTIMIZERS, help="update rule (step)")
    device: str = option("cpu", choices=DEVICES, help="where the arithmetic runs (step)")
    precision: str = option("float32", choices=PRECISIONS, help="of the matrix products, with --device gpu (step)")
    bytes: tuple = option((4, 2**10, 2**14, 2**18, 2**20, 2**22, 2**24, 2**26), kind=int, many=True, low=4,
                          help="sizes of the arrays (comm)")
    data: str | None = option(None, help="data set directory made by prepare (io)", metavar="DIR")
    memory_limit: float | None = option(None, kind=float, above=0.0, help="memory for the samples of one rank while "
                                        "streaming, MiB (io; default: half of what a rank holds)", metavar="MIB")
    json: bool = option(False, help="print one JSON value and nothing else: an object (step, gemm) or a list of "
                        "objects (comm, io)")


@dataclass(frozen=True)
class DoctorConfig:
    """Look at a launch from every rank, say what is wrong with it and the cure."""

    dir: str = option(".", help="directory on the file system that runs will be written to: can files be locked "
                      "there?", metavar="DIR")
    json: bool = option(False, help="print one JSON object and nothing else")


@dataclass(frozen=True)
class LaunchConfig:
    """Start ranks, and start them again on the ranks that remain when some die or hang."""

    command: tuple = option(positional=True, many=True, kind=str, metavar="COMMAND", help="after '--': train with its "
                            "options, --out among them; restarts add --resume")
    ranks: int = option(kind=int, low=1, short="n", help="ranks to start")
    launcher: str | None = option(None, help="words that start ranks, before '-n RANKS': srun, or 'mpiexec -hosts a,b' "
                                  "(default: the mpiexec beside this Python, or in PATH)", metavar="WORDS")
    max_restarts: int = option(3, low=0, help="starts after the first one")
    backoff: float = option(1.0, low=0.0, help="wait before the first restart; doubled each time, at most 60",
                            metavar="SECONDS")
    min_ranks: int = option(1, low=1, help="every restart has one rank less, down to this number")


CONFIGS = {"prepare": PrepareConfig, "train": TrainConfig, "evaluate": EvaluateConfig, "predict": PredictConfig,
           "plan": PlanConfig, "bench": BenchConfig, "report": ReportConfig, "inspect": InspectConfig,
           "doctor": DoctorConfig, "launch": LaunchConfig}


def nearest(word: str, legal: list[str]) -> str:
    """Return '; did you mean X?' for the legal word closest to `word`, or an empty text. Local."""
    import difflib  # only when something is wrong: every rank pays for what stands above
    close = difflib.get_close_matches(word, legal, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_value(name: str, meta: dict, value: Any) -> Any:
    """Return `value` as the option's type, or raise ConfigError with what is legal.

    Local. Booleans are not integers here, integers are welcome where floats are wanted, and floats must be finite.
    """
    if meta["many"]:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_check_one(name, meta, v) for v in values)
    return _check_one(name, meta, value)


def _check_one(name: str, meta: dict, value: Any) -> Any:
    kind = meta["kind"]
    if type(value) is int and value.bit_length() > _MOST_BITS:
        raise ConfigError(f"{name} is a whole number of {value.bit_length()} bits; at most {_MOST_BITS} are read.")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} = {_SHORT.repr(value)} is a {type(value).__name__}; it must be a {kind.__name__}.")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{name} = {value!r} is not finite; give a finite number.")
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(f"{name} = {value!r} is not known{nearest(str(value), list(meta['choices']))} "
                          f"(legal: {', '.join(map(str, meta['choices']))}).")
    bounds: list[tuple[str, Callable[[Any, Any], bool], str]] = [
        ("low", lambda v, b: v >= b, "at least"), ("high", lambda v, b: v <= b, "at most"),
        ("above", lambda v, b: v > b, "above"), ("below", lambda v, b: v < b, "below")]
    wanted = [f"{text} {meta[key]}" for key, _, text in bounds if meta[key] is not None]
    for key, holds, _ in bounds:
        if meta[key] is not None and not holds(value, meta[key]):
            raise ConfigError(f"{name} = {value} is out of range; it must be {' and '.join(wanted)}.")
    return value


def load_toml(path: str) -> dict[str, Any]:
    """Return the values of a TOML file of options, whatever they are.

    Local. Raises InputMissing when it is not there, ConfigError when it is no TOML or beyond the limits.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(TOML_LIMIT_BYTES + 1)
    except OSError as error:
        raise InputMissing(f"{path}: cannot read this configuration file ({error.strerror}).") from None
    if len(data) > TOML_LIMIT_BYTES:
        raise ConfigError(f"{path}: a configuration file has at most {TOML_LIMIT_BYTES} bytes.")
    import re
    import tomllib  # only when there is a file
    # time and memory of a dotted key grow with the square of its parts
    if any(piece.count(b".") > _MOST_KEY_PARTS for piece in re.split(rb"[=,\n\[\]{}]", data)):
        raise ConfigError(f"{path}: holds a key of more than {_MOST_KEY_PARTS} parts.")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}.") from None


def read_toml(path: str, config: type) -> dict[str, Any]:
    """Read a TOML file of options for the dataclass `config` and check every key and value.

    Local. Raises InputMissing when it is not there, ConfigError for everything else that is wrong with it.
    """
    values = load_toml(path)
    known = {f.name: f.metadata for f in fields(config)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{nearest(key, list(known))}")
    return {key: check_value(f"{path}: {key}", known[key], value) for key, value in values.items()}


def build(config: type, given: dict[str, Any], toml: str | None = None) -> Any:
    """Return the frozen dataclass from defaults <- TOML file <- command line. Local; raises ConfigError."""
    values = read_toml(toml, config) if toml else {}
    values.update(given)
    missing = [f.name for f in fields(config) if f.default is MISSING and f.name not in values]
    if missing:
        raise ConfigError(f"{', '.join(flag(name) for name in missing)} must be given, on the command line or in a "
                          "TOML file.")
    return config(**values)


def to_toml(config: Any) -> str:
    """Return the resolved options as TOML text; reading it back gives the same dataclass. Local."""
    lines = [f"{f.name} = {_toml_value(getattr(config, f.name))}" for f in fields(config)
             if getattr(config, f.name) is not None]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)
