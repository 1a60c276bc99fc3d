"""Encoder for model folders that sentence-transformers reads and this project did not export."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from anchor.encoding.encoder import TextEncoder, finite, weights_xxh3
from anchor.errors import UNSAFE_PICKLE, ModelError, weights_line
from anchor.models.backbone import DTYPES

RESULTS = "mteb"
"""Subfolder that `eval mteb` writes results and cached vectors to by default."""
_WEIGHTS = (".safetensors", ".bin")
_DESCRIPTIONS = ("modules.json", "config.json", "sentence_bert_config.json")


class PlainEncoder(TextEncoder):
    """Encoder that runs a folder through sentence-transformers.

    Args:
        folder: a folder with ``modules.json``.
        dtype: ``bf16`` or ``fp32``.
        pack_tokens: tokens of one forward pass, padding included, counting each text at maximum length.

    Raises:
        ModelError: sentence-transformers is not installed or cannot read the folder.
    """

    raw = False

    def __init__(self, folder: Path, *, dtype: str, pack_tokens: int = 8192) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ModelError(f"{folder}: no anchor.json; `pip install sentence-transformers` to serve it") from error
        try:
            model = SentenceTransformer(
                str(folder), model_kwargs={"dtype": DTYPES[dtype]}, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, RuntimeError, *UNSAFE_PICKLE) as error:
            raise ModelError(f"{folder}: sentence-transformers cannot read it: {weights_line(error)}") from error
        limit = model.max_seq_length or 512
        super().__init__(folder, {"prompts": dict(model.prompts), "max_tokens": limit}, dtype)
        self.model = model
        self.batch_size = max(1, pack_tokens // limit)
        self._pack_tokens = pack_tokens

    def _positions(self) -> int | None:
        config = getattr(self.model[0], "config", None)
        return getattr(config, "max_position_embeddings", None)

    def _truncate(self, max_tokens: int) -> None:
        self.model.max_seq_length = max_tokens
        self.batch_size = max(1, self._pack_tokens // max_tokens)

    def revision(self) -> str:
        """Return the xxh3 of the weights and configurations of all modules."""
        beneath = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        inside = (path for path in beneath if path.relative_to(self.folder).parts[0] != RESULTS)
        return weights_xxh3([path for path in inside if path.suffix in _WEIGHTS or path.name in _DESCRIPTIONS])

    @property
    def dimension(self) -> int:
        size = self.model.get_embedding_dimension()
        if size is None:
            raise ModelError(f"{self.folder}: its modules do not say how long an embedding is")
        return size

    def states(self, texts: Sequence[str], prompt: str = "") -> Float[np.ndarray, "B D"]:
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        # Without an explicit prompt, sentence-transformers would add the folder's default prompt.
        vectors = self.model.encode(list(texts), prompt=prompt, batch_size=self.batch_size, show_progress_bar=False)
        return finite(np.asarray(vectors, dtype=np.float32), self.folder)
