"""Folders of objective ``self_supervised``: special tokens and projections over a base model that lies elsewhere.

The embedding of a text is ``e = mean over P of W_align W_rec h``, h the final-norm states of its P special tokens; the
decoder continues from the P soft prompts ``W_rec h`` (LLM2Vec-Gen, arXiv:2603.10913).
"""

from pathlib import Path

import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from anchor.data.batches import PackTensors
from anchor.models.backbone import DTYPES
from anchor.models.special_tokens_folder import load_special_tokens_embedder
from eval.encoder import PackedEncoder, weights_xxh3


class SoftPromptsEncoder(PackedEncoder):
    """Such a folder, ready to encode; ``states`` are e before they are normalised.

    Args:
        folder, dtype, attention, pack_tokens: as :class:`eval.encoder.PackedEncoder`.
        base: where the base model lies; where ``anchor.json`` says when None.

    Raises:
        ModelError: missing folder, or a base that is missing or another one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        attention: str | None = None,
        pack_tokens: int = 8192,
        base: str | None = None,
    ) -> None:
        super().__init__(folder, dtype=dtype, attention=attention, pack_tokens=pack_tokens)
        embedder = load_special_tokens_embedder(folder, DTYPES[dtype], self.implementation, base)
        self.embedder = embedder.to(self.device).eval()

    @property
    def causal_lm(self) -> PreTrainedModel:
        return self.embedder.embedder.causal_lm

    @property
    def dimension(self) -> int:
        return self.embedder.special.dimension

    def of_pack(self, pack: PackTensors) -> tuple[Float[torch.Tensor, "S D"], Float[torch.Tensor, "S P H"]]:
        prefixes, states = self.embedder.encode(pack)
        return states, prefixes

    def revision(self) -> str:
        """xxh3 of the folder's weights, adapter included, and the fingerprint of the base."""
        files = sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("adapter/*.safetensors")])
        return f"{weights_xxh3(files)}-{self.about['base']['fingerprint'][:8]}"
