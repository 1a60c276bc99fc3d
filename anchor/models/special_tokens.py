"""P trained special tokens and two projections over a frozen causal LM (LLM2Vec-Gen, arXiv:2603.10913).

1. The special tokens' ids are ``first_id ... first_id + P - 1``, after the base tokenizer's. Their input embeddings
   are ``rows``; all other tokens keep the base's. The base's embedding matrix is neither copied nor enlarged.
2. Every text ends in the P special tokens; h are their final-norm hidden states.
3. Soft prompts are ``p = W_rec h``. The embedding is ``e = mean over P of W_align p``, which equals ``W_align`` of the
   mean because ``W_align`` is affine.

A model folder stores only these parameters, in ``special_tokens.safetensors`` under their ``state_dict`` names.
``anchor.json`` names their base, which :func:`anchor.model_folder.description.base_fingerprint`
identifies.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor.data.batches import PackTensors
from anchor.models.embedder import Embedder, unit_vectors

WEIGHTS_NAME = "special_tokens.safetensors"
_INITIAL_NOISE = 0.1
_CHUNK_ROWS = 8192


class SpecialTokens(nn.Module):
    """Input embeddings of the P special tokens, ``W_rec`` and ``W_align``.

    Args:
        count: P.
        hidden_size: H, the base's hidden size.
        dimension: D, the dimension of the teacher's embeddings and ours.
        first_id: token id of the first special token; the others follow.

    Attributes:
        rows: input embeddings of the special tokens, ``P H``.
        reconstruction: ``W_rec``, ``H -> H`` with bias.
        alignment: ``W_align``, ``H -> D`` with bias.
    """

    def __init__(self, count: int, hidden_size: int, dimension: int, first_id: int) -> None:
        super().__init__()
        self.first_id = first_id
        self.rows = nn.Parameter(torch.zeros(count, hidden_size))
        self.reconstruction = nn.Linear(hidden_size, hidden_size)
        self.alignment = nn.Linear(hidden_size, dimension)
        # Keep the sizes, because ZeRO-3 leaves the parameters empty.
        self.count, self.hidden_size, self.dimension = count, hidden_size, dimension

    def forward(self, input_ids: Int[Tensor, " T"], embed: Callable[[Tensor], Tensor]) -> Float[Tensor, "T H"]:
        """Return input embeddings: special tokens from ``rows``, all others from the base.

        Only this method reads ``rows``, so that ZeRO-3 gathers it around the call.

        Args:
            input_ids: token ids.
            embed: the base's input embedding; never called with a special token's id.
        """
        base = embed(input_ids.clamp(max=self.first_id - 1))
        own = self.rows[(input_ids - self.first_id).clamp(min=0)].to(base.dtype)
        return torch.where((input_ids >= self.first_id)[:, None], own, base)

    def read_out(
        self, hidden: Float[Tensor, "T H"], cu_seqlens: Int[Tensor, " S1"]
    ) -> tuple[Float[Tensor, "S P H"], Float[Tensor, "S D"]]:
        """Return soft prompts and embeddings (not normalised) of segments that end in the P special tokens.

        Args:
            hidden: final-norm hidden states of packed segments.
            cu_seqlens: boundaries of the segments.
        """
        places = cu_seqlens[1:, None].long() + torch.arange(-self.count, 0, device=hidden.device)
        prompts = self.reconstruction(hidden[places])
        return prompts, self.alignment(prompts.mean(dim=1))

    @torch.no_grad()
    def initialise(self, embeddings: Float[Tensor, "V H"], seed: int) -> None:
        """Set the rows near the mean of the base's embeddings, and the projections as torch initialises linear layers.

        transformers also puts new tokens at the mean. The noise makes the rows differ; in each dimension it is a tenth
        of the embeddings' standard deviation. The result depends on the seed and the embeddings only.

        Args:
            embeddings: the base's input embeddings; only rows before ``first_id`` are used.
            seed: seed of the noise and the projections.
        """
        total, squares = (torch.zeros(self.hidden_size, device=embeddings.device) for _ in range(2))
        known = embeddings[: self.first_id]
        for chunk in known.split(_CHUNK_ROWS):  # a float32 copy of all rows may take gigabytes
            total += chunk.float().sum(dim=0)
            squares += chunk.float().square().sum(dim=0)
        mean = total / len(known)
        deviation = (squares / len(known) - mean.square()).clamp(min=0).sqrt()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            noise = torch.randn(self.count, self.hidden_size)
            self.reconstruction.reset_parameters()
            self.alignment.reset_parameters()
        self.rows.copy_(mean.cpu() + _INITIAL_NOISE * deviation.cpu() * noise)


class SpecialTokensEmbedder(nn.Module):
    """A base with special tokens: packs -> soft prompts and embeddings. Training and serving use the same code.

    Args:
        causal_lm: the base, with a packed attention kernel and possibly adapters.
        special: the special tokens and projections.
    """

    def __init__(self, causal_lm: PreTrainedModel, special: SpecialTokens) -> None:
        super().__init__()
        self.embedder = Embedder(causal_lm)
        self.special = special

    def embed_tokens(self, input_ids: Int[Tensor, " T"]) -> Float[Tensor, "T H"]:
        """Return input embeddings, including those of special tokens."""
        return self.special(input_ids, self.embedder.embed_tokens)

    def encode(
        self, pack: PackTensors, inputs: Float[Tensor, "T H"] | None = None
    ) -> tuple[Float[Tensor, "S P H"], Float[Tensor, "S D"]]:
        """Return soft prompts and embeddings (not normalised) of all segments of a pack.

        Args:
            pack: segments that end in the P special tokens.
            inputs: their input embeddings; computed if None.
        """
        inputs = self.embed_tokens(pack.input_ids) if inputs is None else inputs
        hidden = self.embedder.hidden_states(inputs, pack.position_ids, pack.cu_seqlens, pack.max_length)
        return self.special.read_out(hidden.to(self.special.reconstruction.weight.dtype), pack.cu_seqlens)

    def forward(self, pack: PackTensors) -> Float[Tensor, "S D"]:
        """Return the unit vectors of all segments, float32 or wider."""
        return unit_vectors(self.encode(pack)[1])
