"""Questions -> prompts in batches: the plan of ``data_prep respond``, a pure function of files, tokenizer and settings.

1. Read every row's ``id`` and question. Set unusable rows aside with the reason.
2. Put the text of the model's chat template before and after the question. The name of a special token inside a
   question stays ordinary text. Set prompts above the limit aside.
3. Sort the prompts, longest first, and cut them into batches. A batch's padded prompts and its answers fit a token
   budget.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from anchor.data.records import text_field
from anchor.data.row_files import TABLE_SUFFIXES, read_rows
from anchor.data.shards import text_id
from anchor.data.templates import Template
from anchor.data.tokenization import SegmentTokenizer
from anchor.errors import ConfigError, DataError
from data_prep.sources.streams import input_files

_TEXTS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Question:
    """Question of a row.

    Attributes:
        number: position among all rows, from 0.
        id: the row's own id, else ``number``.
        text: question, stripped.
    """

    number: int
    id: Any
    text: str


@dataclass(frozen=True, slots=True)
class Reject:
    """Row that was set aside, and why."""

    number: int
    id: Any
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"row": self.number, "id": self.id, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to answer, in batches.

    Attributes:
        questions: questions with their prompts' token ids, longest prompt first.
        batches: number of questions in each batch, in order.
        rejects: rows set aside.
        fingerprint: xxh3 of all questions, ids and prompts in order, and of the batches.
    """

    questions: list[tuple[Question, list[int]]]
    batches: list[int]
    rejects: list[Reject]
    fingerprint: str


def read_questions(files: Sequence[Path], column: str) -> tuple[list[Question], list[Reject]]:
    """Read all rows of some files or folders, in order; return the questions and the rejects.

    Raises:
        ConfigError: if a path is missing.
        DataError: if a file cannot be read, or no row is usable.
    """
    questions: list[Question] = []
    rejects: list[Reject] = []
    number = 0
    for path in files:
        for file in input_files(path, TABLE_SUFFIXES, "--questions"):
            for row in read_rows(file):
                key: Any = number
                try:
                    if row.problem is not None:
                        raise DataError(f"{row.place}: {row.problem}")
                    if not isinstance(row.value, dict):
                        raise DataError(f"{row.place}: expected a JSON object, got {type(row.value).__name__}")
                    key = _id(row.value, number, str(row.place))
                    text = text_field(row.value, column, str(row.place))
                    questions.append(Question(number, key, text.strip()))
                except DataError as error:
                    rejects.append(Reject(number, key, str(error)))
                number += 1
    if not questions:
        first = f": {rejects[0].reason}" if rejects else ""
        raise DataError(f"--questions: none of {number} rows can be used{first}; name the field with --column")
    return questions, rejects


def _id(row: dict[str, Any], number: int, where: str) -> Any:
    """Return the row's own id, else its number.

    Raises:
        DataError: if JSON in UTF-8 cannot hold the id.
    """
    given = row.get("id")
    if given is None:
        return number
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field 'id' has half a surrogate pair") from error
    except TypeError as error:
        raise DataError(f"{where}: field 'id' is {type(given).__name__}, expected text or a number") from error
    return given


def plan_prompts(
    questions: Sequence[Question],
    rejects: Sequence[Reject],
    tokenizer: Any,
    frame: tuple[str, str],
    *,
    max_input_tokens: int,
    max_new_tokens: int,
    batch_tokens: int,
) -> Prompts:
    """Tokenise the questions and cut them into batches.

    Args:
        questions, rejects: results of :func:`read_questions`.
        tokenizer: transformers tokenizer of the model; modified in place.
        frame: text before and after a question, with special tokens by name.
        max_input_tokens: longest prompt.
        max_new_tokens: longest answer.
        batch_tokens: token budget of a batch: prompts padded to the longest, plus answers of full length.

    Raises:
        ConfigError: if the limit leaves no room for a question.
        DataError: if no question fits.
    """
    try:
        segmenter = SegmentTokenizer(tokenizer, Template(*frame, "{text}"), max_input_tokens)
    except DataError as error:
        raise ConfigError(
            f"--max-input-tokens {max_input_tokens}: the chat template alone takes as many; raise it"
        ) from error
    kept: list[tuple[Question, list[int]]] = []
    aside = list(rejects)
    for start in range(0, len(questions), _TEXTS_AT_ONCE):
        some = questions[start : start + _TEXTS_AT_ONCE]
        found = segmenter.encode([(question.text, 0) for question in some])
        rows = np.split(found.input_ids, np.cumsum(found.lengths)[:-1])
        for question, ids, cut in zip(some, rows, found.truncated, strict=True):
            if cut:
                reason = f"the prompt has more than {max_input_tokens} tokens"
                aside.append(Reject(question.number, question.id, reason))
            else:
                kept.append((question, ids.tolist()))
    if not kept:
        raise DataError(f"--questions: all prompts have more than {max_input_tokens} tokens; raise --max-input-tokens")
    kept.sort(key=lambda one: (-len(one[1]), one[0].number))
    batches, position = [], 0
    while position < len(kept):
        # The first prompt of a batch is its longest.
        size = max(1, batch_tokens // (len(kept[position][1]) + max_new_tokens))
        batches.append(min(size, len(kept) - position))
        position += batches[-1]
    digest = xxhash.xxh3_64(json.dumps(batches).encode())
    for question, ids in kept:
        digest.update(json.dumps([question.number, question.id, text_id(question.text), ids]).encode())
    return Prompts(kept, batches, sorted(aside, key=lambda one: one.number), digest.hexdigest())
