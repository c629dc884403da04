"""Time the whole training step of PyTorch: DDP over gloo, or one process, eager or compiled.

A step gathers a random batch from resident float32 samples, clears the gradients, runs forward, cross entropy and
backward and updates with Adam: what `hpcmlp bench step` times. DDP: processes on this machine over the loopback, one
BLAS thread each, each with its share of the global batch; a step takes as long as its slowest process.
Prints one JSON object with `step_ms` (median). Runs in the peers' environment (torch, numpy), which has no hpcmlp.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

ROWS = 8192  # resident samples, as in hpcmlp bench step
BATCHES = 16


def make_step(args: argparse.Namespace, rank: int, rows: int) -> Callable[[int], None]:
    """Return one training step as a function of its number."""
    torch.manual_seed(rank)
    sizes = args.sizes
    layers: list[torch.nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    network: torch.nn.Module = torch.nn.Sequential(*layers[:-1])
    if args.mode == "ddp":
        network = torch.nn.parallel.DistributedDataParallel(network)
    if args.mode == "compile":
        network = torch.compile(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=args.fused)
    criterion = torch.nn.CrossEntropyLoss()
    source = torch.randn(ROWS, sizes[0])
    labels = torch.randint(0, sizes[-1], (ROWS,))
    index = [torch.randint(0, ROWS, (rows,)) for _ in range(BATCHES)]

    def step(number: int) -> None:
        batch = index[number % BATCHES]
        optimizer.zero_grad(set_to_none=True)
        criterion(network(source[batch]), labels[batch]).backward()
        optimizer.step()

    return step


def time_steps(args: argparse.Namespace, step: Callable[[int], None]) -> list[float]:
    """Return the milliseconds of each step after a warm-up."""
    for number in range(max(5, args.steps // 10)):
        step(number)
    times = []
    for number in range(args.steps):
        begin = time.perf_counter()
        step(number)
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def run_rank(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One process of the DDP run; process 0 prints."""
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.ranks)
    rows = (rank + 1) * args.global_batch_size // args.ranks - rank * args.global_batch_size // args.ranks
    times = torch.tensor(time_steps(args, make_step(args, rank, rows)), dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    if rank == 0:
        say(args, times.tolist())
    dist.barrier()
    os._exit(0)  # gloo's own threads now and then abort the process when the group is taken down in order


def say(args: argparse.Namespace, times: list[float]) -> None:
    print(json.dumps({"mode": args.mode, "fused": args.fused, "sizes": args.sizes, "ranks": args.ranks,
                      "global_batch_size": args.global_batch_size, "threads": args.threads, "torch": torch.__version__,
                      "step_ms": statistics.median(times), "fastest_ms": min(times)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("ddp", "eager", "compile"), required=True)
    parser.add_argument("--fused", action="store_true", help="Adam(fused=True)")
    parser.add_argument("--sizes", type=lambda text: [int(w) for w in text.split(",")], required=True)
    parser.add_argument("--global-batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2, help="processes of the DDP run")
    parser.add_argument("--threads", type=int, help="BLAS threads of a process (default: 1 for ddp, else 2)")
    args = parser.parse_args()
    args.threads = args.threads or (1 if args.mode == "ddp" else 2)
    if args.mode == "ddp":
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(run_rank, (args, os.path.join(folder, "meeting")), args.ranks)
        return
    args.ranks = 1
    torch.set_num_threads(args.threads)
    say(args, time_steps(args, make_step(args, 0, args.global_batch_size)))


if __name__ == "__main__":
    main()
