"""Train a PyTorch network on the shards of a prepared data set, with the recipe that compare_accuracy.py gives hpcmlp.

Same rows, sizes, batch, epochs, Adam, cosine to 0 over all steps, ReLU; PyTorch's own initialisation and shuffle.
Prints one JSON object: the metric on the test rows and the CPU seconds of the training alone (no imports, no loading,
no test). Runs in the peers' environment (torch, numpy, h5py), which has no hpcmlp.
"""

import argparse
import json
import math
import resource
import time
from pathlib import Path

import h5py
import numpy as np
import torch


def read_split(directory: Path, manifest: dict, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x as float32, shifted and scaled as hpcmlp does when it loads integers, and y."""
    xs, ys = [], []
    for entry in manifest["splits"].get(split, []):
        with h5py.File(directory / entry["file"], "r") as file:
            x = file["x"][...].astype(np.float32)
            if manifest["load_scale"] is not None:
                x = (x - np.float32(manifest["load_shift"])) * np.float32(manifest["load_scale"])
            xs.append(x)
            ys.append(file["y"][...])
    x, y = np.concatenate(xs), np.concatenate(ys)
    return torch.from_numpy(x), torch.from_numpy(y.astype(np.int64) if y.ndim == 1 else y)


def make_network(sizes: list[int]) -> torch.nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers: list[torch.nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def train(network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, args: argparse.Namespace) -> float:
    """Train and return the loss of the last batch."""
    criterion = torch.nn.CrossEntropyLoss() if y.ndim == 1 else torch.nn.MSELoss()
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    steps_per_epoch = math.ceil(len(x) / args.global_batch_size)
    total = args.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + math.cos(math.pi * t / total)) / 2)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.epochs):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x), args.global_batch_size):
            rows = order[start:start + args.global_batch_size]
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(network(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
    return loss.item()


def evaluate(network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, float | list[float]]:
    """Return accuracy, or RMSE over rows and outputs and R2 per output, in standardised units."""
    with torch.no_grad():
        logits = torch.cat([network(part) for part in x.split(4096)]).double()
    if y.ndim == 1:
        return {"accuracy": float((logits.argmax(1) == y).double().mean())}
    error = torch.square(logits - y.double())
    spread = torch.square(y.double() - y.double().mean(0)).sum(0)
    return {"rmse": float(error.mean().sqrt()), "r2": (1 - error.sum(0) / spread).tolist()}


def cpu_seconds() -> float:
    """Return user and system seconds of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="data set directory made by hpcmlp prepare")
    parser.add_argument("--hidden", type=lambda text: [int(w) for w in text.split(",")], required=True)
    parser.add_argument("--global-batch-size", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    manifest = json.loads((args.data / "dataset.json").read_text())
    x, y = read_split(args.data, manifest, "train")
    outputs = len(manifest["classes"]) if manifest["task"] == "classification" else len(manifest["target_names"])
    network = make_network([x.shape[1], *args.hidden, outputs])
    cpu, wall = cpu_seconds(), time.perf_counter()
    last = train(network, x, y, args)
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    print(json.dumps({**evaluate(network, *read_split(args.data, manifest, "test")), "last_loss": last,
                      "cpu_s": cpu, "wall_s": wall, "threads": args.threads, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
