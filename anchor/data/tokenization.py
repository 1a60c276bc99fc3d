"""Texts + template -> segments: token ids and the span of the bare text among them.

1. :func:`prepare_tokenizer` puts the template, with its trained special tokens where it has any, into the tokenizer's
   own post-processor and makes special tokens inside texts ordinary text, so that a web page cannot forge an anchor
   token or a turn.
2. :class:`SegmentTokenizer` encodes texts in batches, cuts the text (never the template) to the limit, and
   finds the body by character offsets: the first token that reaches past the instruction begins the body.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing

from anchor.config.model_path import resolve_model_path
from anchor.data.templates import Template, special_token_names
from anchor.errors import DataError, ModelError, ShardError, first_line

_SPACE = "\u2581"
"""How SentencePiece writes a space."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Texts with their templates, flat: prefix + instruction + body + suffix, whose last id is the anchor token.

    Attributes:
        input_ids: int32 ``T``, one segment after another.
        lengths: int32 ``S``, tokens of each.
        body_starts: int32 ``S``, index of the body's first token in its segment.
        body_ends: int32 ``S``, index after the body's last token.
        truncated: bool ``S``, whether the text was cut to the limit.
        problems: why a text cannot be used, by its number; such a segment has no body.
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    body_starts: np.ndarray
    body_ends: np.ndarray
    truncated: np.ndarray
    problems: dict[int, str]


def load_tokenizer(path: str) -> Any:
    """Load a fast transformers tokenizer from a folder, hub name or GGUF file (the last needs torch).

    Raises:
        ModelError: no such model, or no fast tokenizer there.
    """
    from transformers import AutoTokenizer  # takes a second to import; pure functions here do not need it

    location = resolve_model_path(path, files=("config.json", "tokenizer.json"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.name, trust_remote_code=False, **location.kwargs())
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{path}: no tokenizer could be loaded: {first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{path}: the tokenizer is not a fast one (tokenizer.json); convert it first")
    return tokenizer


def prepare_tokenizer(tokenizer: Any, template: Template, where: str) -> Any:
    """Put the template into a transformers tokenizer's post-processor; changes and returns it.

    After this, ``tokenizer(text)`` gives prefix + text + suffix, truncation keeps both ends, and the name of a
    special token inside a text is ordinary text. It is saved and loaded with the tokenizer. The template's trained
    special tokens are new ones, with consecutive ids behind all others.

    Raises:
        DataError: the template's anchor token or end token is not one token of this tokenizer, the tokenizer has a
            token of the name of a trained special token, or makes a special token of its name inside a text.
    """
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if template.special_tokens:
        _add_special_tokens(backend, template, where)
    prefix_ids, suffix_ids = _frame_ids(backend, template)
    added = backend.get_added_tokens_decoder()
    if not suffix_ids or suffix_ids[-1] not in added:
        pieces = [backend.id_to_token(i) for i in suffix_ids]
        raise DataError(
            f"{where}: the tokenizer has no token for the template's anchor: suffix {template.suffix!r} becomes "
            f"{pieces}; choose the template of this model's family"
        )
    # A template token that is not marked special would still be recognised inside texts.
    mark = [AddedToken(added[i].content, special=True, normalized=False) for i in {*prefix_ids, *suffix_ids} & {*added}]
    backend.add_special_tokens(mark)
    parts = {"prefix": prefix_ids, "suffix": suffix_ids}
    backend.post_processor = TemplateProcessing(
        single=("prefix:0 " if prefix_ids else "") + "$A:0 suffix:0",
        pair=("prefix:0 " if prefix_ids else "") + "$A:0 $B:1 suffix:1",
        special_tokens=[
            {"id": name, "ids": ids, "tokens": [backend.id_to_token(i) for i in ids]}
            for name, ids in parts.items()
            if ids
        ],
    )
    backend.encode_special_tokens = True
    for token in {*prefix_ids, *suffix_ids} & {*added}:
        name = added[token].content
        if token in backend.encode(name, add_special_tokens=False).ids:
            raise DataError(
                f"{where}: the text {name!r} becomes the special token of that name, as the tokenizer's own vocabulary "
                "has it too, so any text could forge the template; choose a template without it"
            )
    tokenizer.truncation_side = "right"  # as shards are cut; the suffix is kept all the same
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space_token"):
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = template.end or backend.id_to_token(suffix_ids[-1])
    return tokenizer


def _add_special_tokens(backend: Tokenizer, template: Template, where: str) -> None:
    names = special_token_names(template.special_tokens)
    present = [name for name in names if backend.token_to_id(name) is not None]
    if present:
        raise DataError(
            f"{where}: the tokenizer has a token '{present[0]}' already; use the tokenizer of the model before special "
            "tokens were trained for it"
        )
    end_token_id(backend, template, where)
    first = backend.get_vocab_size(with_added_tokens=True)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    ids = [backend.token_to_id(name) for name in names]
    if ids != list(range(first, first + len(names))):
        raise DataError(
            f"{where}: the tokenizer's ids have gaps: its {first} tokens are followed by {ids}, expected "
            f"{first} to {first + len(names) - 1}; renumber its added tokens"
        )


def end_token_id(backend: Tokenizer, template: Template, where: str) -> int:
    """Id of the token that ends a decoded text; only of a template with special tokens.

    Raises:
        DataError: the template names no token of this tokenizer.
    """
    found = backend.token_to_id(template.end) if template.end else None
    if found is None:
        raise DataError(
            f"{where}: the tokenizer has no token {template.end!r} to end a text; name one of its tokens in "
            "template.end"
        )
    return found


def _frame_ids(backend: Tokenizer, template: Template) -> tuple[list[int], list[int]]:
    """Ids of prefix and suffix, as they are where prefix, text and suffix are one string.

    A SentencePiece tokenizer puts a space before whatever it is given: where the template has one between itself and
    the text, the text (or the suffix) brings its own.
    """
    prefix, suffix = template.prefix, template.suffix
    alone = backend.encode("a", add_special_tokens=False).tokens
    if alone and alone[0].startswith(_SPACE):
        prefix, suffix = prefix.removesuffix(" "), suffix.removeprefix(" ")
    return _template_ids(backend, prefix), _template_ids(backend, suffix)


def _template_ids(backend: Tokenizer, text: str) -> list[int]:
    """Ids of template text, special tokens recognised by name."""
    if not text:
        return []
    before = backend.encode_special_tokens
    backend.encode_special_tokens = False
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = before


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 (hex) of a folder's tokenizer.json: the same for everything that yields the same ids."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def shards_tokenizer(shards: Path, sha256: str) -> Tokenizer:
    """The tokenizer of a folder of shards, whose fingerprint its index holds.

    Raises:
        ShardError: missing or altered.
    """
    folder = shards / "tokenizer"
    if not (folder / "tokenizer.json").is_file() or tokenizer_fingerprint(folder) != sha256:
        raise ShardError(f"{folder}: missing or not the tokenizer that the shards were made with; pack again")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


class SegmentTokenizer:
    """Texts -> segments.

    Args:
        tokenizer: a transformers tokenizer, as :func:`prepare_tokenizer` returns it or untouched.
        template: what to put around texts.
        max_tokens: longest segment, template included.
    """

    def __init__(self, tokenizer: Any, template: Template, max_tokens: int) -> None:
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        self.backend.encode_special_tokens = True
        self.template = template
        self.prefix, self.suffix = (np.asarray(ids, dtype=np.int32) for ids in _frame_ids(self.backend, template))
        self.max_text_tokens = max_tokens - len(self.prefix) - len(self.suffix)
        self.max_tokens = max_tokens
        if self.max_text_tokens < 1:
            raise DataError(
                f"text.max_tokens ({max_tokens}) leaves no room for text: the template takes "
                f"{len(self.prefix) + len(self.suffix)} tokens"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.backend.encode_special_tokens = True  # a tokenizer's pickle loses it

    @property
    def anchor_token_id(self) -> int:
        return int(self.suffix[-1])

    def encode(self, texts: Sequence[tuple[str, int]]) -> Segments:
        """Encode (text, character at which the body begins) in two calls to the Rust tokenizer."""
        # Offsets cost a quarter of the time and are needed only behind an instruction.
        plain = [i for i, (_, body) in enumerate(texts) if body == 0]
        instructed = [i for i, (_, body) in enumerate(texts) if body > 0]
        ids: list[list[int]] = [[]] * len(texts)
        bodies = np.zeros(len(texts), dtype=np.int32)
        fast = self.backend.encode_batch_fast([texts[i][0] for i in plain], add_special_tokens=False)
        for i, encoding in zip(plain, fast, strict=True):
            ids[i] = encoding.ids
        slow = self.backend.encode_batch([texts[i][0] for i in instructed], add_special_tokens=False)
        for i, encoding in zip(instructed, slow, strict=True):
            ids[i] = encoding.ids
            bodies[i] = _first_body_token(encoding, texts[i][1])
        return self._flat(ids, bodies)

    def _flat(self, ids: list[list[int]], bodies: np.ndarray) -> Segments:
        found = np.fromiter(map(len, ids), np.int32, len(ids))
        kept = np.minimum(found, self.max_text_tokens)
        problems = {}
        for i in np.flatnonzero(bodies >= kept).tolist():
            problems[i] = (
                "the text has no tokens"
                if bodies[i] >= found[i]
                else f"the instruction alone takes {bodies[i]} tokens; raise text.max_tokens ({self.max_tokens})"
            )
        before, after = len(self.prefix), len(self.suffix)
        lengths = kept + np.int32(before + after)
        ends = np.cumsum(lengths, dtype=np.int64)
        input_ids = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int32)
        of_text = np.ones(len(input_ids), dtype=bool)
        for part, first in ((self.prefix, ends - lengths), (self.suffix, ends - after)):
            where = first[:, None] + np.arange(len(part))
            input_ids[where] = part
            of_text[where] = False
        cut = (one if len(one) <= self.max_text_tokens else one[: self.max_text_tokens] for one in ids)
        input_ids[of_text] = np.fromiter(chain.from_iterable(cut), np.int32, int(kept.sum()))
        return Segments(input_ids, lengths, bodies + np.int32(before), kept + np.int32(before), kept < found, problems)


def _first_body_token(encoding: Encoding, body_char: int) -> int:
    """Index of the first token that reaches past ``body_char``; the number of tokens if none does."""
    token = encoding.char_to_token(body_char)
    if token is not None:
        return token
    ends: Iterable[tuple[int, int]] = encoding.offsets
    return next((i for i, (_, end) in enumerate(ends) if end > body_char), len(encoding.ids))
