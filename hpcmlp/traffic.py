"""What the collectives send, known without MPI: segments, what counts as small, and every rank's bytes.

The collectives themselves take these facts from here, so that a plan made on a laptop speaks of the code that runs.
"""

from collections.abc import Sequence

from hpcmlp.errors import ConfigError

# Between two ranks of a node, 23 MB: 2.2 ms for a reduce-scatter in segments of 1 MiB, 2.7 ms of 256 KiB, 4 of 64 KiB.
SEGMENT_BYTES = 2**20
# Between 8 hosts, 4 MiB at 200 Mbit/s: 96 % of the wire in segments of 256 KiB, 94.5 % of 1 MiB; no difference
# between 2.
CROSS_SEGMENT_BYTES = 2**18
# Where layers come and go: 4 ranks hold 48.5 MiB of 784-1024x8-10 instead of 51.2, as the ring's work buffers are two
# segments for each shape of a layer, in 1.13-1.27 of the unsharded step (1.18 in segments of 1 MiB).
LAYER_SEGMENT_BYTES = 2**17
SERVER_WORK_BYTES = 2**24   # receive buffers of a server, two over all ranks; segments shrink until they fit
# Between devices each segment costs a launch and a wait of some 10 us beside its message: chosen, not measured.
DEVICE_SEGMENT_BYTES = 2**22
REDUCE_SHARE = 4    # one call of MPI sends more than half a ring has to: so much smaller are small arrays there
SCALE_BLOCK = 256   # int8: values with one float32 scale
WORD_BINS = 4       # float64 that one control word takes among more than two ranks, so that its sum is exact


def segment_bytes(one_node: bool, by_layer: bool = False) -> int:
    """Return the bytes of one message of a ring, at most. Local.

    one_node : whether its ranks share a node. by_layer : whether layers come and go, and each has buffers of its own.
    """
    if by_layer:
        return LAYER_SEGMENT_BYTES
    return SEGMENT_BYTES if one_node else CROSS_SEGMENT_BYTES


def served_segment_bytes(size: int) -> int:
    """Return the bytes of one message to a server among `size` ranks, at most. Local."""
    return min(SEGMENT_BYTES, SERVER_WORK_BYTES // (2 * size))


def small_limit(size: int, one_node: bool = False) -> int:
    """Return the bytes up to which an all-reduce is better one call of MPI than a way around the ring. Local.

    As measured on one node with 2 ranks, and with 4 on 2 cores, where each hop waits for a core; reckoned for networks
    (latency 50 us, 1 Gbit/s). All ranks' numbers together stay below 1 MiB.
    """
    if not one_node:
        return min(2**14, 2**20 // size)
    return min(2**18, 2**20 // size)


def least_bytes(size: int, latency_s: float, s_per_byte: float, delay_s: float, loss: float) -> int:
    """Return the size from which on an array's collectives spend at most the share `loss` of their time on latency.

    Local. A hop of n bytes in all takes delay_s + latency_s + n / size * s_per_byte among `size` ranks.
    """
    return int(size * (latency_s + delay_s) / loss / s_per_byte)


def wire_bytes(elements: int, wire: str = "float32") -> int:
    """Return the bytes that `elements` float32 numbers take in one message in the format `wire`. Local."""
    if wire == "int8":
        return elements + 4 * -(-elements // SCALE_BLOCK)
    return elements * {"float32": 4, "bf16": 2, "float16": 2}[wire]


def part_bytes(elements: int, wire: str = "float32") -> int:
    """Return the bytes of a part of so many elements, segment by segment. Local."""
    segment = SEGMENT_BYTES // 4
    whole, rest = divmod(elements, segment)
    return whole * wire_bytes(segment, wire) + (wire_bytes(rest, wire) if rest else 0)


def reduce_sends(bounds: Sequence[int], rank: int, wire: str = "float32", words: int = 0) -> int:
    """Return the bytes that `rank` sends in a ring's reduce-scatter: every part but its own, words with each hop.

    Local.

    bounds : (size + 1,) element offsets. words : float64 control words.
    """
    size = len(bounds) - 1
    sent = sum(part_bytes(int(bounds[p + 1] - bounds[p]), wire) for p in range(size) if p != rank)
    return sent + (size - 1) * 8 * words * (1 if size <= 2 else WORD_BINS)


def gather_sends(bounds: Sequence[int], rank: int, wire: str = "float32") -> int:
    """Return the bytes that `rank` sends in a ring's all-gather: every part but that of the rank after it. Local."""
    size = len(bounds) - 1
    left_out = (rank + 1) % size
    return sum(part_bytes(int(bounds[p + 1] - bounds[p]), wire) for p in range(size) if p != left_out)


def together_sends(num_bytes: int, size: int, words: int = 0) -> int:
    """Return the bytes that a rank hands on when one call of MPI sums a small array, and words with it. Local.

    Two ranks exchange both as they are; among more everybody gets everybody's.
    """
    if size <= 2:
        return (size - 1) * (num_bytes + 8 * words)
    return (size - 1) * (-(-num_bytes // 8) * 8 + 8 * words * WORD_BINS)


def check_wire(sync: str, wire: str) -> None:
    """Raise ConfigError when numbers cannot be narrowed to `wire` with `sync`. Local.

    Only our ring does the additions itself: MPI's operations take float32.
    """
    if wire != "float32" and sync in ("native", "server"):
        raise ConfigError(f"--wire {wire} has no effect with --sync {sync}: only our own ring sends narrow numbers; "
                          "give --sync auto, shared or ring, or use --wire float32.")
