"""Anchor states + text -> decode pass -> cross-entropy: two packed backbone passes, whatever the number of pairs.

1. Encode pass: ``h = Dec(Embed(ids))``; the anchor state of segment s is ``h[last(s)]``.
2. Decode rows ``[anchor(partner(s)), x[body(s)]]`` of all target segments, of both sides or of one, gathered from
   ``cat([anchors, x])`` by an index plan, form one packed sequence again; a second pass of the same backbone.
3. The head runs on the decode rows only; they predict ``[ids[body(s)], anchor token]``.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from anchor.data.batches import PackTensors
from anchor.data.packing import cu_seqlens, decode_plan, position_ids
from anchor.data.records import POSITIVE, QUERY
from anchor.data.shards import Pack
from anchor.models.embedder import Embedder
from anchor.models.head import Head, output_layer


@dataclass(frozen=True, slots=True)
class TargetWeights:
    """Weight of one target token's negative log-likelihood, by the role of its segment.

    Attributes:
        query: of tokens of queries (document-to-query); None: queries are not decoded at all.
        document: of tokens of positives (query-to-document); None: positives are not decoded at all.
    """

    query: float | None
    document: float | None

    @property
    def decoded_roles(self) -> tuple[int, ...]:
        """Roles of the segments that are targets."""
        weights = {QUERY: self.query, POSITIVE: self.document}
        return tuple(role for role, weight in weights.items() if weight is not None)


@torch.inference_mode()
def generate_from_prefixes(
    causal_lm: PreTrainedModel,
    prefixes: Float[Tensor, "B P H"],
    end_token_id: int,
    *,
    max_new_tokens: int,
    num_beams: int = 1,
) -> list[list[int]]:
    """What prefix vectors say: the text after them, as the decode pass was trained, with a KV cache.

    Greedy, or beam search; nothing of the folder's generation settings is used. A pack's kernel has no cache, so
    generation runs on scaled-dot-product attention; the model's own kernel and settings are set again afterwards.

    Args:
        causal_lm: the model, causal.
        prefixes: per text one raw final-norm hidden state of its anchor token, or P soft prompts.
        end_token_id: ends a text: the anchor token, or the end token of a model with special tokens.
        max_new_tokens: of a text.
        num_beams: 1 is greedy.

    Returns:
        Token ids of each text, without the end token.
    """
    kernel, settings = causal_lm.config._attn_implementation, causal_lm.generation_config
    causal_lm.set_attn_implementation("sdpa")
    causal_lm.generation_config = GenerationConfig()  # `generate` takes what is not given from here
    try:
        out: Any = cast(Any, causal_lm).generate(
            inputs_embeds=prefixes.to(causal_lm.dtype),
            attention_mask=torch.ones(prefixes.shape[:2], dtype=torch.long, device=prefixes.device),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                eos_token_id=end_token_id,
                pad_token_id=end_token_id,
            ),
        )
    finally:
        causal_lm.set_attn_implementation(cast(str, kernel))
        causal_lm.generation_config = settings
    rows: list[list[int]] = out.tolist()
    return [row[: row.index(end_token_id)] if end_token_id in row else row for row in rows]


class Reconstructor(nn.Module):
    """Embedder and decoder of one causal LM (Su et al. 2025, arXiv:2509.03020, algorithm 1).

    The anchor state enters the decode pass as one prefix vector: the raw final-norm hidden state, neither detached
    nor projected nor normalised.

    Args:
        causal_lm: the model.
        prefix_tokens: of the template: targets begin behind it and include the instruction; None: they are the bare
            texts.
    """

    def __init__(self, causal_lm: PreTrainedModel, prefix_tokens: int | None = None) -> None:
        super().__init__()
        self.embedder = Embedder(causal_lm)
        self.head = Head(output_layer(causal_lm))
        self.prefix_tokens = prefix_tokens

    def target_starts(self, pack: Pack) -> np.ndarray:
        """First target token of every segment, relative to it; the last is the anchor token, behind the body's end."""
        if self.prefix_tokens is None:
            return pack.body_starts
        return np.full_like(pack.body_starts, self.prefix_tokens)

    def forward(
        self, pack: PackTensors, weights: TargetWeights
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "S H"]]:
        """Weighted sum of the target tokens' negative log-likelihoods of one pack.

        Args:
            pack: whole pairs, each a query, its positive and perhaps hard negatives, which are only encoded.
            weights: factor per target token.

        Returns:
            The weighted sum (with gradient), the unweighted sums over tokens of queries and of positives (nats, no
            gradient), all float32 and zero where nothing is decoded; and the anchor states of all segments.
        """
        device = pack.input_ids.device
        arrays = pack.pack
        plan = decode_plan(
            arrays.input_ids,
            arrays.segment_lengths,
            arrays.roles,
            self.target_starts(arrays),
            arrays.body_ends,
            weights.decoded_roles,
        )
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
        row_weight = np.where(is_query, weights.query or 0.0, weights.document or 0.0).astype(np.float32)
        loss, nll = self.head(
            hidden, torch.from_numpy(plan.targets).to(device), torch.from_numpy(row_weight).to(device)
        )
        query_rows = torch.from_numpy(is_query).to(device)
        return loss, nll[query_rows].sum(), nll[~query_rows].sum(), anchors
