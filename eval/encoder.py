"""Serve an exported model folder: texts -> unit vectors, packed by token budget, longest first.

Tokenisation is the folder's own tokenizer, post-processor included; encoding is the same packed forward that
trains. So the vectors are those of the engine, of sentence-transformers and of plain transformers.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Float

from anchor.config.model_path import resolve_model_path
from anchor.data.batches import to_tensors
from anchor.data.shards import Pack
from anchor.data.tokenization import load_tokenizer
from anchor.errors import ConfigError, ModelError, did_you_mean
from anchor.models.attention import implementation
from anchor.models.backbone import DTYPES, load_causal_lm
from anchor.models.embedder import Embedder


class Encoder:
    """A model folder, ready to encode.

    Args:
        folder: exported by ``anchor.train``.
        dtype: ``bf16`` or ``fp32``.
        attention: ``segments``, ``varlen`` or ``flash``; by the device when None.
        pack_tokens: tokens of one forward pass; longer texts still pass alone.

    Raises:
        ModelError: missing folder, or not exported by this project.
    """

    def __init__(self, folder: Path, *, dtype: str, attention: str | None = None, pack_tokens: int = 8192) -> None:
        resolve_model_path(str(folder))
        about = folder / "anchor.json"
        if not about.is_file():
            raise ModelError(f"{folder}: no anchor.json; only folders exported by anchor.train can be read")
        self.folder = folder
        self.about: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))
        self.prompts: dict[str, str] = self.about["prompts"]
        self.pack_tokens = pack_tokens
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backend = load_tokenizer(str(folder)).backend_tokenizer
        self.backend.no_padding()
        self.backend.enable_truncation(self.about["max_tokens"])
        self.backend.encode_special_tokens = True
        kernel = attention if attention is not None else "varlen" if self.device.type == "cuda" else "segments"
        causal_lm = load_causal_lm(str(folder), DTYPES[dtype], implementation(kernel, self.device.type))
        self.embedder = Embedder(causal_lm).to(self.device).eval()

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return self.embedder.causal_lm.config.hidden_size

    def revision(self) -> str:
        """xxh3 of the weights: results of another model are never taken for this one's."""
        digest = xxhash.xxh3_64()
        for file in sorted(self.folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()

    def prompt(self, name: str) -> str:
        """A prompt of the folder by name.

        Raises:
            ConfigError: no prompt of that name.
        """
        if name not in self.prompts:
            raise ConfigError(f"{self.folder}: no prompt is called '{name}'{did_you_mean(name, self.prompts)}")
        return self.prompts[name]

    def encode(self, texts: Sequence[str], prompt: str = "") -> Float[np.ndarray, "B D"]:
        """Embed texts.

        Args:
            texts: bare texts; too long ones are cut and keep the anchor token.
            prompt: put before every text.

        Returns:
            Unit vectors, float32, in the order of the texts.
        """
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        encodings = self.backend.encode_batch_fast([prompt + text for text in texts])
        ids = [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]
        with torch.inference_mode():
            for members in _by_length([len(i) for i in ids], self.pack_tokens):
                vectors = self.embedder(to_tensors(_text_pack([ids[m] for m in members]), self.device))
                out[members] = vectors.cpu().numpy()
        return out


def _by_length(lengths: list[int], pack_tokens: int) -> Iterator[list[int]]:
    """Indices of texts, longest first, in groups of at most ``pack_tokens`` tokens."""
    group: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and tokens + lengths[i] > pack_tokens:
            yield group
            group, tokens = [], 0
        group.append(i)
        tokens += lengths[i]
    if group:
        yield group


def _text_pack(ids: list[np.ndarray]) -> Pack:
    lengths = np.asarray([len(i) for i in ids], dtype=np.int32)
    zeros = np.zeros(len(ids), dtype=np.int64)
    return Pack(
        input_ids=np.concatenate(ids),
        segment_lengths=lengths,
        body_starts=zeros.astype(np.int32),
        body_ends=lengths,
        roles=zeros.astype(np.int8),
        pair_ids=zeros,
        text_ids=zeros,
    )
