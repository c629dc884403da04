"""Built-in profiles of common hardware, each with its source: rooflines, taken only when asked for by name.

A profile knows a peak, a bandwidth and a latency; its tables are filled in from them, so it promises less than a
machine file: what a published peak leaves to be desired in practice is not in it, beyond the share named here.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

from hpcmlp.errors import ConfigError
from hpcmlp.plan.machine import PRODUCTS, Machine, read_machine

ROWS = (1, 64, 1024, 16384)
WIDTHS = (1, 16, 256, 4096)
SIZES = (2**8, 2**14, 2**17, 2**18, 2**20, 2**26)
CACHE_BYTES, CACHE_BANDWIDTH = 2**20, 40e9      # of a core, assumed for all
ALONE_BANDWIDTH = 15e9      # of a core whose neighbours are idle, assumed for all
PASS_FLOATS = {"gather": 2, "gather_uint8": 1.25, "bias_identity": 2, "bias_relu": 2, "relu_backward": 3,
               "bias_gelu": 2, "gelu_backward": 3, "column_sum": 1, "softmax_cross_entropy": 3, "mean_squared": 3,
               "layer_norm": 3, "layer_norm_backward": 4, "dropout_mask": 0.25, "dropout": 2.25, "add": 3, "finite": 1,
               "sum_squares": 1, "adam": 7, "momentum": 5, "ema": 3, "copy": 2}


@dataclass(frozen=True)
class Hardware:
    """Per rank: flop/s of matrix products, bytes/s of memory with all ranks busy, seconds to begin an operation."""

    flops: float
    bandwidth: float
    begin_s: float
    cores: int
    memory_bytes: int
    step_s: float
    watts: float
    source: str


@dataclass(frozen=True)
class Link:
    """A node's link: seconds before the first byte, bytes/s each way."""

    latency_s: float
    bandwidth: float
    source: str


HARDWARE = {
    "epyc-7763": Hardware(0.7 * 2.45e9 * 32, 204.8e9 / 64 * 0.8, 1e-6, 128, 512 << 30, 5e-5, 280 / 64,
                          "AMD EPYC 7763 data sheet: 64 cores of 2.45 GHz, two 256-bit FMA units (32 float32 flop a "
                          "cycle), 204.8 GB/s and 280 W a socket; 70 % of the peak and 80 % of the bandwidth assumed; "
                          "two sockets"),
    "xeon-8480": Hardware(0.7 * 2.0e9 * 64, 307.2e9 / 56 * 0.8, 1e-6, 112, 512 << 30, 5e-5, 350 / 56,
                          "Intel Xeon Platinum 8480+ data sheet: 56 cores of 2.0 GHz, two 512-bit FMA units (64 "
                          "float32 flop a cycle), 307.2 GB/s and 350 W a socket; 70 % of the peak and 80 % of the "
                          "bandwidth assumed; two sockets"),
    "h100": Hardware(350e12, 3.0e12, 5e-6, 1, 80 << 30, 5e-5, 700.0,
                     "NVIDIA H100 SXM: 3.0 TB/s of device copy measured on a test GPU; 350 TFLOP/s of tf32 products "
                     "assumed from 798 TFLOP/s of bf16 measured there; 700 W by its data sheet; one GPU a node"),
}
NETWORKS = {
    "ethernet-1g": Link(50e-6, 117e6, "1 Gbit/s (IEEE 802.3ab) less 6 % of headers; 50 us assumed for TCP"),
    "ethernet-10g": Link(30e-6, 1.17e9, "10 Gbit/s (IEEE 802.3ae) less 6 % of headers; 30 us assumed for TCP"),
    "ethernet-25g": Link(20e-6, 2.9e9, "25 Gbit/s (IEEE 802.3by) less 6 % of headers; 20 us assumed for TCP"),
    "infiniband-hdr": Link(2e-6, 23e9, "InfiniBand HDR, 200 Gbit/s, of which 92 % assumed; 2 us assumed with MPI"),
    "infiniband-ndr": Link(2e-6, 46e9, "InfiniBand NDR, 400 Gbit/s, of which 92 % assumed; 2 us assumed with MPI"),
}


def profile(name: str) -> Machine:
    """Return the machine of the built-in profile `name`, without a network. Local. Raises ConfigError."""
    if name not in HARDWARE:
        raise ConfigError(f"--machine {name}: neither a file nor a built-in profile (these are: "
                          f"{', '.join(HARDWARE)}); 'hpcmlp bench --calibrate FILE.json' measures a machine.")
    h = HARDWARE[name]
    products = {form: _grid(h) for form in PRODUCTS}
    node = {half: [[n, 1e-6 + 2 * n / h.bandwidth] for n in SIZES]
            for half in ("reduce", "gather", "together", "shared_reduce")}
    node["shared_gather"] = [[n, 2e-6] for n in SIZES]
    alone = replace(h, bandwidth=max(h.bandwidth, ALONE_BANDWIDTH))
    return Machine(name, f"built-in profile, not measured: {h.source}", h.cores, h.memory_bytes, 1, h.cores,
                   {"1": {form: _grid(alone) for form in PRODUCTS}, str(h.cores): products},
                   {"1": _passes(alone), str(h.cores): _passes(h)}, node if h.cores > 1 else {},
                   step_s={"1": h.step_s, str(h.cores): h.step_s}, input_s=1e-5, row_s=3e-8,
                   read_s_per_byte=1e-9, write_s_per_byte=2e-9, watts=h.watts)


def with_network(machine: Machine, name: str) -> Machine:
    """Return `machine` with the links of the built-in network `name`. Local. Raises ConfigError."""
    if name not in NETWORKS:
        raise ConfigError(f"--network {name} is no built-in network (these are: {', '.join(NETWORKS)}).")
    if machine.net:
        raise ConfigError(f"--network {name} has no effect: {machine.name} has its own measured links.")
    link = NETWORKS[name]
    table = [[n, link.latency_s + n / link.bandwidth] for n in SIZES]
    net: dict[str, Any] = {"reduce": table, "gather": table, "together": table, "latency_s": link.latency_s,
                           "s_per_byte": 1.0 / link.bandwidth, "cpu_s_per_byte": 1e-10}
    return replace(machine, net=net, source=f"{machine.source}; network {name}, not measured: {link.source}")


def _passes(h: Hardware) -> dict[str, list[list[float]]]:
    return {op: [[n, h.begin_s + 4 * floats * n / _rate(h, 4 * floats * n)] for n in SIZES]
            for op, floats in PASS_FLOATS.items()}


def _rate(h: Hardware, num_bytes: float) -> float:
    """Bytes a second: of the core's own cache where it holds them."""
    return max(h.bandwidth, CACHE_BANDWIDTH) if num_bytes <= CACHE_BYTES else h.bandwidth


def _grid(h: Hardware) -> dict[str, Any]:
    def seconds(m: int, k: int, n: int) -> float:
        moved = 4.0 * (m * k + k * n + m * n)
        return h.begin_s + max(2.0 * m * k * n / h.flops, moved / _rate(h, moved))

    return {"m": list(ROWS), "k": list(WIDTHS), "n": list(WIDTHS),
            "s": [[[seconds(m, k, n) for n in WIDTHS] for k in WIDTHS] for m in ROWS]}


def find_machine(name: str | None, network: str | None) -> Machine | None:
    """Return the machine of the file or profile `name`, with the links of the built-in network `network` if given.

    Local. None when nothing is given. Raises InputMissing, ConfigError.
    """
    if name is None:
        if network is not None:
            raise ConfigError("--network has no effect without --machine.")
        return None
    is_file = os.path.exists(name) or os.sep in name or name.endswith(".json")
    machine = read_machine(name) if is_file else profile(name)
    return machine if network is None else with_network(machine, network)
