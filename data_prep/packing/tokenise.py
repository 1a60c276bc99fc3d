"""Rows -> tokenised pairs: the part of packing that does not depend on order, so worker processes can run it.

1. Parse each row of a unit, expand it to one row per pair, and check it (:func:`anchor.data.records.pair_from_row`).
2. Encode each distinct text of the unit once: documents repeat, and tokenising takes most of the time.
3. Lay out the pairs as records and tokens. The recipe's ``on_bad_row`` decides about unusable rows: either the first
   one stops the run, or each becomes a line of quarantine. Pairs whose query equals the positive are counted and
   dropped.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from anchor.data.records import FIRST_NEGATIVE, Pair, pair_from_row
from anchor.data.row_files import Row, parsed
from anchor.data.shards import text_id
from anchor.data.tokenization import Segments, SegmentTokenizer
from anchor.errors import DataError
from data_prep.sources.layouts import Layout, expanded
from data_prep.sources.units import Unit

QUERY_IS_POSITIVE = "query equals positive"


@dataclass(frozen=True, slots=True)
class Check:
    """Settings for checking the rows of a source.

    Attributes:
        source: name of the source.
        layout: layout of the rows.
        positives: which positives of a row to use, ``first`` or ``each``.
        instructions: none, one, or several that alternate by row.
        symmetric: True if documents carry the instruction too.
        hard_negatives: number of hard negatives to keep.
        fail: True if the first unusable row stops the run.
    """

    source: str
    layout: Layout
    positives: str
    instructions: tuple[str, ...]
    symmetric: bool
    hard_negatives: int
    fail: bool


class Checked(NamedTuple):
    """Result of checking a unit.

    Attributes:
        source, number, input_bytes: as in the unit.
        pairs: records of :func:`record_type`; rows and starts count from the unit's own first.
        tokens: int32, all segments of all pairs.
        quarantine: JSON lines of the unusable rows.
        rows: rows read, one per pair.
        dropped: rows left out, by reason.
        unused_positives: further positives that the recipe leaves out.
    """

    source: str
    number: int
    input_bytes: int
    pairs: np.ndarray
    tokens: np.ndarray
    quarantine: bytes
    rows: int
    dropped: dict[str, int]
    unused_positives: int


def record_type(hard_negatives: int) -> np.dtype:
    """Return the dtype of a pair on disk.

    It holds the pair's row, the start of its tokens, and for each segment its tokens, body, truncation and text id.
    """
    segments = FIRST_NEGATIVE + hard_negatives
    spans = ("lengths", "body_starts", "body_ends", "truncated")
    return np.dtype(
        [
            ("row", "<i8"),
            ("start", "<i8"),
            *((name, "<i4", (segments,)) for name in spans),
            ("text_ids", "<i8", (segments,)),
        ]
    )


def check_unit(segmenter: SegmentTokenizer, check: Check, unit: Unit) -> Checked:
    """Check and tokenise the rows of a unit; a pure function.

    Raises:
        DataError: if the source cannot be read further, or at the first unusable row if ``check.fail``.
    """
    rows: list[Row] = []
    pairs: list[tuple[int, Pair]] = []
    refused: dict[int, str] = {}
    equal = 0
    for i, read in enumerate(unit.rows):
        for row in expanded(parsed(read), check.layout, check.positives):
            number = len(rows)
            rows.append(row)
            pair = _pair(row, unit.first_row + i, check)
            if isinstance(pair, str):
                refused[number] = pair
            elif pair.query == pair.positive:
                equal += 1
            else:
                pairs.append((number, pair))
    segments, which, keys = _encode([pair for _, pair in pairs], segmenter)
    if segments.problems:
        bad = np.isin(which, list(segments.problems))
        usable = np.flatnonzero(~bad.any(axis=1))
        for p in np.flatnonzero(bad.any(axis=1)).tolist():
            refused[pairs[p][0]] = segments.problems[int(which[p][bad[p]][0])]
        which, pairs = which[usable], [pairs[p] for p in usable.tolist()]
    quarantine, dropped = _refuse(rows, refused, fail=check.fail)
    if unit.error is not None:
        raise unit.error
    if equal:
        dropped[QUERY_IS_POSITIVE] += equal
    records, tokens = _lay_out(np.asarray([number for number, _ in pairs]), segments, which, keys, check.hard_negatives)
    return Checked(
        source=unit.source,
        number=unit.number,
        input_bytes=unit.input_bytes,
        pairs=records,
        tokens=tokens,
        quarantine=quarantine,
        rows=len(rows),
        dropped=dict(dropped),
        unused_positives=sum(row.unused_positives for row in rows),
    )


def _pair(row: Row, number: int, check: Check) -> Pair | str:
    """Return the pair, or the reason why there is none."""
    if row.problem is not None:
        return row.problem
    where = str(row.place)
    try:
        return pair_from_row(
            row.value,
            where=where,
            number=number,
            source=check.source,
            columns=check.layout.columns,
            instructions=check.instructions,
            symmetric=check.symmetric,
            hard_negatives=check.hard_negatives,
        )
    except DataError as error:
        return str(error).removeprefix(f"{where}: ")


def _encode(pairs: list[Pair], segmenter: SegmentTokenizer) -> tuple[Segments, np.ndarray, np.ndarray]:
    """Encode the distinct texts of some pairs.

    Returns:
        The encoded texts, the index of each pair's segments among them (``pairs x segments``), and their text ids.
    """
    numbers: dict[tuple[str, int], int] = {}
    keys: list[int] = []
    which: list[int] = []
    for pair in pairs:
        for role, text in enumerate(pair.texts()):
            instruction = pair.instruction if role == 0 or pair.symmetric else None
            whole = segmenter.template.instructed(text, instruction)
            number = numbers.setdefault(whole, len(keys))
            if number == len(keys):
                keys.append(text_id(text))
            which.append(number)
    shape = (len(pairs), len(which) // len(pairs)) if pairs else (0, 1)
    return segmenter.encode(list(numbers)), np.asarray(which, dtype=np.int64).reshape(shape), np.asarray(keys, np.int64)


def _refuse(rows: list[Row], refused: dict[int, str], *, fail: bool) -> tuple[bytes, Counter[str]]:
    lines: list[str] = []
    reasons: Counter[str] = Counter()
    for number in sorted(refused):
        row, problem = rows[number], refused[number]
        if fail:
            raise DataError(f"{row.place}: {problem}")
        # Drop the position within the text, to count equal reasons together.
        reasons[re.sub(r" at character \d+$", "", re.split("[;:]", problem, maxsplit=1)[0])] += 1
        where = {"file": row.place.file, row.place.unit: row.place.number}
        content = {**where, "reason": problem, "content": row.value}
        lines.append(json.dumps(content, ensure_ascii=False, default=str) + "\n")
    # UTF-8 cannot encode a lone surrogate, so write its JSON escape.
    return "".join(lines).encode(errors="backslashreplace"), reasons


def _lay_out(
    numbers: np.ndarray, segments: Segments, which: np.ndarray, keys: np.ndarray, hard_negatives: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the records and tokens of pairs; ``which`` holds their segments' indices in the encoded texts."""
    records = np.zeros(len(which), record_type(hard_negatives))
    if not len(which):
        return records, np.empty(0, np.int32)
    for name in ("lengths", "body_starts", "body_ends", "truncated"):
        records[name] = getattr(segments, name)[which]
    records["text_ids"] = keys[which]
    records["row"] = numbers
    lengths = segments.lengths[which.ravel()].astype(np.int64)
    ends = np.cumsum(lengths)
    records["start"] = (ends - lengths).reshape(which.shape)[:, 0]
    starts = np.cumsum(segments.lengths, dtype=np.int64) - segments.lengths
    taken = np.repeat(starts[which.ravel()] - (ends - lengths), lengths) + np.arange(int(ends[-1]))
    return records, segments.input_ids[taken]
