"""Reconstruction of texts from anchor states, in two packed backbone passes regardless of the number of pairs.

1. Encode pass: ``h = Dec(Embed(ids))``; the anchor state of segment s is ``h[last(s)]``.
2. Decode pass through the same backbone (:mod:`anchor.models.decode_pass`): rows ``[decode prefix, v(partner(s)),
   x[body(s)]]`` of all target segments, from both sides or one, predict ``[ids[body(s)], anchor token]``. ``v`` is the
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
    """Weight of a target token's negative log-likelihood, by the role of its segment.

    Attributes:
        query: weight of query tokens (document-to-query); None if queries are not decoded at all.
        document: weight of positives' tokens (query-to-document); None if positives are not decoded at all.
    """

    query: float | None
    document: float | None

    @property
    def decoded_roles(self) -> tuple[int, ...]:
        """Roles of the segments that are decoded."""
        weights = {QUERY: self.query, POSITIVE: self.document}
        return tuple(role for role, weight in weights.items() if weight is not None)


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """Options with which the decode pass departs from the paper.

    Attributes:
        decode_prefix_ids: tokens before the anchor vector in every decode row; the paper has none.
        input_dropout: fraction of the decode inputs to drop in training, 0 to 1; 0 in the paper.
        centred: whether to centre anchor states before the decode pass; not in the paper.
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
    """Generate text from prefix vectors in the layout of the decode pass, with a KV cache.

    Decoding is greedy or beam search and ignores the generation settings in the model's folder. The packed kernels
    have no cache, so generation uses scaled-dot-product attention. The model's own kernel and settings are restored
    afterwards.

    Args:
        causal_lm: a model with causal attention.
        prefixes: for each text, the raw final-norm hidden state of its anchor token, or P soft prompts.
        end_token_id: ends a text: the anchor token, or the end token of a model with special tokens.
        decode_prefix_ids: tokens before the prefix vectors.
        max_new_tokens: limit on the tokens of a text.
        num_beams: number of beams; 1 is greedy.

    Returns:
        Token ids of each text, without the end token.
    """
    before = torch.tensor([list(decode_prefix_ids)], dtype=torch.long, device=prefixes.device)
    embedded = causal_lm.get_input_embeddings()(before).expand(len(prefixes), -1, -1)
    inputs = torch.cat([embedded.to(causal_lm.dtype), prefixes.to(causal_lm.dtype)], dim=1)
    kernel, settings = causal_lm.config._attn_implementation, causal_lm.generation_config
    causal_lm.set_attn_implementation("sdpa")
    causal_lm.generation_config = GenerationConfig()  # `generate` takes unset values from here
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
    """Embedder and decoder that share one causal LM (Su et al. 2025, arXiv:2509.03020, algorithm 1).

    Args:
        causal_lm: the model.
        prefix_tokens: length of the template's prefix; targets begin after it and include the instruction. If None,
            targets are the bare texts.
        options: departures of the decode pass from the paper; none by default.
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
        """Return each segment's first target token, relative to its start.

        The last target is the anchor token, after the end of the body.
        """
        if self.prefix_tokens is None:
            return pack.body_starts
        return np.full_like(pack.body_starts, self.prefix_tokens)

    def forward(
        self, pack: PackTensors, weights: TargetWeights
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " 2"], Float[Tensor, "S H"], Float[Tensor, "2 2"]]:
        """Reconstruct one pack.

        Args:
            pack: whole pairs, each a query, its positive and possibly hard negatives, which are only encoded.
            weights: weight per target token.

        Returns:
            * the weighted sum of the target tokens' negative log-likelihoods, with gradient;
            * their unweighted sums over query tokens and over tokens of positives;
            * the anchor states of all segments;
            * the rise of these two sums when each target is decoded from a wrong partner in the pack; row 0 with all
              inputs, row 1 with none; zeros in training.

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
        # 2. Decode.
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
        """Return the loss, and its unweighted sums over query tokens and over tokens of positives."""
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
        """Return the extra nats from decoding with a wrong partner, summed over target tokens.

        Row 0 is with all inputs, row 1 with none.
        """
        wrong = wrong_partners_of(pack.pack.roles, pack.pack.text_ids)
        # A pair without a wrong partner in the pack keeps its own, so its difference is zero.
        wrong = np.where(wrong < 0, partners_of(pack.pack.roles), wrong)

        def nll(dropout: float, partner_of: np.ndarray | None = None) -> Tensor:
            return self._decode(pack, weights, vectors, inputs, dropout, partner_of)[1]

        return torch.stack([nll(0.0, wrong) - right, nll(1.0, wrong) - nll(1.0)])
