"""Time the whole training step of PyTorch: DDP over gloo, or one process, eager or compiled.

A step gathers a random batch from resident float32 samples, clears the gradients, runs forward, cross entropy and
backward and updates with Adam: what `hpcmlp bench step` times. DDP: processes on this machine over the loopback, each
with its share of the global batch; a step takes as long as its slowest process. See peer.py for how it is asked.
Runs in the peers' environment, which has no hpcmlp.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peer import BATCHES, make_parser, samples, take_turns, time_steps


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
    x, y, index = samples(sizes, rows, rank)
    source, labels, index = torch.from_numpy(x), torch.from_numpy(y), [torch.from_numpy(i) for i in index]

    def step(number: int) -> None:
        batch = index[number % BATCHES]
        optimizer.zero_grad(set_to_none=True)
        criterion(network(source[batch]), labels[batch]).backward()
        optimizer.step()

    return step


def run_rank(rank: int, args: argparse.Namespace, meeting: str, asked: list[Any], said: Any) -> None:
    """One process of the DDP run: takes the turns that its queue asks for; process 0 answers for all."""
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.ranks)
    rows = (rank + 1) * args.global_batch_size // args.ranks - rank * args.global_batch_size // args.ranks
    step = make_step(args, rank, rows)
    while (count := asked[rank].get()) > 0:
        dist.barrier()
        times = torch.tensor(time_steps(step, count), dtype=torch.float64)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        if rank == 0:
            said.put(times.tolist())
    dist.barrier()
    os._exit(0)  # gloo's own threads now and then abort the process when the group is taken down in order


def run_ddp(args: argparse.Namespace, about: dict) -> None:
    """Start the processes, hand turns on to them, end them."""
    context = torch.multiprocessing.get_context("spawn")
    asked, said = [context.SimpleQueue() for _ in range(args.ranks)], context.SimpleQueue()

    def turn(count: int) -> list[float]:
        for queue in asked:
            queue.put(count)
        return said.get()

    with tempfile.TemporaryDirectory() as folder:
        processes = torch.multiprocessing.spawn(run_rank, (args, os.path.join(folder, "meeting"), asked, said),
                                                args.ranks, join=False)
        turn(5)
        take_turns(about, turn)
        for queue in asked:
            queue.put(0)
        processes.join()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--mode", choices=("ddp", "eager", "compile"), required=True)
    parser.add_argument("--fused", action="store_true", help="Adam(fused=True)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the DDP run")
    args = parser.parse_args()
    about = {"peer": "torch", "version": torch.__version__, "mode": args.mode, "fused": args.fused,
             "processes": args.ranks, "threads": args.threads}
    if args.mode == "ddp":
        run_ddp(args, about)
        return
    torch.set_num_threads(args.threads)
    step = make_step(args, 0, args.global_batch_size)
    time_steps(step, 5)  # compiles
    take_turns(about, lambda count: time_steps(step, count))


if __name__ == "__main__":
    main()
