"""Serve a model folder: texts -> anchor states and unit vectors, packed by token budget, longest first.

1. A thread tokenises the next block of texts while the model works on this one; the tokenizer is the folder's own,
   post-processor included.
2. A block's texts, longest first, fill packs of at most ``pack_tokens`` tokens: nothing is padded.
3. A pack passes through the forward that trains. So the vectors are those of the engine, of sentence-transformers
   and of plain transformers, whatever the packs.

A folder without ``anchor.json`` that sentence-transformers can read is served by that library, see
:class:`PlainEncoder`; :func:`open_encoder` chooses.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from anchor.errors import ConfigError, DataError, ModelError, did_you_mean
from anchor.models.attention import implementation
from anchor.models.backbone import DTYPES, load_causal_lm
from anchor.models.embedder import Embedder

BLOCK_TEXTS = 2048
"""Texts that are tokenised, sorted and held at a time."""


class TextEncoder:
    """What every kind of model folder offers.

    Attributes:
        folder: the model folder.
        about: ``anchor.json``, or what stands in for it.
        dtype: compute dtype, ``bf16`` or ``fp32``.
        raw: whether :meth:`states` are anchor states before normalisation; otherwise they are vectors as the
            folder's own modules make them.
    """

    raw = True

    def __init__(self, folder: Path, about: dict[str, Any], dtype: str) -> None:
        self.folder = folder
        self.about = about
        self.dtype = dtype
        self.prompts: dict[str, str] = about["prompts"]
        self.max_tokens: int = about["max_tokens"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        raise NotImplementedError

    def states(self, texts: Sequence[str], prompt: str = "") -> Float[np.ndarray, "B D"]:
        """Anchor states, float32, in the order of the texts."""
        raise NotImplementedError

    def encode(self, texts: Sequence[str], prompt: str = "") -> Float[np.ndarray, "B D"]:
        """Embed texts.

        Args:
            texts: bare texts; too long ones are cut and keep the anchor token.
            prompt: put before every text.

        Returns:
            Unit vectors, float32, in the order of the texts.

        Raises:
            DataError: a vector is not finite.
        """
        return unit(self.states(texts, prompt))

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


class Encoder(TextEncoder):
    """A folder exported by ``anchor.train``, ready to encode.

    Args:
        folder: the folder.
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
        super().__init__(folder, json.loads(about.read_text(encoding="utf-8")), dtype)
        self.pack_tokens = pack_tokens
        self.backend = load_tokenizer(str(folder)).backend_tokenizer
        self.backend.no_padding()
        self.backend.enable_truncation(self.max_tokens)
        self.backend.encode_special_tokens = True
        kernel = attention if attention is not None else "varlen" if self.device.type == "cuda" else "segments"
        causal_lm = load_causal_lm(str(folder), DTYPES[dtype], implementation(kernel, self.device.type))
        self.embedder = Embedder(causal_lm).to(self.device).eval()

    @property
    def dimension(self) -> int:
        return self.embedder.causal_lm.config.hidden_size

    def states(self, texts: Sequence[str], prompt: str = "") -> Float[np.ndarray, "B D"]:
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        with torch.inference_mode():
            for start, ids in self._tokenised(texts, prompt):
                for members in by_length([len(i) for i in ids], self.pack_tokens):
                    pack = to_tensors(_text_pack([ids[m] for m in members]), self.device)
                    states, _ = self.embedder.anchor_states(pack)
                    out[[start + m for m in members]] = states.float().cpu().numpy()
        return _finite(out, self.folder)

    def _tokenised(self, texts: Sequence[str], prompt: str) -> Iterator[tuple[int, list[np.ndarray]]]:
        """``(index of the first text, token ids of each)`` by blocks; the next block is made ahead by a thread."""

        def tokenise(start: int) -> list[np.ndarray]:
            block = [prompt + text for text in texts[start : start + BLOCK_TEXTS]]
            return [np.asarray(one.ids, dtype=np.int32) for one in self.backend.encode_batch_fast(block)]

        starts = range(0, len(texts), BLOCK_TEXTS)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokeniser") as pool:
            ahead = pool.submit(tokenise, 0) if texts else None
            for start in starts:
                if ahead is None:
                    break
                ids = ahead.result()
                ahead = pool.submit(tokenise, start + BLOCK_TEXTS) if start + BLOCK_TEXTS < len(texts) else None
                yield start, ids


class PlainEncoder(TextEncoder):
    """A folder of sentence-transformers that this project did not export, served by that library.

    Args:
        folder: holds ``modules.json``.
        dtype: ``bf16`` or ``fp32``.
        pack_tokens: tokens of one forward pass, padding included, if every text had the maximal length.

    Raises:
        ModelError: the library is not installed, or cannot read the folder.
    """

    raw = False

    def __init__(self, folder: Path, *, dtype: str, pack_tokens: int = 8192) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ModelError(f"{folder}: no anchor.json; `pip install sentence-transformers` to serve it") from error
        try:
            model = SentenceTransformer(str(folder), model_kwargs={"dtype": DTYPES[dtype]}, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{folder}: sentence-transformers cannot read it: {reason}") from error
        limit = model.max_seq_length or 512
        super().__init__(folder, {"prompts": dict(model.prompts), "max_tokens": limit}, dtype)
        self.model = model
        self.batch_size = max(1, pack_tokens // limit)

    @property
    def dimension(self) -> int:
        size = self.model.get_embedding_dimension()
        if size is None:
            raise ModelError(f"{self.folder}: its modules do not say how long an embedding is")
        return size

    def states(self, texts: Sequence[str], prompt: str = "") -> Float[np.ndarray, "B D"]:
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        # An empty prompt keeps the folder's default prompt away.
        vectors = self.model.encode(list(texts), prompt=prompt, batch_size=self.batch_size, show_progress_bar=False)
        return _finite(np.asarray(vectors, dtype=np.float32), self.folder)


def open_encoder(
    folder: Path, *, dtype: str, attention: str | None = None, pack_tokens: int = 8192
) -> Encoder | PlainEncoder:
    """The encoder for a folder: exported by this project, or any that sentence-transformers reads.

    Raises:
        ModelError: missing folder, or neither ``anchor.json`` nor ``modules.json`` in it.
    """
    resolve_model_path(str(folder))
    if (folder / "anchor.json").is_file():
        return Encoder(folder, dtype=dtype, attention=attention, pack_tokens=pack_tokens)
    if not (folder / "modules.json").is_file():
        raise ModelError(
            f"{folder}: neither anchor.json nor modules.json; expected a folder exported by anchor.train or one of "
            "sentence-transformers"
        )
    if attention is not None:
        raise ConfigError(f"{folder}: no anchor.json, so sentence-transformers serves it; leave --attention out")
    return PlainEncoder(folder, dtype=dtype, pack_tokens=pack_tokens)


def unit(states: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B D"]:
    """Rows scaled to length 1, float32; a row of zeros stays."""
    wide = states.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def by_length(lengths: list[int], pack_tokens: int) -> Iterator[list[int]]:
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


class NotFiniteError(DataError):
    """A vector that is not finite.

    Attributes:
        index: which of the texts, from 0.
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.index)  # it travels between ranks


def _finite(states: np.ndarray, folder: Path) -> np.ndarray:
    good = np.asarray(np.isfinite(states).all(axis=1))
    if not good.all():
        first = int(np.argmin(good))
        raise NotFiniteError(
            f"{folder}: {int((~good).sum())} of {len(good)} vectors are not finite, first that of text {first}; "
            "use --dtype fp32, or look at the weights",
            first,
        )
    return states


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
