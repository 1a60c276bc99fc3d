"""Tokenised pairs on disk, between reading and packing: one folder per part of the input, appended to unit by unit.

``part-III-of-NNN/`` holds ``part.json`` (recipe, tokenizer, inputs), ``pairs.bin`` (records of
:func:`data_prep.packing.tokenise.record_type`), ``tokens.bin`` (int32), ``quarantine.jsonl`` and the journal
``units.jsonl``. ``done.json`` (number of units in each source) is written last.

A unit counts if its line is in the journal and its checksum is right. The line is written after the unit's data. Any
data that an interruption left after the last such unit is truncated.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from anchor.errors import DataError
from anchor.json_files import load_json
from data_prep.packing.tokenise import Checked

PAIRS, TOKENS, QUARANTINE, JOURNAL = "pairs.bin", "tokens.bin", "quarantine.jsonl", "units.jsonl"
PART, DONE = "part.json", "done.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """Line of the journal.

    Attributes:
        source, number: source and number of the unit.
        pairs, tokens, quarantine_bytes: amounts that the unit added to the files.
        rows: rows read, one per pair.
        dropped: rows left out, by reason.
        unused_positives: further positives that the recipe leaves out.
        xxh3: checksum of what the unit added to the three files.
    """

    source: str
    number: int
    pairs: int
    tokens: int
    quarantine_bytes: int
    rows: int
    dropped: dict[str, int]
    unused_positives: int
    xxh3: str

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def part_name(part: int, parts: int) -> str:
    return f"part-{part:05d}-of-{parts:05d}"


def write_json(file: Path, value: Any) -> None:
    """Write JSON atomically: to a temporary file, then rename it."""
    beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    os.replace(beside, file)


def read_json(file: Path) -> Any:
    """Read a file that :func:`write_json` wrote.

    Raises:
        DataError: if the file is unreadable; after a power loss it may be empty.
    """
    try:
        return load_json(file)
    except ValueError as error:
        raise DataError(f"{file}: not readable ({error}); delete {file.parent} and run again") from error


def read_journal(folder: Path) -> list[Entry]:
    """Return the units of a part, up to the first line damaged by a power loss or an interruption."""
    file = folder / JOURNAL
    if not file.is_file():
        return []
    found = []
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            found.append(Entry(**json.loads(line)))
        except ValueError:
            break
    return found


class PartWriter:
    """Writer that appends units to a part's folder, after the intact units already there.

    Args:
        folder: folder of the part; must exist.
        pair_bytes: bytes in a record.

    Attributes:
        finished: (source, number) of each unit in the folder.
    """

    def __init__(self, folder: Path, pair_bytes: int) -> None:
        self.folder = folder
        entries = read_journal(folder)
        entries = entries[: _whole_units(folder, entries, pair_bytes)]
        self.finished = {(entry.source, entry.number) for entry in entries}
        self._tokens = sum(entry.tokens for entry in entries)
        sizes = {
            PAIRS: sum(entry.pairs for entry in entries) * pair_bytes,
            TOKENS: self._tokens * 4,
            QUARANTINE: sum(entry.quarantine_bytes for entry in entries),
            JOURNAL: sum(len(_line(entry)) for entry in entries),
        }
        for name, size in sizes.items():
            (folder / name).touch()
            os.truncate(folder / name, size)
        self._files = {name: (folder / name).open("ab") for name in sizes}

    def add(self, unit: Checked) -> None:
        """Append a unit: its data first, then its line in the journal."""
        unit.pairs["start"] += self._tokens
        data = {PAIRS: unit.pairs.tobytes(), TOKENS: unit.tokens.tobytes(), QUARANTINE: unit.quarantine}
        for name, content in data.items():
            self._append(name, content)
        entry = Entry(
            source=unit.source,
            number=unit.number,
            pairs=len(unit.pairs),
            tokens=len(unit.tokens),
            quarantine_bytes=len(unit.quarantine),
            rows=unit.rows,
            dropped=unit.dropped,
            unused_positives=unit.unused_positives,
            xxh3=_checksum(*data.values()),
        )
        self._append(JOURNAL, _line(entry))
        self._tokens += entry.tokens
        self.finished.add((unit.source, unit.number))

    def _append(self, name: str, data: Any) -> None:
        self._files[name].write(data)
        self._files[name].flush()

    def finish(self, num_units: dict[str, int]) -> None:
        """Mark the part as complete; ``num_units`` counts the units of each source over all parts."""
        for file in self._files.values():
            os.fsync(file.fileno())
        write_json(self.folder / DONE, {"units": num_units})

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _line(entry: Entry) -> bytes:
    return json.dumps(entry.to_json()).encode() + b"\n"


def _whole_units(folder: Path, entries: list[Entry], pair_bytes: int) -> int:
    """Return the number of leading units with intact data: after a power loss the journal may list more."""
    if not entries:
        return 0
    with ExitStack() as stack:
        pairs, tokens, quarantine = (stack.enter_context((folder / n).open("rb")) for n in (PAIRS, TOKENS, QUARANTINE))
        for number, entry in enumerate(entries):
            read = (
                pairs.read(entry.pairs * pair_bytes),
                tokens.read(entry.tokens * 4),
                quarantine.read(entry.quarantine_bytes),
            )
            if _checksum(*read) != entry.xxh3:
                return number
    return len(entries)


def _checksum(*data: Any) -> str:
    digest = xxhash.xxh3_64()
    for one in data:
        digest.update(one)
    return digest.hexdigest()
