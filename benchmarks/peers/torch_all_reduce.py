"""Time torch.distributed's all-reduce over gloo, for arrays of several sizes.

Processes on this machine over the loopback, one thread each; a call takes as long as its slowest process. Prints one
JSON list of {"bytes", "us"} (median over calls). Runs in the peers' environment (torch), which has no hpcmlp.
"""

import argparse
import json
import os
import tempfile
import time

import torch
import torch.distributed as dist


def run_rank(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One process; process 0 prints."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.ranks)
    rows = []
    for num_bytes in args.bytes:
        array = torch.zeros(num_bytes // 4)
        count = max(3, min(args.calls, int(1e8 / max(num_bytes, 1e5))))
        times = torch.zeros(2 * count, dtype=torch.float64)
        for call in range(2 * count):
            begin = time.perf_counter()
            dist.all_reduce(array)
            times[call] = 1e6 * (time.perf_counter() - begin)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        rows.append({"bytes": num_bytes, "us": times[count:].median().item()})
    if rank == 0:
        print(json.dumps(rows), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's own threads now and then abort the process when the group is taken down in order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--bytes", type=lambda text: [int(w) for w in text.split(",")], required=True)
    parser.add_argument("--calls", type=int, default=100, help="most timed calls of one size")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (args, os.path.join(folder, "meeting")), args.ranks)


if __name__ == "__main__":
    main()
