"""Anchor states + text -> decode pass -> cross-entropy: two packed backbone passes, whatever the number of pairs.

1. Encode pass: ``h = Dec(Embed(ids))``; the anchor state of segment s is ``h[last(s)]``.
2. Decode rows ``[anchor(partner(s)), x[body(s)]]`` of all target segments, gathered from ``cat([anchors, x])`` by
   an index plan, form one packed sequence again; a second pass of the same backbone.
3. The head runs on the decode rows only; they predict ``[ids[body(s)], anchor token]``.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor.data.batches import PackTensors
from anchor.data.packing import cu_seqlens, decode_plan, position_ids
from anchor.data.records import QUERY
from anchor.models.embedder import Embedder
from anchor.models.head import Head


@dataclass(frozen=True, slots=True)
class TargetWeights:
    """Weight of one target token's negative log-likelihood, by the role of its segment.

    Attributes:
        query: of tokens of queries (document-to-query).
        document: of tokens of positives (query-to-document).
    """

    query: float
    document: float


class Reconstructor(nn.Module):
    """Embedder and decoder of one causal LM (Su et al. 2025, arXiv:2509.03020, algorithm 1).

    The anchor state enters the decode pass as one prefix vector: the raw final-norm hidden state, neither detached
    nor projected nor normalised.

    Args:
        causal_lm: the model.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.embedder = Embedder(causal_lm)
        self.head = Head(cast(nn.Linear, causal_lm.get_output_embeddings()))

    def forward(
        self, pack: PackTensors, weights: TargetWeights
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
        """Weighted sum of the target tokens' negative log-likelihoods of one pack.

        Args:
            pack: whole pairs of a query and a positive, in this order, and nothing else.
            weights: factor per target token.

        Returns:
            The weighted sum (with gradient), and the unweighted sums over tokens of queries and of positives
            (nats, no gradient); all float32.
        """
        device = pack.input_ids.device
        arrays = pack.pack
        plan = decode_plan(arrays.input_ids, arrays.segment_lengths, arrays.roles, arrays.body_starts, arrays.body_ends)
        # 1. Encode.
        anchors, inputs = self.embedder.anchor_states(pack)
        # 2. Decode.
        rows = torch.cat([anchors.to(inputs.dtype), inputs])[torch.from_numpy(plan.gather).to(device)]
        hidden = self.embedder.hidden_states(
            rows,
            torch.from_numpy(position_ids(plan.lengths)).to(device),
            torch.from_numpy(cu_seqlens(plan.lengths)).to(device),
            int(plan.lengths.max()),
        )
        # 3. Head.
        is_query = plan.target_roles == QUERY
        row_weight = np.where(is_query, weights.query, weights.document).astype(np.float32)
        loss, nll = self.head(
            hidden, torch.from_numpy(plan.targets).to(device), torch.from_numpy(row_weight).to(device)
        )
        query_rows = torch.from_numpy(is_query).to(device)
        return loss, nll[query_rows].sum(), nll[~query_rows].sum()
