"""A pooled loss over more packs than fit into one forward (Gao et al. 2021, arXiv:2101.06983).

1. Forward every pack without gradient; keep the embeddings only.
2. The loss over all embeddings of the step; its gradient with respect to this rank's embeddings.
3. Forward every pack again, with gradient, and feed that gradient in.

The pool is always the whole batch and memory is that of one pack. Dropout is the same in both forwards because it
is seeded by (seed, step, pack) before each.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anchor.data.batches import PackTensors
from anchor.data.shards import Batch
from anchor.engine.deepspeed import Engine
from anchor.objectives.base import PooledObjective, Shares


def pooled_backward(
    engine: Engine, packs: Sequence[PackTensors], batch: Batch, forward: Callable[[int], Tensor]
) -> Shares:
    """Loss and gradient of a pooled objective; one pack takes the plain path, without a second forward.

    Args:
        engine: holds the objective.
        packs: this rank's packs.
        batch: the whole batch.
        forward: the embeddings of the i-th local pack, seeded.

    Returns:
        This rank's shares of the metrics.
    """
    objective, ranks = engine.objective, engine.ranks
    if not isinstance(objective, PooledObjective):
        raise TypeError(f"{type(objective).__name__} is not pooled")
    if len(packs) == 1:
        loss, shares = objective.loss(forward(0), batch, ranks.rank, ranks.world_size)
        engine.backward(loss, last=True)
        return shares
    # 1.
    with torch.no_grad():
        cached = [forward(i) for i in range(len(packs))]
    # 2.
    leaf = torch.cat(cached).requires_grad_()
    loss, shares = objective.loss(leaf, batch, ranks.rank, ranks.world_size)
    (gradient,) = torch.autograd.grad(loss, leaf)
    # 3.
    for i, part in enumerate(gradient.split([len(rows) for rows in cached])):
        engine.backward((forward(i) * part).sum(), last=i == len(packs) - 1)
    return shares
