"""Serve a model folder: texts -> anchor states and unit vectors, packed by token budget, longest first.

1. A thread tokenises the next block of texts while the model works on this one; the tokenizer is the folder's own,
   post-processor included.
2. A block's texts, longest first, fill packs of at most ``pack_tokens`` tokens: nothing is padded.
3. A pack passes through the forward that trains. So the vectors are those of the engine, of sentence-transformers
   and of plain transformers, whatever the packs.

Other kinds of folders: :mod:`eval.plain`, :mod:`eval.soft_prompts`; :func:`eval.opening.open_encoder` chooses.
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
from anchor.data.tokenization import load_tokenizer
from anchor.errors import ConfigError, DataError, ModelError, did_you_mean
from anchor.json_files import load_json, refuse_other_shape
from anchor.models.attention import default_kernel, implementation
from anchor.models.backbone import DTYPES, load_causal_lm, read_config
from anchor.models.centres import CENTRES_NAME, Centres
from anchor.models.embedder import Embedder

BLOCK_TEXTS = 512
"""Texts that are tokenised, sorted and held at a time: enough to fill packs, and several blocks in each call of `eval
embed` and `eval mteb` (2,048 and 1,024 texts per rank), so that all but the first are tokenised meanwhile."""
CPU_PASS_TOKENS = 4096
"""Most tokens of one forward pass on a CPU: larger activations leave its caches (16,384 tokens are 16 % slower)."""


class TextEncoder(ABC):
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
        self.device = torch.device("cuda" if dist.on_cuda() else "cpu")

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Length of an embedding."""

    @abstractmethod
    def states(self, texts: Sequence[str], prompt: str = "") -> Float[np.ndarray, "B D"]:
        """Embeddings before they are normalised (see ``raw``), float32, in the order of the texts."""

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
        return weights_xxh3(sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("*.bin")))

    def limit(self, max_tokens: int) -> None:
        """Cut texts to another length than the folder says, template and prompt included.

        Raises:
            ConfigError: more tokens than the model has positions, or too few for any text.
        """
        positions = self._positions()
        if positions is not None and max_tokens > positions:
            raise ConfigError(f"--max-tokens {max_tokens}: {self.folder} has {positions} positions; give at most that")
        self._truncate(max_tokens)
        self.max_tokens, self.about = max_tokens, {**self.about, "max_tokens": max_tokens}

    def _positions(self) -> int | None:
        """Longest text that the model can read; None where it does not say."""
        return None

    @abstractmethod
    def _truncate(self, max_tokens: int) -> None:
        """Make the tokenizer cut texts at ``max_tokens``."""

    def prompt(self, name: str) -> str:
        """A prompt of the folder by name.

        Raises:
            ConfigError: no prompt of that name.
        """
        if name not in self.prompts:
            raise ConfigError(f"{self.folder}: no prompt is called '{name}'{did_you_mean(name, self.prompts)}")
        return self.prompts[name]


class PackedEncoder(TextEncoder):
    """A folder of this project: its texts pass through the packed forward that trains.

    Args:
        folder: the folder.
        dtype: ``bf16`` or ``fp32``.
        attention: ``segments``, ``varlen`` or ``flash``; by device and dtype when None.
        pack_tokens: most tokens of one forward pass, on a CPU never above 4,096; longer texts still pass alone.

    Attributes:
        backend: the folder's tokenizer.
        implementation: transformers' name of the attention kernel.

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
        """Embeddings of a pack's texts before they are normalised, and the vectors that stand for each in decoding."""

    def states(self, texts: Sequence[str], prompt: str = "") -> Float[np.ndarray, "B D"]:
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        for members, states, _ in self._packs(texts, prompt):
            out[members] = states.float().cpu().numpy()
        return finite(out, self.folder)

    def prefixes(self, texts: Sequence[str], prompt: str = "") -> Float[torch.Tensor, "B P H"]:
        """The vectors that the decoder continues from, in the order of the texts; see :meth:`states` for arguments."""
        found = [(members, prefixes) for members, _, prefixes in self._packs(texts, prompt)]
        order = torch.tensor([member for members, _ in found for member in members])
        return torch.cat([prefixes for _, prefixes in found])[order.argsort().to(self.device)]

    def _packs(self, texts: Sequence[str], prompt: str) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Per pack: the numbers of its texts, and what :meth:`of_pack` gives."""
        for start, ids in self._tokenised(texts, prompt):
            for members in by_length([len(i) for i in ids], self.pack_tokens):
                with torch.inference_mode():
                    pack = to_tensors(_text_pack([ids[m] for m in members]), self.device)
                    states, prefixes = self.of_pack(pack)
                yield [start + m for m in members], states, prefixes

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


class Encoder(PackedEncoder):
    """A folder exported by ``anchor.train`` that holds a whole model; arguments as :class:`PackedEncoder`."""

    def __init__(self, folder: Path, *, dtype: str, attention: str | None = None, pack_tokens: int = 8192) -> None:
        read_about(folder)
        read_config(str(folder))  # in one line, before transformers' tokenizer reads it too
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
        """Anchor states as they enter the decode pass.

        Args:
            states: raw anchor states.
            texts: token ids of the texts, template included; they say which mean to subtract.
        """
        return states if self.centres is None else self.centres.matched(states, texts)


def read_about(folder: Path) -> dict[str, Any]:
    """``anchor.json`` of an exported folder.

    Raises:
        ModelError: missing folder, not exported by this project, or unreadable.
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
    """xxh3 of the bytes of files, one after another."""
    digest = xxhash.xxh3_64()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


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


def finite(states: Float[np.ndarray, "B D"], folder: Path) -> Float[np.ndarray, "B D"]:
    """The same states.

    Raises:
        NotFiniteError: one of them is not finite.
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
