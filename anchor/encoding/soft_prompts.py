"""Folders of objective ``self_supervised``: special tokens and projections on top of a separate base model.

A text's embedding is ``e = mean over P of W_align W_rec h``, where h are the final-norm states of its P special tokens.
The decoder continues from the P soft prompts ``W_rec h`` (LLM2Vec-Gen, arXiv:2603.10913).
"""

from pathlib import Path

import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from anchor.data.batches import PackTensors
from anchor.encoding.encoder import PackedEncoder, weights_xxh3
from anchor.model_folder.special_tokens import load_special_tokens_embedder
from anchor.models.backbone import DTYPES


class SoftPromptsEncoder(PackedEncoder):
    """Encoder for a ``self_supervised`` folder; ``states`` returns e before normalisation.

    Args:
        folder, dtype, attention, pack_tokens: as for :class:`anchor.encoding.encoder.PackedEncoder`.
        base: path of the base model; None uses the path in ``anchor.json``.

    Raises:
        ModelError: the folder or the base is missing, or it is the wrong base.
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
        """Return the xxh3 of the folder's weights, adapter included, followed by the base's fingerprint."""
        files = sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("adapter/*.safetensors")])
        return f"{weights_xxh3(files)}-{self.about['base']['fingerprint'][:8]}"
