"""Embed texts with a model folder: texts -> anchor states and unit vectors, packed by token budget, longest first.

1. A thread tokenises the next block of texts while the model embeds the current one. It uses the folder's own
   tokenizer, including the post-processor.
2. The texts of a block, longest first, fill packs of at most ``pack_tokens`` tokens, without padding.
3. Each pack runs through the forward pass used in training. So the vectors match the engine, sentence-transformers and
   plain transformers, however the texts are packed.

Other kinds of folders: :mod:`anchor.encoding.plain`, :mod:`anchor.encoding.soft_prompts`;
:func:`anchor.encoding.opening.open_encoder` chooses.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Float
from transformers import PreTrainedModel

from anchor import dist
from anchor.config.fields import MAX_COUNT
from anchor.config.model_path import resolve_model_path
from anchor.data.batches import PackTensors, to_tensors
from anchor.data.shards import Pack
from anchor.data.tokenizer_files import load_tokenizer
from anchor.errors import ConfigError, DataError, ModelError, did_you_mean
from anchor.json_files import load_json, refuse_other_shape
from anchor.models.attention import default_kernel, implementation
from anchor.models.backbone import DTYPES, load_causal_lm, read_config
from anchor.models.centres import CENTRES_NAME, Centres
from anchor.models.embedder import Embedder

BLOCK_TEXTS = 512
"""Texts to tokenise, sort and hold at a time.

A block is large enough to fill packs. `eval embed` and `eval mteb` pass 2,048 and 1,024 texts per rank and call, so
every block but the first is tokenised while the model runs.
"""
CPU_PASS_TOKENS = 4096
"""Most tokens of one forward pass on a CPU: larger activations fall out of cache (16,384 tokens are 16 % slower)."""


class TextEncoder(ABC):
    """Common interface of the encoders for all kinds of model folder.

    Attributes:
        folder: the model folder.
        about: content of ``anchor.json``, or a substitute with the same keys.
        dtype: compute dtype, ``bf16`` or ``fp32``.
        raw: True if :meth:`states` returns embeddings before normalisation. False if it returns vectors as the
            folder's own modules produce them.
    """

    raw = True

    def __init__(self, folder: Path, about: dict[str, Any], dtype: str) -> None:
        self.folder = folder
        self.about = about
        self.dtype = dtype
        self.prompts: dict[str, str] = about["prompts"]
        self.max_tokens: int = about["max_tokens"]
        self.device = torch.device("cuda" if dist.on_cuda() else "cpu")

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Length of an embedding."""

    @abstractmethod
    def states(self, texts: Sequence[str], prompt: str = "") -> Float[np.ndarray, "B D"]:
        """Return embeddings before normalisation (see ``raw``), float32, in the order of the texts."""

    def encode(self, texts: Sequence[str], prompt: str = "") -> Float[np.ndarray, "B D"]:
        """Embed texts.

        Args:
            texts: bare texts; overlong ones are cut but keep the anchor token.
            prompt: prefix of every text.

        Returns:
            Unit vectors, float32, in the order of the texts.

        Raises:
            DataError: a vector is not finite.
        """
        return unit(self.states(texts, prompt))

    def revision(self) -> str:
        """Return the xxh3 of the weights, which keeps results of different models apart."""
        return weights_xxh3(sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("*.bin")))

    def limit(self, max_tokens: int) -> None:
        """Override the folder's maximum length of a text, template and prompt included.

        Raises:
            ConfigError: more tokens than the model has positions, or too few for any text.
        """
        positions = self._positions()
        if positions is not None and max_tokens > positions:
            raise ConfigError(f"--max-tokens {max_tokens}: {self.folder} has {positions} positions; give at most that")
        self._truncate(max_tokens)
        self.max_tokens, self.about = max_tokens, {**self.about, "max_tokens": max_tokens}

    def _positions(self) -> int | None:
        """Return the number of positions of the model; None if unknown."""
        return None

    @abstractmethod
    def _truncate(self, max_tokens: int) -> None:
        """Set the length at which the tokenizer truncates."""

    def prompt(self, name: str) -> str:
        """Return a prompt of the folder by name.

        Raises:
            ConfigError: no prompt of that name.
        """
        if name not in self.prompts:
            raise ConfigError(f"{self.folder}: no prompt is called '{name}'{did_you_mean(name, self.prompts)}")
        return self.prompts[name]


class PackedEncoder(TextEncoder):
    """Encoder for a folder of this project; it runs the packed forward pass used in training.

    Args:
        folder: the model folder.
        dtype: ``bf16`` or ``fp32``.
        attention: ``segments``, ``varlen`` or ``flash``; None chooses by device and dtype.
        pack_tokens: most tokens of one forward pass, on a CPU at most 4,096. A longer text gets a pass to itself.

    Attributes:
        backend: the folder's tokenizer.
        implementation: transformers' name for the attention kernel.

    Raises:
        ModelError: missing folder, or not exported by this project.
    """

    def __init__(self, folder: Path, *, dtype: str, attention: str | None, pack_tokens: int) -> None:
        super().__init__(folder, read_about(folder), dtype)
        self.pack_tokens = min(pack_tokens, CPU_PASS_TOKENS) if self.device.type == "cpu" else pack_tokens
        self.backend = load_tokenizer(str(folder)).backend_tokenizer
        self.backend.no_padding()
        self.backend.enable_truncation(self.max_tokens)
        self.backend.encode_special_tokens = True
        kernel = attention or default_kernel(self.device.type, DTYPES[dtype])
        self.implementation = implementation(kernel, self.device.type, DTYPES[dtype])

    def _positions(self) -> int | None:
        return self.causal_lm.config.max_position_embeddings

    def _truncate(self, max_tokens: int) -> None:
        frame = len(self.backend.encode("").ids)
        if max_tokens <= frame:
            raise ConfigError(f"--max-tokens {max_tokens}: the template of {self.folder} takes {frame}; give more")
        self.backend.enable_truncation(max_tokens)

    @property
    @abstractmethod
    def causal_lm(self) -> PreTrainedModel:
        """The language model."""

    @abstractmethod
    def of_pack(self, pack: PackTensors) -> tuple[Float[torch.Tensor, "S D"], Float[torch.Tensor, "S P H"]]:
        """Return the unnormalised embeddings of a pack's texts, and each text's prefix vectors for decoding."""

    def states(self, texts: Sequence[str], prompt: str = "") -> Float[np.ndarray, "B D"]:
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        for members, states, _ in self._packs(texts, prompt):
            out[members] = states.float().cpu().numpy()
        return finite(out, self.folder)

    def prefixes(self, texts: Sequence[str], prompt: str = "") -> Float[torch.Tensor, "B P H"]:
        """Return the prefix vectors that the decoder continues from, in text order; arguments as in :meth:`encode`."""
        found = [(members, prefixes) for members, _, prefixes in self._packs(texts, prompt)]
        order = torch.tensor([member for members, _ in found for member in members])
        return torch.cat([prefixes for _, prefixes in found])[order.argsort().to(self.device)]

    def _packs(self, texts: Sequence[str], prompt: str) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Yield, per pack, the indices of its texts and the results of :meth:`of_pack`."""
        for start, ids in self._tokenised(texts, prompt):
            for members in by_length([len(i) for i in ids], self.pack_tokens):
                with torch.inference_mode():
                    pack = to_tensors(_text_pack([ids[m] for m in members]), self.device)
                    states, prefixes = self.of_pack(pack)
                yield [start + m for m in members], states, prefixes

    def _tokenised(self, texts: Sequence[str], prompt: str) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yield ``(index of the first text, token ids of each)`` per block; a thread tokenises one block ahead."""

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


class Encoder(PackedEncoder):
    """Encoder for a whole model exported by ``anchor.train``; arguments as for :class:`PackedEncoder`."""

    def __init__(self, folder: Path, *, dtype: str, attention: str | None = None, pack_tokens: int = 8192) -> None:
        read_about(folder)
        read_config(str(folder))  # fails with a one-line error before transformers' tokenizer reads it
        super().__init__(folder, dtype=dtype, attention=attention, pack_tokens=pack_tokens)
        causal_lm = load_causal_lm(str(folder), DTYPES[dtype], self.implementation)
        self.embedder = Embedder(causal_lm).to(self.device).eval()
        self.centres: Centres | None = None
        if self.about.get("anchor_vector") == "centred":
            self.centres = Centres()
            self.centres.read(folder / CENTRES_NAME)

    @property
    def causal_lm(self) -> PreTrainedModel:
        return self.embedder.causal_lm

    @property
    def dimension(self) -> int:
        return self.causal_lm.config.hidden_size

    def of_pack(self, pack: PackTensors) -> tuple[Float[torch.Tensor, "S D"], Float[torch.Tensor, "S P H"]]:
        states = self.embedder.anchor_states(pack, self.embedder.embed_tokens(pack.input_ids))
        texts = np.split(pack.pack.input_ids, np.cumsum(pack.pack.segment_lengths)[:-1])
        return states, self.prefix_vectors(states, [text.tolist() for text in texts])[:, None]

    def prefix_vectors(
        self, states: Float[torch.Tensor, "S H"], texts: Sequence[Sequence[int]]
    ) -> Float[torch.Tensor, "S H"]:
        """Return anchor states in the form that enters the decode pass.

        Args:
            states: raw anchor states.
            texts: token ids of the texts, template included; they determine which mean to subtract.
        """
        return states if self.centres is None else self.centres.matched(states, texts)


def read_about(folder: Path) -> dict[str, Any]:
    """Return the content of an exported folder's ``anchor.json``.

    Raises:
        ModelError: the folder is missing or not exported by this project, or ``anchor.json`` is unreadable.
    """
    resolve_model_path(str(folder))
    file = folder / "anchor.json"
    if not file.is_file():
        raise ModelError(f"{folder}: no anchor.json; only folders exported by anchor.train can be read")
    try:
        about = load_json(file)
        refuse_other_shape(about, {"prompts": {str: str}, "max_tokens": int})
        refuse_other_shape({"objective": None, **about}, {"objective": (str, type(None))})
        if not 0 < about["max_tokens"] <= MAX_COUNT:
            raise ValueError(f"max_tokens is {about['max_tokens']}, expected 1 to {MAX_COUNT}")
    except ValueError as error:
        raise ModelError(f"{file}: not readable: {error}; export again") from error
    return about


def weights_xxh3(files: Sequence[Path]) -> str:
    """Return the xxh3 of the concatenated bytes of files."""
    digest = xxhash.xxh3_64()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def unit(states: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B D"]:
    """Scale rows to length 1, float32; a zero row stays zero."""
    wide = states.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def by_length(lengths: list[int], pack_tokens: int) -> Iterator[list[int]]:
    """Yield groups of text indices, longest first, of at most ``pack_tokens`` tokens; a longer text goes alone."""
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
    """Error for a vector that is not finite.

    Attributes:
        index: index of the text, from 0.
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.index)  # ranks send it pickled


def finite(states: Float[np.ndarray, "B D"], folder: Path) -> Float[np.ndarray, "B D"]:
    """Return the states unchanged if all are finite.

    Raises:
        NotFiniteError: a vector is not finite.
    """
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
