"""Gradient cache: a pooled loss over more packs than fit into one forward (Gao et al. 2021, arXiv:2101.06983).

1. Run the forward of every pack without gradient, and keep only the embeddings.
2. Compute the loss over all embeddings of the step, and its gradient with respect to this rank's embeddings.
3. Run the forward of every pack again with gradient, and feed that gradient in. A local loss is computed only
   here: ``d(sum_p S_p + P(e_1, e_2, ...)) = sum_p ( dS_p + dP/de_p . de_p )``.

The pool is always the whole batch, yet only one pack's activations are in memory. Dropout is the same in both forwards:
each is seeded by (seed, step, pack) and begins with the encode pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from anchor.data.shards import Batch
from anchor.engine.deepspeed import Engine
from anchor.objectives.base import Output, PooledLoss, Shares, add_shares


def pooled_backward(
    engine: Engine, pooled_loss: PooledLoss, num_packs: int, batch: Batch, forward: Callable[..., Output]
) -> Shares:
    """Compute loss and gradient of an objective with a pooled loss; a single pack needs no second forward.

    Args:
        engine: holds the objective.
        pooled_loss: the objective's pooled loss.
        num_packs: number of this rank's packs.
        batch: the whole batch.
        forward: runs the objective's forward of the i-th local pack, seeded; takes ``embeddings_only``.

    Returns:
        This rank's shares of the metrics.
    """
    ranks = engine.ranks
    if num_packs == 1:
        output = forward(0)
        loss, shares = pooled_loss(_embeddings(output), batch, ranks.rank, ranks.world_size)
        engine.backward(loss if output.loss is None else loss + output.loss, last=True)
        return add_shares(shares, output.metrics)
    # 1.
    with torch.no_grad():
        cached = [_embeddings(forward(i, embeddings_only=True)) for i in range(num_packs)]
    # 2.
    leaf = torch.cat(cached).requires_grad_()
    loss, shares = pooled_loss(leaf, batch, ranks.rank, ranks.world_size)
    (gradient,) = torch.autograd.grad(loss, leaf)
    # 3.
    for i, part in enumerate(gradient.split([len(rows) for rows in cached])):
        output = forward(i)
        surrogate = (_embeddings(output) * part).sum()
        engine.backward(surrogate if output.loss is None else surrogate + output.loss, last=i == num_packs - 1)
        shares = add_shares(shares, output.metrics)
    return shares


def _embeddings(output: Output) -> Tensor:
    if output.embeddings is None:
        raise TypeError("an objective with a pooled loss returned no embeddings")
    return output.embeddings
