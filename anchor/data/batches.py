"""Training order and this rank's packs.

1. Epoch e takes its N batches in the order ``permutation(seed, e)``. Step s is position ``s mod N`` of epoch
   ``s div N``, so resuming needs only the step number. Shards may hold several epochs, which batch the pairs
   differently. Epoch e of training then reads stored epoch e, and starts over after the last one.
2. Rank r of W takes packs ``r K/W ... (r+1) K/W`` of a batch's K packs, so every rank makes K/W forward calls.
3. A thread reads and checks the next batches while the current one trains.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from anchor.data.index import Index
from anchor.data.packing import cu_seqlens, position_ids
from anchor.data.shards import Batch, Pack, ShardReader
from anchor.errors import ShardError


def batch_order(num_batches: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of an epoch's batches, int64; a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(num_batches)


def batch_of_step(index: Index, seed: int, step: int, orders: dict[int, np.ndarray]) -> int:
    """Return the number of the batch that a step trains on; a pure function of ``index``, ``seed`` and ``step``.

    Args:
        index: index of the shards.
        seed: seed of the order.
        step: step number, from 0.
        orders: cache for the order of the current epoch.
    """
    size = index.batches_per_epoch
    epoch, position = divmod(step, size)
    if epoch not in orders:
        orders.clear()
        orders[epoch] = batch_order(size, seed, epoch)
    return epoch % index.num_epochs * size + int(orders[epoch][position])


def rank_packs(num_packs: int, rank: int, world_size: int) -> range:
    """Return the indices of a rank's packs.

    Raises:
        ValueError: ``world_size`` does not divide ``num_packs``.
    """
    if num_packs % world_size:
        raise ValueError(f"{world_size} ranks do not divide {num_packs} packs")
    share = num_packs // world_size
    return range(rank * share, (rank + 1) * share)


def check_ranks(pack_multiple: int, world_size: int, shards: Path, where: str) -> None:
    """Refuse a number of ranks that does not divide ``pack_multiple``.

    Raises:
        ShardError: ``world_size`` does not divide ``pack_multiple``. The message lists the numbers of ranks that do.
    """
    if pack_multiple % world_size:
        divisors = [str(d) for d in range(1, pack_multiple + 1) if pack_multiple % d == 0]
        either = " or ".join([", ".join(divisors[:-1])] * (len(divisors) > 1) + [divisors[-1]])
        raise ShardError(
            f"{where}: {world_size} ranks do not divide pack_multiple ({pack_multiple}) of {shards}; use {either} "
            f"rank{'s' * (pack_multiple > 1)}, or pack again with batch.pack_multiple={world_size}"
        )


@dataclass(frozen=True, slots=True)
class PackTensors:
    """Pack in the form that the models take.

    Attributes:
        input_ids: token ids.
        position_ids: position of each token in its segment.
        cu_seqlens: segment boundaries.
        max_length: tokens of the longest segment.
        pack: the numpy arrays that the tensors were made from.
        teacher: float32, the teacher's embedding of each pair's positive, in the order of the queries. None if the
            shards have no teacher.
    """

    input_ids: Int[Tensor, " T"]
    position_ids: Int[Tensor, " T"]
    cu_seqlens: Int[Tensor, " S1"]
    max_length: int
    pack: Pack
    teacher: Float[Tensor, "N H_t"] | None = None


def to_tensors(pack: Pack, device: torch.device) -> PackTensors:
    """Copy a pack to a device."""
    lengths = pack.segment_lengths
    return PackTensors(
        input_ids=torch.from_numpy(pack.input_ids.astype(np.int64)).to(device),
        position_ids=torch.from_numpy(position_ids(lengths)).to(device),
        cu_seqlens=torch.from_numpy(cu_seqlens(lengths)).to(device),
        max_length=int(lengths.max()),
        pack=pack,
        teacher=None if pack.teacher is None else torch.from_numpy(pack.teacher.astype(np.float32)).to(device),
    )


def batch_stream(
    reader: ShardReader, seed: int, first_step: int, last_step: int, ahead: int = 2
) -> Iterator[tuple[int, Batch]]:
    """Yield ``(step, batch)`` from a given step on; a thread reads ahead.

    Args:
        reader: the shards.
        seed: seed of the order.
        first_step: first step, from 0.
        last_step: step to stop before.
        ahead: most batches that the thread reads in advance.
    """
    orders: dict[int, np.ndarray] = {}

    def read(step: int) -> Batch:
        return reader.read(batch_of_step(reader.index, seed, step, orders))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-reader") as pool:
        pending: deque[Future[Batch]] = deque()
        try:
            for step in range(first_step, last_step):
                while len(pending) <= ahead and step + len(pending) < last_step:
                    pending.append(pool.submit(read, step + len(pending)))
                yield step, pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
