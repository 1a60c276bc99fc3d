"""Encode and decode passes of LLM2Vec-Gen (arXiv:2603.10913): queries -> soft prompts -> answers.

1. Encode the queries, or all texts if there is a contrastive term. The special tokens' states give P soft prompts and
   one embedding per text, see :mod:`anchor.models.special_tokens`.
2. Decode with the same frozen model (:mod:`anchor.models.decode_pass`): rows ``[decode prefix, p_1 ... p_P, x[body]]``
   of all answers predict ``[ids[body], end token]``. Only the encode pass uses adapters; the decoder is the base.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor.data.batches import PackTensors, to_tensors
from anchor.data.packing import answer_decode_plan
from anchor.data.records import QUERY
from anchor.models.adapters import without_adapter
from anchor.models.decode_pass import decode_pass
from anchor.models.head import Head, output_layer
from anchor.models.special_tokens import SpecialTokens, SpecialTokensEmbedder


class SelfSupervisor(nn.Module):
    """Embedder with special tokens and decoder of answers, sharing one causal LM.

    Args:
        causal_lm: the frozen model, or one with adapters.
        special: special tokens and projections.
        end_token_id: ends an answer.
        decode_prefix_ids: tokens before the soft prompts in every decode row; the paper has none.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        special: SpecialTokens,
        end_token_id: int,
        decode_prefix_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.embedder = SpecialTokensEmbedder(causal_lm, special)
        self.head = Head(output_layer(causal_lm))
        self.end_token_id, self.decode_prefix_ids = end_token_id, decode_prefix_ids

    def forward(
        self, pack: PackTensors, token_weight: float | None, *, encode_all: bool = False
    ) -> tuple[Float[Tensor, "E D"], Float[Tensor, ""], Float[Tensor, ""]]:
        """Compute embeddings and the weighted negative log-likelihood of the answers.

        Args:
            pack: whole pairs, each a query, its positive (the answer) and possibly hard negatives.
            token_weight: weight per target token; None skips the decode pass.
            encode_all: encode positives and hard negatives too.

        Returns:
            * embeddings (not normalised) of the queries, or of all segments with ``encode_all``;
            * the weighted sum over target tokens, with gradient;
            * the unweighted sum, in nats, without gradient.

            Sums are float32 or wider, and zero without a decode pass.
        """
        # 1. Encode.
        decode_prefix = pack.input_ids.new_tensor(self.decode_prefix_ids)
        inputs = self.embedder.embed_tokens(torch.cat([pack.input_ids, decode_prefix]))
        own = inputs[: len(pack.input_ids)]
        is_query = pack.pack.roles == QUERY
        if encode_all:
            prompts, embeddings = self.embedder.encode(pack, own)
            prompts = prompts[torch.from_numpy(is_query).to(inputs.device)]
        else:
            tokens = torch.from_numpy(np.repeat(is_query, pack.pack.segment_lengths)).to(inputs.device)
            queries = to_tensors(pack.pack.select(is_query), inputs.device)
            prompts, embeddings = self.embedder.encode(queries, own[tokens])
        if token_weight is None:
            nothing = embeddings.new_zeros((), dtype=torch.promote_types(embeddings.dtype, torch.float32))
            return embeddings, nothing, nothing
        return embeddings, *self._decode(pack, inputs, prompts, token_weight)

    def _decode(
        self, pack: PackTensors, inputs: Float[Tensor, "X H"], prompts: Float[Tensor, "N P H"], token_weight: float
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        arrays, device = pack.pack, inputs.device
        plan = answer_decode_plan(
            arrays.input_ids,
            arrays.segment_lengths,
            arrays.roles,
            arrays.body_starts,
            arrays.body_ends,
            num_prefix=prompts.shape[1],
            end_token_id=self.end_token_id,
            num_decode_prefix=len(self.decode_prefix_ids),
        )
        weights = torch.full((len(plan.targets),), token_weight, device=device)
        embedder = self.embedder.embedder
        with without_adapter(embedder.causal_lm):
            loss, nll = decode_pass(embedder, self.head, plan, prompts.flatten(0, 1), inputs, weights)
        return loss, nll.sum()
