"""All parts of an unfinished folder, checked against one another and read as one spool per source.

The pairs of a source are numbered through its units, whatever part holds them. Records and tokens are read by position,
never a whole file at once, so memory does not grow with the data.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchor.data.records import FIRST_NEGATIVE
from anchor.data.shards import Pack
from anchor.errors import DataError
from anchor.recent import Recent
from data_prep.packing.spool import (
    DONE,
    JOURNAL,
    PAIRS,
    PART,
    QUARANTINE,
    TOKENS,
    Entry,
    part_name,
    read_journal,
    read_json,
)
from data_prep.packing.tokenise import record_type

_MAX_OPEN = 128
"""Maximum number of open files."""


@dataclass(frozen=True, slots=True)
class SourceUnits:
    """Locations of a source's pairs, unit by unit.

    Attributes:
        parts: part of each unit.
        first_records: index in its part's ``pairs.bin`` of each unit's first pair.
        first_pairs: number in the source of each unit's first pair; the last entry is the number of pairs.
        first_rows: the same for rows.
        quarantine: (part, first byte, bytes) of each unit with quarantined rows.
        dropped: rows left out, by reason.
        unused_positives: further positives left out.
    """

    parts: np.ndarray
    first_records: np.ndarray
    first_pairs: np.ndarray
    first_rows: np.ndarray
    quarantine: list[tuple[int, int, int]]
    dropped: dict[str, int]
    unused_positives: int

    @property
    def num_pairs(self) -> int:
        return int(self.first_pairs[-1])

    @property
    def num_rows(self) -> int:
        return int(self.first_rows[-1])


class Gathered:
    """Parts of a folder, read together.

    Args:
        folders: folders of all parts, in order.
        hard_negatives: hard negatives per pair.

    Attributes:
        sources: units of each source, by name.
    """

    def __init__(self, folders: list[Path], hard_negatives: int) -> None:
        self.folders = folders
        self._type = record_type(hard_negatives)
        self._roles = np.arange(FIRST_NEGATIVE + hard_negatives, dtype=np.int8)
        self.sources = _sources([read_journal(folder) for folder in folders], read_json(folders[0] / PART)["sources"])
        self._open = _descriptors()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}  # another process opens its own files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=_descriptors())

    def close(self) -> None:
        self._open.clear()

    def _read(self, part: int, name: str, first: int, size: int) -> bytes:
        descriptor = self._open.get((part, name), lambda: os.open(self.folders[part] / name, os.O_RDONLY))
        return os.pread(descriptor, size, first)

    def scan(self, source: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number of the first pair, records) for every unit that has pairs."""
        units, size = self.sources[source], self._type.itemsize
        counts = np.diff(units.first_pairs).tolist()
        for part, first, number, count in zip(
            units.parts.tolist(), units.first_records.tolist(), units.first_pairs.tolist(), counts, strict=False
        ):
            if count:
                yield number, np.frombuffer(self._read(part, PAIRS, first * size, count * size), self._type)

    def records(self, source: str, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the records of some pairs, with rows numbered in the source, and the part of each."""
        units, size = self.sources[source], self._type.itemsize
        unit = np.searchsorted(units.first_pairs, pairs, side="right") - 1
        parts = units.parts[unit]
        positions = units.first_records[unit] + pairs - units.first_pairs[unit]
        read = [
            self._read(part, PAIRS, position * size, size)
            for part, position in zip(parts.tolist(), positions.tolist(), strict=True)
        ]
        records = np.frombuffer(b"".join(read), self._type).copy()
        records["row"] += units.first_rows[unit]
        return records, parts

    def pack(self, records: np.ndarray, parts: np.ndarray) -> Pack:
        """Return the pack of some pairs, in the given order."""
        sizes = records["lengths"].sum(axis=1, dtype=np.int64) * 4
        spans = zip(parts.tolist(), (records["start"] * 4).tolist(), sizes.tolist(), strict=True)
        return Pack(
            input_ids=np.frombuffer(b"".join([self._read(p, TOKENS, first, size) for p, first, size in spans]), "<i4"),
            segment_lengths=records["lengths"].ravel(),
            body_starts=records["body_starts"].ravel(),
            body_ends=records["body_ends"].ravel(),
            roles=np.tile(self._roles, len(records)),
            pair_ids=np.repeat(records["row"], len(self._roles)),
            text_ids=records["text_ids"].ravel(),
        )

    def quarantine(self, source: str) -> Iterator[bytes]:
        """Yield the lines of a source's unusable rows, unit by unit."""
        for part, first, size in self.sources[source].quarantine:
            yield self._read(part, QUARANTINE, first, size)


def _descriptors() -> Recent[tuple[int, str], int]:
    return Recent(_MAX_OPEN, os.close)


def _sources(journals: list[list[Entry]], traits: list[dict[str, Any]]) -> dict[str, SourceUnits]:
    found: dict[str, list[tuple[int, int, int, int, Entry]]] = {one["name"]: [] for one in traits}
    for part, journal in enumerate(journals):
        record = byte = 0
        for entry in journal:
            found[entry.source].append((entry.number, part, record, byte, entry))
            record += entry.pairs
            byte += entry.quarantine_bytes
    return {name: _units(sorted(units, key=lambda unit: unit[0])) for name, units in found.items()}


def _units(units: list[tuple[int, int, int, int, Entry]]) -> SourceUnits:
    dropped: Counter[str] = Counter()
    for *_, entry in units:
        dropped.update(entry.dropped)
    return SourceUnits(
        parts=np.asarray([part for _, part, *_ in units], dtype=np.int64),
        first_records=np.asarray([record for _, _, record, *_ in units], dtype=np.int64),
        first_pairs=np.cumsum([0, *(unit[-1].pairs for unit in units)], dtype=np.int64),
        first_rows=np.cumsum([0, *(unit[-1].rows for unit in units)], dtype=np.int64),
        quarantine=[(p, byte, unit.quarantine_bytes) for _, p, _, byte, unit in units if unit.quarantine_bytes],
        dropped=dict(dropped),
        unused_positives=sum(unit[-1].unused_positives for unit in units),
    )


def find_parts(work: Path, command: str) -> list[Path]:
    """Return the folders of all parts, in order, after checking that they are complete and consistent.

    Args:
        work: folder of the parts.
        command: command that packs a part, for messages: ``python -m data_prep pack RECIPE``.

    Raises:
        DataError: if there is no part; parts differ in their number of parts, recipe, tokenizer or input; a part is
            missing, unfinished or duplicated; a unit is missing or duplicated; or a file is not as long as its journal
            says.
    """
    found = sorted(folder for folder in work.glob("part-*-of-*") if (folder / PART).is_file())
    if not found:
        raise DataError(f"{work}: holds no part; run `{command} --part i/n` first")
    cuts = sorted({folder.name.rpartition("-")[2] for folder in found})
    if len(cuts) > 1:
        raise DataError(
            f"{work}: holds parts of {' and of '.join(str(int(cut)) for cut in cuts)}; delete all but one set"
        )
    number = int(cuts[0])
    expected = [work / part_name(part, number) for part in range(number)]
    for part, folder in enumerate(expected):
        if not (folder / DONE).is_file():
            state = "unfinished" if folder in found else "missing"
            raise DataError(f"{folder}: {state}; run `{command} --part {part}/{number}`")
    _check_alike(expected)
    _check_units(expected)
    return expected


def _check_alike(folders: list[Path]) -> None:
    first = read_json(folders[0] / PART)
    for folder in folders[1:]:
        other = read_json(folder / PART)
        wrong = [key for key in first if other.get(key) != first[key]]
        if wrong:
            raise DataError(
                f"{folder}: {_what(wrong[0], first, other)} differ from those of {folders[0].name}; delete the wrong "
                "part and run it again"
            )


def _what(key: str, one: dict[str, Any], other: dict[str, Any]) -> str:
    if key != "recipe":
        return {"tokenizer_sha256": "its tokenizer's ids", "inputs": "its input files"}.get(key, f"its {key}")
    names = sorted(k for k in {**one["recipe"], **other["recipe"]} if one["recipe"].get(k) != other["recipe"].get(k))
    return f"its recipe's values of {', '.join(names)}"


def _check_units(folders: list[Path]) -> None:
    counts = {folder: read_json(folder / DONE)["units"] for folder in folders}
    holders: dict[tuple[str, int], Path] = {}
    size = record_type(read_json(folders[0] / PART)["recipe"]["text"]["hard_negatives"]).itemsize
    for folder in folders:
        if counts[folder] != counts[folders[0]]:
            raise DataError(
                f"{folder}: counted other units than {folders[0].name}; the input changed, delete all parts and run "
                "them again"
            )
        entries = read_journal(folder)
        for entry in entries:
            key = (entry.source, entry.number)
            if key in holders:
                raise DataError(
                    f"{folder}: holds unit {entry.number} of source '{entry.source}', which {holders[key].name} holds "
                    "too; delete the wrong part and run it again"
                )
            holders[key] = folder
        sizes = {
            PAIRS: sum(entry.pairs for entry in entries) * size,
            TOKENS: sum(entry.tokens for entry in entries) * 4,
            QUARANTINE: sum(entry.quarantine_bytes for entry in entries),
        }
        for name, expected in sizes.items():
            if (folder / name).stat().st_size != expected:
                raise DataError(f"{folder / name}: not {expected} bytes long; delete {folder} and run the part again")
    for source, number in counts[folders[0]].items():
        missing = next((unit for unit in range(number) if (source, unit) not in holders), None)
        if missing is not None:
            raise DataError(
                f"{folders[0].parent}: unit {missing} of {number} of source '{source}' is in no part; delete all parts "
                "and run them again"
            )


def fingerprint(folders: list[Path], recipe: dict[str, Any]) -> str:
    """Return the sha256 (hex) of the recipe and of the parts' contents, as their journals list them."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for folder in folders:
        digest.update(hashlib.sha256((folder / PART).read_bytes()).digest())
        digest.update(hashlib.sha256((folder / JOURNAL).read_bytes()).digest())
    return digest.hexdigest()
