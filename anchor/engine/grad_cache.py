"""Gradient cache: a pooled loss over more packs than fit into one forward (Gao et al. 2021, arXiv:2101.06983).

1. Run the forward of every pack without gradient, and keep only the embeddings.
2. Compute the loss over all embeddings of the step, and its gradient with respect to this rank's embeddings.
3. Run the forward of every pack again with gradient, and feed that gradient in. A joint objective's separable loss is
   computed only here: ``d(sum_p S_p + P(e_1, e_2, ...)) = sum_p ( dS_p + dP/de_p . de_p )``.

The pool is always the whole batch, yet only one pack's activations are in memory. Dropout is the same in both forwards:
each is seeded by (seed, step, pack) and begins with the encode pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anchor.data.batches import PackTensors
from anchor.data.shards import Batch
from anchor.engine.deepspeed import Engine
from anchor.objectives.base import JointObjective, PooledObjective, Shares, add_shares


def pooled_backward(engine: Engine, packs: Sequence[PackTensors], batch: Batch, forward: Callable[..., Any]) -> Shares:
    """Compute loss and gradient of a pooled or joint objective; a single pack needs no second forward.

    Args:
        engine: holds the objective.
        packs: this rank's packs.
        batch: the whole batch.
        forward: runs the objective's forward of the i-th local pack, seeded; further arguments are passed on.

    Returns:
        This rank's shares of the metrics.
    """
    objective, ranks = engine.objective, engine.ranks
    if not isinstance(objective, PooledObjective):
        raise TypeError(f"{type(objective).__name__} is not pooled")

    def parts(i: int) -> tuple[Tensor, Tensor | None, Shares]:
        """Return the embeddings, and a joint objective's separable loss and metrics."""
        output = forward(i)
        if isinstance(objective, JointObjective):
            return output[0], output[1], objective.metrics(output, batch)
        return output, None, {}

    if len(packs) == 1:
        embeddings, separable, separable_shares = parts(0)
        loss, shares = objective.loss(embeddings, batch, ranks.rank, ranks.world_size)
        engine.backward(loss if separable is None else loss + separable, last=True)
        return add_shares(shares, separable_shares)
    # 1.
    embeddings_only = (True,) if isinstance(objective, JointObjective) else ()
    with torch.no_grad():
        cached = [forward(i, *embeddings_only) for i in range(len(packs))]
    # 2.
    leaf = torch.cat(cached).requires_grad_()
    loss, shares = objective.loss(leaf, batch, ranks.rank, ranks.world_size)
    (gradient,) = torch.autograd.grad(loss, leaf)
    # 3.
    for i, part in enumerate(gradient.split([len(rows) for rows in cached])):
        embeddings, separable, separable_shares = parts(i)
        surrogate = (embeddings * part).sum()
        engine.backward(surrogate if separable is None else surrogate + separable, last=i == len(packs) - 1)
        shares = add_shares(shares, separable_shares)
    return shares
