"""One source -> its spool: read, check, tokenise; what is left out is counted by reason.

1. Rows that cannot be used obey the recipe's ``on_bad_row``: the first one stops the run, or each goes into the
   source's quarantine file with its place and reason.
2. Pairs whose query is their positive, and all but the first of equal pairs, are dropped and counted.
3. More skipped rows than ``max_skipped_fraction`` are an error: a source that is half unusable is a mistake.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TextIO

from anchor.config.schema import PackRecipe
from anchor.errors import DataError
from data_prep.checking import CHUNK_ROWS, Check, Chunk, Outcome, Worker
from data_prep.progress import tracked
from data_prep.readers import Row
from data_prep.sources import Source
from data_prep.spool import Spool, SpoolWriter

log = logging.getLogger(__name__)

QUERY_IS_POSITIVE = "query equals positive"


@dataclass(slots=True)
class _Reading:
    """A source while it is read.

    Attributes:
        recipe: what is asked.
        quarantine: where rows that cannot be used go.
        rows_read: rows so far, one per pair.
        skipped: rows that cannot be used, by reason.
        query_is_positive: pairs dropped for it.
        unused_positives: further positives that the recipe leaves out.
    """

    recipe: PackRecipe
    quarantine: TextIO
    rows_read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    query_is_positive: int = 0
    unused_positives: int = 0

    def refuse(self, row: Row, problem: str) -> None:
        """Stop at a row that cannot be used, or put it aside.

        Raises:
            DataError: under ``on_bad_row: fail``.
        """
        if self.recipe.on_bad_row == "fail":
            raise DataError(f"{row.place}: {problem}")
        # The place within the text is not part of the kind.
        self.skipped[re.sub(r" at character \d+$", "", re.split("[;:]", problem, maxsplit=1)[0])] += 1
        where = {"file": row.place.file, row.place.unit: row.place.number}
        line = json.dumps({**where, "reason": problem, "content": row.value}, ensure_ascii=False, default=str)
        self.quarantine.write(line + "\n")

    def summary(self) -> dict[str, object]:
        dropped = dict(self.skipped)
        if self.query_is_positive:
            dropped[QUERY_IS_POSITIVE] = self.query_is_positive
        return {"rows_read": self.rows_read, "dropped": dropped, "unused_positives": self.unused_positives}


def spool_source(source: Source, recipe: PackRecipe, worker: Worker, work: Path) -> Spool:
    """The spool of a source; one that is finished already is not made again.

    Raises:
        DataError: a file that cannot be read; a row that cannot be used under ``on_bad_row: fail``; too many of them
            under ``skip``.
    """
    folder = work / source.name
    if not (folder / "done.json").is_file():
        aside = work.parent / f"quarantine-{source.name}.jsonl"
        # Half a surrogate pair has no bytes; its JSON escape has.
        with (
            closing(SpoolWriter(folder)) as writer,
            aside.open("w", encoding="utf-8", errors="backslashreplace") as quarantine,
        ):
            reading = _Reading(recipe, quarantine)
            check = Check(
                source.name, source.columns, source.instructions, source.symmetric, recipe.text.hard_negatives
            )
            for chunk, outcomes in worker(check, _chunks(source)):
                _take(chunk, outcomes, reading, writer)
        if not reading.skipped:
            aside.unlink()
        _check_share(source.name, reading, aside)
        writer.finish(reading.summary())
    spool = Spool(folder)
    dropped = ", ".join(f"{reason}: {count}" for reason, count in spool.summary["dropped"].items())
    log.info("%s: %d rows read, %d pairs kept%s", source.name, spool.summary["rows_read"], spool.num_pairs,
             f", dropped {dropped}" if dropped else "")  # fmt: skip
    return spool


def _check_share(name: str, reading: _Reading, aside: Path) -> None:
    skipped, allowed = reading.skipped.total(), reading.recipe.max_skipped_fraction
    if skipped > allowed * reading.rows_read:
        raise DataError(
            f"{aside}: {skipped} of {reading.rows_read} rows of source '{name}' cannot be used, more than "
            f"max_skipped_fraction ({allowed:g}); mend the source or raise max_skipped_fraction"
        )


def _chunks(source: Source) -> Iterator[Chunk]:
    """The rows of a source; an error in reading them comes as part of the last chunk, after the rows before it."""
    rows = iter(tracked(source.rows(), f"reading {source.name}", None))
    first = 0
    while True:
        chunk: list[Row] = []
        error = None
        try:
            for row in islice(rows, CHUNK_ROWS):
                chunk.append(row)  # one by one, so that those before an error stay
        except DataError as caught:
            error = caught
        if chunk or error:
            yield Chunk(first, chunk, error)
        if error or len(chunk) < CHUNK_ROWS:
            return
        first += len(chunk)


def _take(chunk: Chunk, outcomes: list[Outcome], reading: _Reading, writer: SpoolWriter) -> None:
    for number, (row, outcome) in enumerate(zip(chunk.rows, outcomes, strict=True), start=chunk.first):
        reading.rows_read += 1
        reading.unused_positives += row.unused_positives
        if outcome is None:
            reading.query_is_positive += 1
        elif isinstance(outcome, str):
            reading.refuse(row, outcome)
        else:
            writer.add(number, outcome)
    if chunk.error is not None:
        raise chunk.error
