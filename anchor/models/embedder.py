"""Packs -> anchor states -> unit vectors. The same code trains and serves."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor.data.batches import PackTensors
from anchor.models.attention import packed_kwargs


class Embedder(nn.Module):
    """A causal LM whose embedding of a text is the final-norm hidden state of its last token.

    That token is the anchor token (Su et al. 2025, arXiv:2509.03020, section 3). Attention is inside segments only,
    and causal unless the model's ``config.is_causal`` is False.

    Args:
        causal_lm: model with a packed attention kernel, see :mod:`anchor.models.attention`.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def embed_tokens(self, input_ids: Int[Tensor, " T"]) -> Float[Tensor, "T H"]:
        """Input embeddings."""
        return self.causal_lm.get_input_embeddings()(input_ids)

    def hidden_states(
        self,
        inputs: Float[Tensor, "T H"],
        position_ids: Int[Tensor, " T"],
        cu_seqlens: Int[Tensor, " S1"],
        max_length: int,
    ) -> Float[Tensor, "T H"]:
        """One pass of the backbone over packed segments: input embeddings -> final-norm hidden states."""
        output = self.causal_lm.base_model(
            inputs_embeds=inputs[None], position_ids=position_ids[None], **packed_kwargs(cu_seqlens, max_length)
        )
        return output.last_hidden_state[0]

    def anchor_states(self, pack: PackTensors, inputs: Float[Tensor, "T H"]) -> Float[Tensor, "S H"]:
        """Hidden state of each segment's anchor token.

        Args:
            pack: the segments.
            inputs: their input embeddings.
        """
        hidden = self.hidden_states(inputs, pack.position_ids, pack.cu_seqlens, pack.max_length)
        return hidden[pack.cu_seqlens[1:].long() - 1]

    def forward(self, pack: PackTensors) -> Float[Tensor, "S H"]:
        """Unit vectors of all segments, float32."""
        return unit_vectors(self.anchor_states(pack, self.embed_tokens(pack.input_ids)))


def unit_vectors(states: Float[Tensor, "S H"]) -> Float[Tensor, "S H"]:
    """Rows scaled to length 1, in float32 or wider."""
    return nn.functional.normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)
