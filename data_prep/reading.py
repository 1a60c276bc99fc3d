"""One part of the input -> its folder of tokenised pairs (:mod:`data_prep.spool`).

Units are counted through all sources; part i of n takes those whose number leaves i when divided by n, checks and
tokenises them in worker processes and appends them in order. Units of other parts and of an interrupted run's journal
are passed over without being parsed.
"""

import logging
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from anchor.config.schema import PackRecipe
from anchor.data.tokenization import SegmentTokenizer
from anchor.errors import DataError
from anchor.progress import tracked
from data_prep.checking import Check, Checked, check_unit, record_type
from data_prep.sources import Source
from data_prep.spool import DONE, PartWriter
from data_prep.units import Unit, units
from data_prep.workers import open_workers

log = logging.getLogger(__name__)

_MEBIBYTE = 1 << 20


class Counting:
    """The units of all sources, those of this part to be worked on, with a count of all.

    Args:
        sources: all of them.
        part, parts: this part, from 0, and how many there are.
        finished: (source, number) of units that need no work.
    """

    def __init__(self, sources: list[Source], part: int, parts: int, finished: set[tuple[str, int]]) -> None:
        self.num_units = dict.fromkeys((source.name for source in sources), 0)
        self.passed_bytes = 0
        self._sources, self._part, self._parts, self._finished = sources, part, parts, finished

    def __iter__(self) -> Iterator[Unit]:
        number = 0
        for source in self._sources:
            for unit in units(source):
                mine = number % self._parts == self._part and (unit.source, unit.number) not in self._finished
                # Wherever reading stops is an error of every part.
                if mine or unit.error is not None:
                    yield unit
                else:
                    self.passed_bytes += unit.input_bytes
                number += 1
                self.num_units[source.name] += 1


def read_part(
    folder: Path,
    sources: list[Source],
    recipe: PackRecipe,
    segmenter: SegmentTokenizer,
    *,
    part: int,
    parts: int,
    workers: int,
) -> None:
    """Read, check and tokenise a part; what is there already is not done again.

    Raises:
        DataError: a file that cannot be read; a row that cannot be used under ``on_bad_row: fail``.
    """
    if (folder / DONE).is_file():
        return
    checks = {source.name: _check_of(source, recipe) for source in sources}
    with closing(PartWriter(folder, record_type(recipe.text.hard_negatives).itemsize)) as writer:
        if writer.finished:
            log.info("%s: continuing an interrupted run, %d units are there", folder, len(writer.finished))
        counting = Counting(sources, part, parts, writer.finished)
        with open_workers(workers, partial(work, segmenter, checks)) as workers_of:
            for unit in _tracked(workers_of(counting), counting, sources):
                writer.add(unit)
        unknown = [key for key in writer.finished if key[1] >= counting.num_units.get(key[0], 0)]
        if unknown:
            raise DataError(
                f"{folder}: holds unit {unknown[0][1]} of source '{unknown[0][0]}', which the input does not; the "
                f"input changed, delete {folder} and run again"
            )
        writer.finish(counting.num_units)


def work(segmenter: SegmentTokenizer, checks: dict[str, Check], unit: Unit) -> Checked:
    """What a worker does."""
    return check_unit(segmenter, checks[unit.source], unit)


def _check_of(source: Source, recipe: PackRecipe) -> Check:
    return Check(
        source=source.name,
        layout=source.layout,
        positives=source.positives,
        instructions=source.instructions,
        symmetric=source.symmetric,
        hard_negatives=recipe.text.hard_negatives,
        fail=recipe.on_bad_row == "fail",
    )


def _tracked(done: Iterator[Checked], counting: Counting, sources: list[Source]) -> Iterator[Checked]:
    """The units, with the input's bytes that they and all that was passed over before them took."""
    total = sum(source.size_bytes for source in sources)
    passed = 0

    def amount(unit: Checked) -> float:
        nonlocal passed
        before, passed = passed, counting.passed_bytes
        return (unit.input_bytes + passed - before) / _MEBIBYTE

    return tracked(done, "reading", total / _MEBIBYTE if total else None, unit=" MiB", amount=amount)
