"""Texts + template -> segments: token ids and the span of the bare text among them.

1. :func:`prepare_tokenizer` puts the template, with any trained special tokens, into the tokenizer's post-processor.
   It also makes special tokens inside texts ordinary text, so that a web page cannot forge an anchor token or a turn.
2. :class:`SegmentTokenizer` encodes texts in batches and cuts the text (never the template) to the limit. It finds the
   body by character offsets: the body begins at the first token that reaches past the instruction.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer

from anchor.data.templates import Template, puts_space_first, special_token_names, template_ids
from anchor.data.tokenizer_files import load_tokenizer, shards_tokenizer, template_processor, tokenizer_fingerprint
from anchor.errors import DataError

__all__ = [
    "SegmentTokenizer",
    "Segments",
    "end_token_id",
    "load_tokenizer",
    "prepare_tokenizer",
    "shards_tokenizer",
    "tokenizer_fingerprint",
]

_SPECIAL_NAME = re.compile(r"<[|｜][^\s<>|｜]+[|｜]>|</?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn)>")
"""Names that model families give to special tokens. ``[INST]`` is left out: it is text in the first Mistral models."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Texts with their templates, flat: prefix + instruction + body + suffix, whose last id is the anchor token.

    Attributes:
        input_ids: int32 ``T``; all segments, concatenated.
        lengths: int32 ``S``; tokens of each segment.
        body_starts: int32 ``S``; index of the body's first token in its segment.
        body_ends: int32 ``S``; index after the body's last token.
        truncated: bool ``S``; True if the text was cut to the limit.
        problems: for each unusable text, by its number, the reason.
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    body_starts: np.ndarray
    body_ends: np.ndarray
    truncated: np.ndarray
    problems: dict[int, str]


def prepare_tokenizer(tokenizer: Any, template: Template, where: str) -> Any:
    """Put the template into a transformers tokenizer's post-processor; change the tokenizer in place and return it.

    ``tokenizer(text)`` then gives prefix + text + suffix. Truncation keeps both ends, and the name of a special token
    inside a text is ordinary text. The template is saved and loaded with the tokenizer. The template's trained special
    tokens are added with consecutive ids after all others.

    Raises:
        DataError: the template's anchor token, end token or a special name in it is not a single token of this
            tokenizer. Or the tokenizer already has a trained special token's name, has gaps in its ids, or turns the
            name of a template token inside a text into that token.
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
    _refuse_unknown_names(tokenizer, template, where)
    backend.encode_special_tokens = True
    framing = {i: added[i] for i in {*prefix_ids, *suffix_ids} & {*added}}
    # "\n" is an added token in Gemma, but the vocabulary gives the text the same id, so it is an ordinary token.
    ordinary = {i for i, one in framing.items() if not one.special and i in _vocabulary_ids(backend, one.content)}
    # Mark all other template tokens special; unmarked ones would still be recognised inside texts.
    mark = [framing[i].content for i in sorted(framing.keys() - (ordinary - {suffix_ids[-1]}))]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in mark])
    for name in mark:
        if backend.token_to_id(name) in _text_ids(backend, name):
            raise DataError(
                f"{where}: the text {name!r} becomes the special token of that name, as the tokenizer's own vocabulary "
                "has it too, so any text could forge the template; choose a template without it"
            )
    backend.post_processor = template_processor(backend, prefix_ids, suffix_ids)
    tokenizer.truncation_side = "right"  # as for shards; the suffix is kept anyway
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space_token"):
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = template.end or backend.id_to_token(suffix_ids[-1])
    return tokenizer


def _refuse_unknown_names(tokenizer: Any, template: Template, where: str) -> None:
    """Refuse special names of another model family, unless the model's own chat template contains them as text."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    for name in _SPECIAL_NAME.findall(template.prefix + template.suffix):
        ids = template_ids(backend, name)
        if backend.token_to_id(name) not in ids and name not in str(tokenizer.chat_template):
            raise DataError(
                f"{where}: the template names {name!r}, which is not a token of this tokenizer and would become "
                f"{[backend.id_to_token(i) for i in ids]}; choose the template of this model's family"
            )


def _text_ids(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _vocabulary_ids(backend: Tokenizer, text: str) -> list[int]:
    """Return the ids that the model's vocabulary alone gives a text, ignoring added tokens."""
    normalizer, pre_tokenizer, model = backend.normalizer, backend.pre_tokenizer, backend.model
    text = text if normalizer is None else normalizer.normalize_str(text)
    pieces = [(text, (0, 0))] if pre_tokenizer is None else pre_tokenizer.pre_tokenize_str(text)
    return [token.id for piece, _ in pieces for token in model.tokenize(piece)]


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
    """Return the id of the token that ends a decoded text; only for a template with special tokens.

    Raises:
        DataError: the template has no end token, or it is not a token of this tokenizer.
    """
    found = backend.token_to_id(template.end) if template.end else None
    if found is None:
        raise DataError(
            f"{where}: the tokenizer has no token {template.end!r} to end a text; name one of its tokens in "
            "template.end"
        )
    return found


def _frame_ids(backend: Tokenizer, template: Template) -> tuple[list[int], list[int]]:
    """Return the ids of prefix and suffix as if prefix, text and suffix were tokenized as one string.

    A SentencePiece tokenizer puts a space before every input. If the template has a space next to the text, drop it:
    the text (or the suffix) already gets one.
    """
    prefix, suffix = template.prefix, template.suffix
    if puts_space_first(backend):
        prefix, suffix = prefix.removesuffix(" "), suffix.removeprefix(" ")
    return template_ids(backend, prefix), template_ids(backend, suffix)


class SegmentTokenizer:
    """Tokenizer of texts into segments.

    Args:
        tokenizer: a transformers tokenizer, prepared by :func:`prepare_tokenizer` or unchanged.
        template: template around every text.
        max_tokens: longest segment, template included.

    Raises:
        DataError: ``max_tokens`` leaves no room for text.
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
        self.backend.encode_special_tokens = True  # pickling a tokenizer loses this setting

    @property
    def anchor_token_id(self) -> int:
        return int(self.suffix[-1])

    def encode(self, texts: Sequence[tuple[str, int]]) -> Segments:
        """Encode pairs of a text and the character index of its body, in two calls to the Rust tokenizer."""
        # Offsets cost a quarter of the time and are needed only after an instruction.
        plain = [i for i, (_, body) in enumerate(texts) if body == 0]
        instructed = [i for i, (_, body) in enumerate(texts) if body > 0]
        ids: list[list[int]] = [[]] * len(texts)
        bodies = np.zeros(len(texts), dtype=np.int32)
        joined: dict[int, str] = {}
        fast = self.backend.encode_batch_fast([texts[i][0] for i in plain], add_special_tokens=False)
        for i, encoding in zip(plain, fast, strict=True):
            ids[i] = encoding.ids
        slow = self.backend.encode_batch([texts[i][0] for i in instructed], add_special_tokens=False)
        for i, encoding in zip(instructed, slow, strict=True):
            ids[i] = encoding.ids
            bodies[i] = _first_body_token(encoding, texts[i][1])
            if problem := _joined(encoding, *texts[i], int(bodies[i])):
                joined[i] = problem
        return self._flat(ids, bodies, joined)

    def _flat(self, ids: list[list[int]], bodies: np.ndarray, joined: dict[int, str]) -> Segments:
        found = np.fromiter(map(len, ids), np.int32, len(ids))
        kept = np.minimum(found, self.max_text_tokens)
        problems = joined
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
    """Return the index of the first token that reaches past ``body_char``, or the number of tokens if none does."""
    token = encoding.char_to_token(body_char)
    if token is not None:
        return token
    ends: Iterable[tuple[int, int]] = encoding.offsets
    return next((i for i, (_, end) in enumerate(ends) if end > body_char), len(encoding.ids))


def _joined(encoding: Encoding, text: str, body_char: int, token: int) -> str | None:
    """Describe a first body token that also holds part of the instruction; a shared space is allowed."""
    if token == len(encoding.ids):
        return None
    start, end = encoding.offsets[token]
    if start >= body_char or not text[start:body_char].strip():
        return None
    return (
        f"the end of the instruction and the beginning of the text become one token, {text[start:end]!r}; end "
        "template.instruction_format in a space before {text}"
    )
