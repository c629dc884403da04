"""Time the whole training step of PyTorch DDP over gloo, one process of several hosts at a time.

The step is that of `peers/torch_step.py`; here every process is started by itself, on its own host, and the processes
meet through a file that all hosts see. Process 0 prints one JSON object with `step_ms`, the median over the steps of
the slowest process. Runs in the peers' environment (torch, numpy), which has no hpcmlp.
"""

import argparse
import json
import os
import statistics
import time

import torch
import torch.distributed as dist

ROWS = 8192     # resident samples, as in hpcmlp bench step
BATCHES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--meeting", required=True, help="path of a file that does not exist yet")
    parser.add_argument("--sizes", type=lambda text: [int(w) for w in text.split(",")], required=True)
    parser.add_argument("--global-batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--bucket-mb", type=float, default=25, help="DDP's bucket_cap_mb (default 25, PyTorch's own)")
    # bf16_compress_hook wants CUDA and NCCL.
    parser.add_argument("--float16", action="store_true", help="gradients in float16 on the wire (fp16_compress_hook)")
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "eth0")
    torch.set_num_threads(1)
    torch.manual_seed(args.rank)
    dist.init_process_group("gloo", init_method=f"file://{args.meeting}", rank=args.rank, world_size=args.ranks)

    layers: list[torch.nn.Module] = []
    for a, b in zip(args.sizes, args.sizes[1:], strict=False):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers[:-1]),
                                                        bucket_cap_mb=args.bucket_mb, gradient_as_bucket_view=True)
    if args.float16:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
        network.register_comm_hook(None, fp16_compress_hook)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    criterion = torch.nn.CrossEntropyLoss()
    batch = args.global_batch_size
    rows = (args.rank + 1) * batch // args.ranks - args.rank * batch // args.ranks
    source, labels = torch.randn(ROWS, args.sizes[0]), torch.randint(0, args.sizes[-1], (ROWS,))
    index = [torch.randint(0, ROWS, (rows,)) for _ in range(BATCHES)]
    warm_up, times = 3, []
    for number in range(warm_up + args.steps):
        chosen = index[number % BATCHES]
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        criterion(network(source[chosen]), labels[chosen]).backward()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - begin))
    slowest = torch.tensor(times[warm_up:], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if args.rank == 0:
        print(json.dumps({"step_ms": statistics.median(slowest.tolist()), "torch": torch.__version__}), flush=True)
    dist.barrier()
    os._exit(0)     # gloo's own threads now and then abort the process when the group is taken down in order


if __name__ == "__main__":
    main()
