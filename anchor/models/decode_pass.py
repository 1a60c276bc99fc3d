"""The decode pass shared by reconstruction and self-supervision: prefix vectors -> text -> cross-entropy.

1. Build one packed sequence of the decode rows ``[decode prefix, prefix vectors, x[body]]`` of all target segments. An
   index plan gathers them from ``cat([prefix vectors, inputs])``. A fraction of the body's inputs may be dropped.
2. Run the backbone over the sequence once.
3. Run the head on the last body + 1 positions of each row only.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from anchor.data.packing import DecodePlan, cu_seqlens, position_ids
from anchor.models.embedder import Embedder
from anchor.models.head import Head


def decode_pass(
    embedder: Embedder,
    head: Head,
    plan: DecodePlan,
    prefix_vectors: Float[Tensor, "V H"],
    inputs: Float[Tensor, "X H"],
    target_weights: Float[Tensor, " N"],
    *,
    input_dropout: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """Compute the negative log-likelihood of each target token, and their weighted sum.

    A dropped input keeps its position but becomes the zero vector (word dropout, Bowman et al. 2016,
    arXiv:1511.06349). The draw uses torch's generator of the device, which the step seeds by (seed, step, pack).

    Args:
        embedder: runs the backbone.
        head: the model's output layer.
        plan: the position of every vector in the rows, and the targets.
        prefix_vectors: anchor states or soft prompts, flat.
        inputs: input embeddings of the pack, then of the decode prefix.
        target_weights: weight of each target token.
        input_dropout: fraction of the body's inputs to drop, 0 to 1.

    Returns:
        The weighted sum (nats, with gradient) and the unweighted values (nats, no gradient), float32 or wider.
    """
    device = inputs.device
    # 1. Rows.
    rows = torch.cat([prefix_vectors.to(inputs.dtype), inputs])[torch.from_numpy(plan.gather).to(device)]
    if input_dropout:
        body = torch.from_numpy(plan.body_rows).to(device)
        kept = torch.rand(len(body), device=device) >= input_dropout
        keep = rows.new_ones(len(rows)).index_copy(0, body, kept.to(rows.dtype))
        rows = rows * keep[:, None]
    # 2. Backbone pass.
    hidden = embedder.hidden_states(
        rows,
        torch.from_numpy(position_ids(plan.lengths)).to(device),
        torch.from_numpy(cu_seqlens(plan.lengths)).to(device),
        int(plan.lengths.max()),
    )
    # 3. Head.
    predicting = hidden[torch.from_numpy(plan.target_rows).to(device)]
    return head(predicting, torch.from_numpy(plan.targets).to(device), target_weights)
