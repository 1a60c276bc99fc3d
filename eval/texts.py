"""Texts with ids from JSON lines, Parquet, plain text or standard input, block by block, in constant memory."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from anchor.errors import ConfigError, DataError, did_you_mean

FORMATS = ("jsonl", "parquet", "txt")
_WITH = {str: " with a text", float: " with a number", object: ""}


@dataclass(frozen=True, slots=True)
class Source:
    """Where texts come from.

    Attributes:
        path: a file, or None for standard input.
        kind: one of :data:`FORMATS`; by the file's suffix when None, ``txt`` for standard input.
        text: field or column of the text.
        id: field or column of the id; a missing one is the number of the text, from 0.
    """

    path: Path | None
    kind: str | None = None
    text: str = "text"
    id: str = "id"

    @property
    def name(self) -> str:
        return "standard input" if self.path is None else str(self.path)


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive texts.

    Attributes:
        number: from 0.
        ids: all different over all blocks.
        texts: as many.
    """

    number: int
    ids: list[str]
    texts: list[str]


def read_texts(source: Source) -> tuple[list[str], list[str]]:
    """All ids and texts of a source; errors as :func:`read_blocks`."""
    ids: list[str] = []
    texts: list[str] = []
    for block in read_blocks(source, 1 << 16):
        ids += block.ids
        texts += block.texts
    return ids, texts


def read_blocks(source: Source, num_texts: int) -> Iterator[Block]:
    """Blocks of ``num_texts`` texts (the last may have fewer), in the order of the source.

    Raises:
        ConfigError: missing file or another kind of file.
        DataError: malformed line, missing field, an id given twice, no text at all.
    """
    number, ids, texts = 0, [], []
    seen: set[bytes] = set()  # 8 bytes an id instead of the ids themselves
    for one, text in _rows(source):
        key = hashlib.blake2b(one.encode(), digest_size=8).digest()
        if key in seen:
            raise DataError(f"{source.name}: the id '{one}' is given twice; ids must differ")
        seen.add(key)
        ids.append(one)
        texts.append(text)
        if len(ids) == num_texts:
            yield Block(number, ids, texts)
            number, ids, texts = number + 1, [], []
    if ids:
        yield Block(number, ids, texts)
    elif number == 0:
        raise DataError(f"{source.name}: holds no text")


def read_rows(path: Path, fields: Mapping[str, type], limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file.

    Args:
        path: exists.
        fields: that every row must have: ``str`` a text, ``float`` a number, ``object`` anything.
        limit: only the first so many.

    Raises:
        DataError: malformed line, or a field that is missing or of another type.
    """
    rows = []
    with path.open("rb") as stream:
        for where, line in _lines(str(path), islice(stream, limit)):
            row = _parsed(where, line)
            for name, kind in fields.items():
                known = row if isinstance(row, dict) else {}
                if name not in known or not isinstance(known[name], (int, float) if kind is float else kind):
                    raise DataError(f"{where}: no field '{name}'{_WITH[kind]}{did_you_mean(name, known)}")
            rows.append(row)
    return rows


def _lines(name: str, stream: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """``(file:line, line)``.

    Raises:
        DataError: not UTF-8.
    """
    for number, raw in enumerate(stream, start=1):
        where = f"{name}:{number}"
        try:
            yield where, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}") from error


def _parsed(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON: {error.msg} at character {error.pos + 1}") from error


def check_source(source: Source) -> str:
    """What kind of file a source is, one of :data:`FORMATS`, before anything is read.

    Raises:
        ConfigError: missing file or another kind of file.
    """
    path = source.path
    if path is None:
        if source.kind == "parquet":
            raise ConfigError("standard input: Parquet cannot be read from a pipe; give a file")
        return source.kind or "txt"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected .jsonl, .parquet or .txt, or - for standard input")
    kind = source.kind or path.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise ConfigError(f"{path}: expected a file ending in .jsonl, .parquet or .txt; else add --format")
    return kind


def _rows(source: Source) -> Iterator[tuple[str, str]]:
    path, kind = source.path, check_source(source)
    if path is None:
        yield from _line_rows(source, sys.stdin.buffer, kind)
        return
    if kind == "parquet":
        yield from _parquet_rows(source, path)
        return
    with path.open("rb") as stream:
        yield from _line_rows(source, stream, kind)


def _line_rows(source: Source, stream: Iterable[bytes], kind: str) -> Iterator[tuple[str, str]]:
    for number, (where, line) in enumerate(_lines(source.name, stream)):
        if kind == "txt":
            yield str(number), line
        else:
            yield _checked(_parsed(where, line), number, where, source)


def _parquet_rows(source: Source, path: Path) -> Iterator[tuple[str, str]]:
    try:
        file = pq.ParquetFile(path)
        known = file.schema_arrow.names
        if source.text not in known:
            raise DataError(f"{path}: no column '{source.text}'{did_you_mean(source.text, known)}")
        columns = [name for name in (source.text, source.id) if name in known]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                yield _checked(row, number, f"{path}: row {number}", source)
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _checked(row: object, number: int, where: str, source: Source) -> tuple[str, str]:
    if not isinstance(row, dict) or not isinstance(row.get(source.text), str):
        known = row if isinstance(row, dict) else {}
        raise DataError(f"{where}: no field '{source.text}' with a text{did_you_mean(source.text, known)}")
    try:
        row[source.text].encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: '{source.text}' holds half a surrogate pair at character {error.start + 1}"
        ) from error
    one = row.get(source.id)
    name = str(number if one is None else one)
    if "\n" in name:
        raise DataError(f"{where}: the id {name!r} holds a line end")
    return name, row[source.text]
