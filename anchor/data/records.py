"""Pairs from a source, and the checks that every pair passes once, at the boundary."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anchor.config.pack_recipe import Columns
from anchor.errors import DataError, did_you_mean

QUERY, POSITIVE, FIRST_NEGATIVE = 0, 1, 2
"""Roles of segments: 0 query, 1 positive, 2... hard negatives."""

MAX_TEXT_CHARACTERS = 1 << 22
"""Longest text. Tokenising a longer one takes minutes, and the model then sees only its first page."""
_SKIP = "; remove the row or use on_bad_row: skip"
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}
"""Unicode categories of control characters, formatting characters and spaces."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, its document and its hard negatives.

    Attributes:
        query: bare text, without instruction.
        positive: document of the query.
        hard_negatives: mined negatives, as many as the recipe asks for.
        instruction: instruction of the query side, or None.
        source: name of the source.
        row: row number in the source, from 0.
        symmetric: True if the documents carry the instruction too.
    """

    query: str
    positive: str
    hard_negatives: tuple[str, ...]
    instruction: str | None
    source: str
    row: int
    symmetric: bool

    def texts(self) -> tuple[str, ...]:
        """Return the texts in order of role: query, positive, hard negatives."""
        return (self.query, self.positive, *self.hard_negatives)


def pair_from_row(
    row: Any,
    *,
    where: str,
    number: int,
    source: str,
    columns: Columns,
    instructions: Sequence[str],
    symmetric: bool,
    hard_negatives: int,
) -> Pair:
    """Check one row and build a :class:`Pair` from it.

    Args:
        row: the parsed row.
        where: ``file:line``, the beginning of every message.
        number: row number in the source, from 0; selects the instruction.
        source: name of the source.
        columns: names of the fields.
        instructions: none, one, or several that alternate by row.
        symmetric: True if documents carry the instruction too.
        hard_negatives: number of negatives to keep.

    Raises:
        DataError: the row is not an object, lacks a field, has an unusable text (see :func:`text_field`), or has too
            few negatives.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    query = text_field(row, columns.query, where, _SKIP)
    positive = text_field(row, columns.positive, where, _SKIP)
    negatives: list[str] = []
    if hard_negatives:
        for column in columns.negatives:
            value = _field(row, column, where)
            texts = value if isinstance(value, list | tuple) else [value]
            # A table has a column for each negative of its longest row; shorter rows have nulls.
            negatives += [_checked(text, column, where, _SKIP) for text in texts if text is not None]
        if len(negatives) < hard_negatives:
            raise DataError(
                f"{where}: {len(negatives)} hard negatives, the recipe keeps {hard_negatives}; "
                "lower text.hard_negatives or mine more"
            )
    instruction = instructions[number % len(instructions)] if instructions else None
    return Pair(query, positive, tuple(negatives[:hard_negatives]), instruction, source, number, symmetric)


def _field(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise DataError(f"{where}: no field '{column}'{did_you_mean(column, row)}")
    return row[column]


def text_field(row: Mapping[str, Any], column: str, where: str, mend: str = "") -> str:
    """Return the text of a field, if it is usable.

    Args:
        row: the parsed row.
        column: name of the field.
        where: ``file:line``, the beginning of every message.
        mend: advice at the end of a message about an empty text.

    Raises:
        DataError: the field is missing or not a text. Or the text is empty or too long, holds only control characters,
            or has a NUL character or half a surrogate pair.
    """
    return _checked(_field(row, column, where), column, where, mend)


def is_usable(text: str) -> bool:
    """Return True if this text can be a side of a pair."""
    try:
        _checked(text, "", "", "")
    except DataError:
        return False
    return True


def _checked(value: Any, column: str, where: str, mend: str) -> str:
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: field '{column}' is {type(value).__name__}, expected text")
    if value is None or not value.strip():
        raise DataError(f"{where}: field '{column}' is empty{mend}")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise DataError(
            f"{where}: field '{column}' has {len(value):,} characters, expected at most {MAX_TEXT_CHARACTERS:,}; cut it"
        )
    try:
        value.encode()  # JSON can encode half a surrogate pair, which is not a character
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field '{column}' has half a surrogate pair at character {error.start + 1}"
        ) from error
    if "\0" in value:
        raise DataError(f"{where}: field '{column}' has a NUL character at character {value.index(chr(0)) + 1}")
    # This stops at the first visible character, which is nearly always the first character.
    if all(unicodedata.category(character) in _INVISIBLE for character in value):
        raise DataError(f"{where}: field '{column}' holds only control characters{mend}")
    return value
