"""Time the two collectives of ZeRO-3, all-gather and reduce-scatter, at several sizes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from anchor.dist import Ranks

MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Timing:
    """Timing of one collective at one size.

    Attributes:
        name: name of the collective.
        size_mib: size of the whole tensor, over all ranks, in MiB.
        milliseconds: the slowest rank's median.
        gib_per_second: rate at which data leaves a rank, (W - 1) / W of the tensor per call (the bus bandwidth of
            nccl-tests).
    """

    name: str
    size_mib: int
    milliseconds: float
    gib_per_second: float


def time_collectives(
    ranks: Ranks, sizes_mib: Sequence[int], turns: int = 5, begin: Callable[[str], None] = lambda what: None
) -> list[Timing]:
    """Time all-gather and reduce-scatter. Every rank must call this.

    Args:
        ranks: this process's rank and the world size; the process group must exist.
        sizes_mib: sizes of the whole tensor, in MiB.
        turns: number of timed repetitions, after one warm-up.
        begin: called before every repetition with a description of it.
    """
    found = []
    for size in sizes_mib:
        share = torch.ones(max(1, size * MIB // 4 // ranks.world_size), device=ranks.device)
        whole = torch.empty(share.numel() * ranks.world_size, device=ranks.device)
        for name, call in (
            ("all-gather", lambda share=share, whole=whole: dist.all_gather_into_tensor(whole, share)),
            ("reduce-scatter", lambda share=share, whole=whole: dist.reduce_scatter_tensor(share, whole)),
        ):
            what = f"{name} of {size} MiB"
            seconds = _median_seconds(call, ranks.device, turns, lambda what=what: begin(what))
            moved = whole.numel() * 4 * (ranks.world_size - 1) / ranks.world_size
            found.append(Timing(name, size, seconds * 1e3, moved / seconds / 1024**3))
    return found


def _median_seconds(call: Callable[[], object], device: torch.device, turns: int, begin: Callable[[], None]) -> float:
    taken = []
    for _ in range(turns + 1):
        begin()
        dist.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    slowest = torch.tensor(sorted(taken[1:])[turns // 2], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)
