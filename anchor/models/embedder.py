"""The embedder: packs -> anchor states -> unit vectors. Training and serving use the same code."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor.data.batches import PackTensors
from anchor.models.attention import packed_kwargs


class Embedder(nn.Module):
    """A causal LM that embeds a text as the final-norm hidden state of its last token.

    That token is the anchor token (Su et al. 2025, arXiv:2509.03020, section 3). Tokens attend only within their
    segment, and causally unless the model's ``config.is_causal`` is False.

    Args:
        causal_lm: a model with a packed attention kernel, see :mod:`anchor.models.attention`.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def embed_tokens(self, input_ids: Int[Tensor, " T"]) -> Float[Tensor, "T H"]:
        """Return the input embeddings of token ids."""
        return self.causal_lm.get_input_embeddings()(input_ids)

    def hidden_states(
        self,
        inputs: Float[Tensor, "T H"],
        position_ids: Int[Tensor, " T"],
        cu_seqlens: Int[Tensor, " S1"],
        max_length: int,
    ) -> Float[Tensor, "T H"]:
        """Run the backbone over packed segments: input embeddings -> final-norm hidden states."""
        output = self.causal_lm.base_model(
            inputs_embeds=inputs[None], position_ids=position_ids[None], **packed_kwargs(cu_seqlens, max_length)
        )
        return output.last_hidden_state[0]

    def anchor_states(self, pack: PackTensors, inputs: Float[Tensor, "T H"]) -> Float[Tensor, "S H"]:
        """Return the hidden state of each segment's anchor token.

        Args:
            pack: the segments.
            inputs: their input embeddings.
        """
        hidden = self.hidden_states(inputs, pack.position_ids, pack.cu_seqlens, pack.max_length)
        return hidden[pack.cu_seqlens[1:].long() - 1]

    def forward(self, pack: PackTensors) -> Float[Tensor, "S H"]:
        """Return the unit vectors of all segments, float32 or wider."""
        return unit_vectors(self.anchor_states(pack, self.embed_tokens(pack.input_ids)))


def unit_vectors(states: Float[Tensor, "S H"]) -> Float[Tensor, "S H"]:
    """Scale rows to length 1, in float32 or wider."""
    return nn.functional.normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)
