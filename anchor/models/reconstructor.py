"""Anchor states + text -> decode pass -> cross-entropy: two packed backbone passes, whatever the number of pairs.

1. Encode pass: ``h = Dec(Embed(ids))``; the anchor state of segment s is ``h[last(s)]``.
2. Decode pass of the same backbone (:mod:`anchor.models.decode_pass`): rows ``[decode prefix, v(partner(s)),
   x[body(s)]]`` of all target segments, of both sides or of one, predict ``[ids[body(s)], anchor token]``. ``v`` is the
   anchor state as it enters the decode pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from anchor.data.batches import PackTensors
from anchor.data.packing import decode_plan, partners_of, wrong_partners_of
from anchor.data.records import POSITIVE, QUERY
from anchor.data.shards import Pack
from anchor.models.centres import Centres
from anchor.models.decode_pass import decode_pass
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


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """Where the decode pass departs from the paper.

    Attributes:
        decode_prefix_ids: tokens before the anchor vector in every decode row; none in the paper.
        input_dropout: share of the decode inputs to drop while training, 0 to 1; 0 in the paper.
        centred: whether anchor states are centred before they enter the decode pass; not in the paper.
    """

    decode_prefix_ids: tuple[int, ...] = ()
    input_dropout: float = 0.0
    centred: bool = False


PAPER = DecodeOptions()


@torch.inference_mode()
def generate_from_prefixes(
    causal_lm: PreTrainedModel,
    prefixes: Float[Tensor, "B P H"],
    end_token_id: int,
    *,
    decode_prefix_ids: Sequence[int] = (),
    max_new_tokens: int,
    num_beams: int = 1,
) -> list[list[int]]:
    """Continue prefix vectors with text, as the decode pass was trained, with a KV cache.

    Greedy, or beam search; nothing of the folder's generation settings is used. A pack's kernel has no cache, so
    generation runs on scaled-dot-product attention; the model's own kernel and settings are set again afterwards.

    Args:
        causal_lm: the model, causal.
        prefixes: per text one raw final-norm hidden state of its anchor token, or P soft prompts.
        end_token_id: ends a text: the anchor token, or the end token of a model with special tokens.
        decode_prefix_ids: tokens before the prefix vectors.
        max_new_tokens: of a text.
        num_beams: 1 is greedy.

    Returns:
        Token ids of each text, without the end token.
    """
    before = torch.tensor([list(decode_prefix_ids)], dtype=torch.long, device=prefixes.device)
    embedded = causal_lm.get_input_embeddings()(before).expand(len(prefixes), -1, -1)
    inputs = torch.cat([embedded.to(causal_lm.dtype), prefixes.to(causal_lm.dtype)], dim=1)
    kernel, settings = causal_lm.config._attn_implementation, causal_lm.generation_config
    causal_lm.set_attn_implementation("sdpa")
    causal_lm.generation_config = GenerationConfig()  # `generate` takes what is not given from here
    try:
        out: Any = cast(Any, causal_lm).generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device),
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

    Args:
        causal_lm: the model.
        prefix_tokens: length of the template's prefix: targets begin behind it and include the instruction. None:
            targets are the bare texts.
        options: where decoding departs from the paper; by default nowhere.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, prefix_tokens: int | None = None, options: DecodeOptions = PAPER
    ) -> None:
        super().__init__()
        self.embedder = Embedder(causal_lm)
        self.head = Head(output_layer(causal_lm))
        self.prefix_tokens, self.options = prefix_tokens, options
        self.centres = Centres() if options.centred else None

    def target_starts(self, pack: Pack) -> np.ndarray:
        """First target token of every segment, relative to it; the last is the anchor token, behind the body's end."""
        if self.prefix_tokens is None:
            return pack.body_starts
        return np.full_like(pack.body_starts, self.prefix_tokens)

    def forward(
        self, pack: PackTensors, weights: TargetWeights
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " 2"], Float[Tensor, "S H"], Float[Tensor, "2 2"]]:
        """Reconstruct one pack.

        Args:
            pack: whole pairs, each a query, its positive and perhaps hard negatives, which are only encoded.
            weights: factor per target token.

        Returns:
            * the weighted sum of the target tokens' negative log-likelihoods, with gradient;
            * their unweighted sums over tokens of queries and of positives;
            * the anchor states of all segments;
            * the same two sums of what a wrong partner of the pack costs beyond the right one, row 0 with all inputs,
              row 1 without any; zeros while training.

            Sums are in nats, float32 or wider, and zero where nothing is decoded.
        """
        # 1. Encode.
        num_tokens = len(pack.input_ids)
        decode_prefix = pack.input_ids.new_tensor(self.options.decode_prefix_ids)
        inputs = self.embedder.embed_tokens(torch.cat([pack.input_ids, decode_prefix]))
        anchors = self.embedder.anchor_states(pack, inputs[:num_tokens])
        vectors = anchors
        if self.centres is not None:
            vectors = self.centres.vectors(anchors, pack.pack, training=self.training)
        # 2. and 3. Decode; the head.
        dropout = self.options.input_dropout if self.training else 0.0
        loss, nll = self._decode(pack, weights, vectors, inputs, dropout)
        dependence = nll.new_zeros(2, 2) if self.training else self._dependence(pack, weights, vectors, inputs, nll)
        return loss, nll, anchors, dependence

    def _decode(
        self,
        pack: PackTensors,
        weights: TargetWeights,
        vectors: Float[Tensor, "S H"],
        inputs: Float[Tensor, "X H"],
        dropout: float,
        partner_of: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss, and its unweighted sums over tokens of queries and of positives."""
        arrays = pack.pack
        plan = decode_plan(
            arrays.input_ids,
            arrays.segment_lengths,
            arrays.roles,
            self.target_starts(arrays),
            arrays.body_ends,
            weights.decoded_roles,
            num_decode_prefix=len(self.options.decode_prefix_ids),
            partner_of=partner_of,
        )
        is_query = plan.target_roles == QUERY
        row_weight = np.where(is_query, weights.query or 0.0, weights.document or 0.0).astype(np.float32)
        loss, nll = decode_pass(
            self.embedder,
            self.head,
            plan,
            vectors,
            inputs,
            torch.from_numpy(row_weight).to(inputs.device),
            input_dropout=dropout,
        )
        query_rows = torch.from_numpy(is_query).to(inputs.device)
        return loss, torch.stack([nll[query_rows].sum(), nll[~query_rows].sum()])

    def _dependence(
        self,
        pack: PackTensors,
        weights: TargetWeights,
        vectors: Float[Tensor, "S H"],
        inputs: Float[Tensor, "X H"],
        right: Float[Tensor, " 2"],
    ) -> Float[Tensor, "2 2"]:
        """Nats that a wrong partner costs, summed over target tokens; row 0 with all inputs, row 1 without any."""
        wrong = wrong_partners_of(pack.pack.roles, pack.pack.text_ids)
        # A pair without another beside it keeps its own partner, whose difference is zero.
        wrong = np.where(wrong < 0, partners_of(pack.pack.roles), wrong)

        def nll(dropout: float, partner_of: np.ndarray | None = None) -> Tensor:
            return self._decode(pack, weights, vectors, inputs, dropout, partner_of)[1]

        return torch.stack([nll(0.0, wrong) - right, nll(1.0, wrong) - nll(1.0)])
