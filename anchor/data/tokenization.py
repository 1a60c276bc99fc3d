"""Texts + template -> segments: token ids and the span of the bare text among them.

1. :func:`prepare_tokenizer` puts the template, with its trained special tokens where it has any, into the tokenizer's
   own post-processor and makes special tokens inside texts ordinary text, so that a web page cannot forge an anchor
   token or a turn.
2. :class:`SegmentTokenizer` encodes texts in batches, cuts the text (never the template) to the limit, and
   finds the body by character offsets: the first token that reaches past the instruction begins the body.
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
"""Names that model families give to special tokens. ``[INST]`` is missing: the first Mistral models have it as text."""


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


def prepare_tokenizer(tokenizer: Any, template: Template, where: str) -> Any:
    """Put the template into a transformers tokenizer's post-processor; changes and returns it.

    After this, ``tokenizer(text)`` gives prefix + text + suffix, truncation keeps both ends, and the name of a
    special token inside a text is ordinary text. It is saved and loaded with the tokenizer. The template's trained
    special tokens are new ones, with consecutive ids behind all others.

    Raises:
        DataError: the template's anchor token, end token or a special name in it is not one token of this tokenizer,
            the tokenizer has a token of the name of a trained special token, or makes a special token of its name
            inside a text.
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
    # "\n" is an added token in Gemma, and its vocabulary makes the same id of the text: an ordinary token after all.
    ordinary = {i for i, one in framing.items() if not one.special and i in _vocabulary_ids(backend, one.content)}
    # Any other template token that is not marked special would still be recognised inside texts.
    mark = [framing[i].content for i in sorted(framing.keys() - (ordinary - {suffix_ids[-1]}))]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in mark])
    for name in mark:
        if backend.token_to_id(name) in _text_ids(backend, name):
            raise DataError(
                f"{where}: the text {name!r} becomes the special token of that name, as the tokenizer's own vocabulary "
                "has it too, so any text could forge the template; choose a template without it"
            )
    backend.post_processor = template_processor(backend, prefix_ids, suffix_ids)
    tokenizer.truncation_side = "right"  # as shards are cut; the suffix is kept all the same
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space_token"):
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = template.end or backend.id_to_token(suffix_ids[-1])
    return tokenizer


def _refuse_unknown_names(tokenizer: Any, template: Template, where: str) -> None:
    """Refuse special names of another family, unless the model's own chat template writes them as text."""
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
    """Ids that the model's vocabulary alone makes of a text, as if there were no added tokens."""
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
    if puts_space_first(backend):
        prefix, suffix = prefix.removesuffix(" "), suffix.removeprefix(" ")
    return template_ids(backend, prefix), template_ids(backend, suffix)


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
    """Index of the first token that reaches past ``body_char``; the number of tokens if none does."""
    token = encoding.char_to_token(body_char)
    if token is not None:
        return token
    ends: Iterable[tuple[int, int]] = encoding.offsets
    return next((i for i, (_, end) in enumerate(ends) if end > body_char), len(encoding.ids))


def _joined(encoding: Encoding, text: str, body_char: int, token: int) -> str | None:
    """Describe a first token of the body that holds a part of the instruction too; the space between them may go."""
    if token == len(encoding.ids):
        return None
    start, end = encoding.offsets[token]
    if start >= body_char or not text[start:body_char].strip():
        return None
    return (
        f"the end of the instruction and the beginning of the text become one token, {text[start:end]!r}; end "
        "template.instruction_format in a space before {text}"
    )
