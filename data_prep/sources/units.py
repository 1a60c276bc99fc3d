"""Sources cut into units: the rows that a process works on at a time, and that an interruption can lose.

A unit ends after :data:`UNIT_ROWS` rows or with the row that reaches :data:`UNIT_BYTES`. So unit boundaries depend on
the input alone, not on the number of processes, parts or interruptions.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from anchor.data.row_files import Meter, Row
from anchor.errors import DataError
from data_prep.sources.streams import Source

UNIT_ROWS = 2048
UNIT_BYTES = 8 << 20


class Unit(NamedTuple):
    """Consecutive rows of a source.

    Attributes:
        source: name of the source.
        number: number of the unit in its source, from 0.
        first_row: number of its first row in the source, as read.
        rows: rows, not yet parsed.
        error: error that ended reading after these rows, or None.
        input_bytes: bytes of the source's files read for these rows.
    """

    source: str
    number: int
    first_row: int
    rows: list[Row]
    error: DataError | None
    input_bytes: int


def units(source: Source) -> Iterator[Unit]:
    """Yield the units of a source. A read error comes with the last unit, after the rows before it."""
    meter = Meter()
    rows = source.rows(meter)
    number = first_row = read_bytes = 0
    while True:
        found: list[Row] = []
        size, error = 0, None
        try:
            for row in rows:
                found.append(row)  # one by one, to keep the rows before an error
                size += _size(row.value)
                if len(found) == UNIT_ROWS or size >= UNIT_BYTES:
                    break
            else:
                rows = iter(())
        except DataError as caught:
            error = caught
        if found or error is not None:
            before, read_bytes = read_bytes, meter.read_bytes
            yield Unit(source.name, number, first_row, found, error, read_bytes - before)
        if error is not None or not found:
            return
        number += 1
        first_row += len(found)


def _size(value: Any) -> int:
    """Return the approximate size of a row in bytes."""
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8
