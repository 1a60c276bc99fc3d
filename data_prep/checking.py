"""Rows -> tokenised pairs: the part of reading that needs no order, so that worker processes can do it."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np

from anchor.config.schema import Columns
from anchor.data.records import Pair, pair_from_row
from anchor.data.shards import text_id
from anchor.data.tokenization import Segment, SegmentTokenizer
from anchor.errors import DataError
from data_prep.readers import Row

CHUNK_ROWS = 1024
_CHUNKS_PER_WORKER = 2


@dataclass(frozen=True, slots=True)
class Check:
    """What rows of a source are checked for, without what cannot be sent to another process.

    Attributes:
        source: name of the source.
        columns: names of the fields.
        instructions: none, one, or several that alternate by row.
        symmetric: whether documents carry the instruction too.
        hard_negatives: how many are kept.
    """

    source: str
    columns: Columns
    instructions: tuple[str, ...]
    symmetric: bool
    hard_negatives: int


class Tokenised(NamedTuple):
    """A pair.

    Attributes:
        tokens: int32, all its segments.
        segments: per segment length, body start, body end, truncated; flat.
        text_ids: per segment.
    """

    tokens: np.ndarray
    segments: list[int]
    text_ids: list[int]


class Chunk(NamedTuple):
    """Rows that stand together in a source.

    Attributes:
        first: number of the first one.
        rows: the rows.
        error: why there are no rows after these, if the source cannot be read further.
    """

    first: int
    rows: list[Row]
    error: DataError | None


Outcome = Tokenised | str | None
"""The pair; or why its row cannot be used; or None when the query is the positive."""

Worker = Callable[[Check, Iterable[Chunk]], Iterator[tuple[Chunk, list[Outcome]]]]


def check_rows(check: Check, chunk: Chunk, segmenter: SegmentTokenizer) -> list[Outcome]:
    """What becomes of each row; a pure function."""
    out: list[Outcome] = [None] * len(chunk.rows)
    pairs: list[tuple[int, Pair]] = []
    for i, row in enumerate(chunk.rows):
        if row.problem is not None:
            out[i] = row.problem
            continue
        where = str(row.place)
        try:
            pair = pair_from_row(
                row.value,
                where=where,
                number=chunk.first + i,
                source=check.source,
                columns=check.columns,
                instructions=check.instructions,
                symmetric=check.symmetric,
                hard_negatives=check.hard_negatives,
            )
        except DataError as error:
            out[i] = str(error).removeprefix(f"{where}: ")
            continue
        if pair.query != pair.positive:
            pairs.append((i, pair))
    for (i, pair), segments in zip(pairs, segmenter.pairs([pair for _, pair in pairs]), strict=True):
        out[i] = str(segments) if isinstance(segments, DataError) else _tokenised(pair, segments)
    return out


def _tokenised(pair: Pair, segments: list[Segment]) -> Tokenised:
    tokens = np.concatenate([segment.input_ids for segment in segments])
    spans = [(len(s.input_ids), s.body_start, s.body_end, int(s.truncated)) for s in segments]
    return Tokenised(tokens, [value for span in spans for value in span], [text_id(text) for text in pair.texts()])


@contextmanager
def open_workers(number: int, segmenter: SegmentTokenizer) -> Iterator[Worker]:
    """What checks chunks in order: this process when ``number`` is 1, else so many others, a few chunks ahead."""
    if number == 1:
        yield lambda check, chunks: ((chunk, check_rows(check, chunk, segmenter)) for chunk in chunks)
        return
    # A fresh interpreter each: a fork would copy threads of the tokenizer in whatever state they are.
    pool = ProcessPoolExecutor(number, get_context("spawn"), _start_worker, (segmenter,))

    def work(check: Check, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[Outcome]]]:
        pending: list[tuple[Chunk, Future[list[Outcome]]]] = []
        for chunk in chunks:
            pending.append((chunk, pool.submit(_in_worker, check, chunk)))
            if len(pending) > number * _CHUNKS_PER_WORKER:
                first, future = pending.pop(0)
                yield first, future.result()
        for chunk, future in pending:
            yield chunk, future.result()

    try:
        yield work
    except BrokenProcessPool as error:
        raise DataError(
            f"--workers {number}: a process was killed, perhaps for want of memory; lower --workers and run again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_segmenter: list[SegmentTokenizer] = []
"""The tokenizer of a worker process."""


def _start_worker(segmenter: SegmentTokenizer) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _segmenter.append(segmenter)


def _in_worker(check: Check, chunk: Chunk) -> list[Outcome]:
    return check_rows(check, chunk, _segmenter[0])
