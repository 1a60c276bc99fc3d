"""One part of the input -> its folder of tokenised pairs (:mod:`data_prep.packing.spool`).

Units are numbered across all sources. Part i of n takes the units whose number modulo n is i, checks and tokenises them
in worker processes, and appends them in order. It skips other parts' units, and units in an interrupted run's journal,
without parsing them.
"""

import logging
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from anchor.config.pack_recipe import PackRecipe
from anchor.data.tokenization import SegmentTokenizer
from anchor.errors import DataError
from anchor.progress import tracked
from data_prep.packing.spool import DONE, PartWriter
from data_prep.packing.tokenise import Check, Checked, check_unit, record_type
from data_prep.packing.workers import open_workers
from data_prep.sources.streams import Source
from data_prep.sources.units import Unit, units

log = logging.getLogger(__name__)

_MEBIBYTE = 1 << 20


class Counting:
    """Iterable of this part's units that still need work, which counts the units of all parts.

    Args:
        sources: all sources.
        part, parts: number of this part, from 0, and number of parts.
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
                # A read error stops every part, whichever part the unit belongs to.
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
    """Read, check and tokenise a part; skip finished work.

    Raises:
        DataError: if a file cannot be read, a row is unusable under ``on_bad_row: fail``, or the input changed since an
            interrupted run.
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
    """Check and tokenise one unit, in a worker."""
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
    """Yield the checked units, with progress in bytes of input, skipped units included."""
    total = sum(source.size_bytes for source in sources)
    passed = 0

    def amount(unit: Checked) -> float:
        nonlocal passed
        before, passed = passed, counting.passed_bytes
        return (unit.input_bytes + passed - before) / _MEBIBYTE

    return tracked(done, "reading", total / _MEBIBYTE if total else None, unit=" MiB", amount=amount)
