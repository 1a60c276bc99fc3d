"""Read texts with ids, block by block, from files of :mod:`anchor.data.row_files`, plain text or standard input."""

import hashlib
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from anchor.data.records import MAX_TEXT_CHARACTERS
from anchor.data.row_files import kind_of, open_input, parsed, refuse_wide_text, stream_rows
from anchor.errors import ConfigError, DataError, did_you_mean, first_line

FORMATS = ("jsonl", "csv", "tsv", "parquet", "txt")
_EXPECTED = "expected .jsonl, .csv, .tsv or .txt (each also .gz or .zst), or .parquet"
_ID = "id"
_KINDS = {str: "a text", float: "a number"}


@dataclass(frozen=True, slots=True)
class Source:
    """File or stream to read texts from.

    Attributes:
        path: a file, or None for standard input.
        kind: one of :data:`FORMATS`; None chooses by the file's suffix, and ``txt`` for standard input.
        text: field or column of the text.
        id: field or column of the id. None uses ``id`` if a row has it, else the number of the text, from 0.
    """

    path: Path | None
    kind: str | None = None
    text: str = "text"
    id: str | None = None

    @property
    def name(self) -> str:
        return "standard input" if self.path is None else str(self.path)


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive texts.

    Attributes:
        number: index of the block, from 0.
        ids: ids of the texts, unique across all blocks.
        texts: one text per id.
    """

    number: int
    ids: list[str]
    texts: list[str]


def read_texts(source: Source) -> tuple[list[str], list[str]]:
    """Return all ids and all texts of a source; raises as :func:`read_blocks`."""
    ids: list[str] = []
    texts: list[str] = []
    for block in read_blocks(source, 1 << 16):
        ids += block.ids
        texts += block.texts
    return ids, texts


def read_blocks(source: Source, num_texts: int, *, check_ids: bool = True) -> Iterator[Block]:
    """Yield blocks of ``num_texts`` texts, in source order; the last block may be shorter.

    Args:
        source: texts, read once. Memory is constant except for the id check.
        num_texts: texts per block.
        check_ids: refuse duplicate ids, at 75 bytes per id. It is enough if one rank checks.

    Raises:
        ConfigError: the file is missing or of an unsupported format.
        DataError: malformed line, missing field, overlong text, duplicate id, or no text at all.
    """
    number, ids, texts = 0, [], []
    seen: set[bytes] = set()  # hashes of the ids, to save memory
    for one, text in _rows(source):
        if len(text) > MAX_TEXT_CHARACTERS:
            raise DataError(
                f"{source.name}: text '{one}' has {len(text):,} characters, expected at most {MAX_TEXT_CHARACTERS:,}; "
                "cut it"
            )
        if check_ids:
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
    """Return the rows of a JSON-lines file; blank lines are skipped.

    Args:
        path: an existing file.
        fields: required fields and their types: ``str`` for text, ``float`` for a number, ``object`` for anything.
        limit: maximum number of rows; None for all.

    Raises:
        DataError: malformed line, or a field that is missing or of the wrong type.
    """
    return [row for _, row in iterate_rows(path, fields, limit)]


def iterate_rows(
    path: Path, fields: Mapping[str, type], limit: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(file:line, row)`` of a JSON-lines file; arguments and errors as in :func:`read_rows`."""
    with _opened(path) as stream:
        rows = islice(_stream_rows(str(path), stream, "tsv" if kind_of(path) == "tsv" else "jsonl"), limit)
        for where, row in rows:
            for name, kind in fields.items():
                check_field(where, row, name, kind)
            yield where, row


def check_field(where: str, row: object, name: str, kind: type) -> None:
    """Refuse the row at ``where`` if its field ``name`` is missing or of the wrong type; see :func:`read_rows`."""
    known = row if isinstance(row, dict) else {}
    if name not in known:
        what = f" with {_KINDS[kind]}" if kind in _KINDS else ""
        raise DataError(f"{where}: no field '{name}'{what}{did_you_mean(name, known)}")
    if not isinstance(known[name], (int, float) if kind is float else kind):
        got = "null" if known[name] is None else reprlib.repr(known[name])
        raise DataError(f"{where}: '{name}' is {got}; expected {_KINDS[kind]}")
    if kind is str:
        _refuse_surrogate(where, name, known[name])


def _refuse_surrogate(where: str, name: str, text: str) -> None:
    """Refuse a text that cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: '{name}' holds half a surrogate pair at character {error.start + 1}") from error


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open the decompressed bytes of a file.

    Raises:
        DataError: the file cannot be opened, or reading or decompressing fails inside the ``with`` block.
    """
    try:
        with open_input(path) as stream:
            yield stream
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _stream_rows(name: str, stream: BufferedReader, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield ``(file:line, row)``.

    Raises:
        DataError: a row cannot be parsed.
    """
    for row in map(parsed, stream_rows(name, stream, kind)):
        if row.problem is not None:
            raise DataError(f"{row.place}: {row.problem}")
        yield str(row.place), row.value


def _text_lines(name: str, stream: Iterable[bytes]) -> Iterator[str]:
    """Yield lines without their line endings.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, raw in enumerate(stream, start=1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}:{number}: not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}"
            ) from error


def check_source(source: Source) -> str:
    """Return the format of a source, one of :data:`FORMATS`, without reading it.

    Raises:
        ConfigError: the file is missing or of an unsupported format, or a field is named for plain text.
    """
    path = source.path
    if path is None:
        if source.kind == "parquet":
            raise ConfigError("standard input: Parquet cannot be read from a pipe; give a file")
        return _with_fields(source, source.kind or "txt")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {_EXPECTED}, or - for standard input")
    kind = source.kind or kind_of(path)
    if kind not in FORMATS:
        raise ConfigError(f"{path}: {_EXPECTED}; else add --format")
    return _with_fields(source, kind)


def _with_fields(source: Source, kind: str) -> str:
    if kind == "txt" and (source.text != "text" or source.id is not None):
        raise ConfigError(f"{source.name}: plain text has no fields; leave out --text-field and --id-field")
    return kind


def _rows(source: Source) -> Iterator[tuple[str, str]]:
    path, kind = source.path, check_source(source)
    if path is None:
        stream = cast(BufferedReader, sys.stdin.buffer)
        refuse_wide_text(source.name, stream)
        yield from _line_rows(source, stream, kind)
    elif kind == "parquet":
        yield from _parquet_rows(source, path)
    else:
        with _opened(path) as stream:
            yield from _line_rows(source, stream, kind)


def _line_rows(source: Source, stream: BufferedReader, kind: str) -> Iterator[tuple[str, str]]:
    if kind == "txt":
        yield from ((str(number), line) for number, line in enumerate(_text_lines(source.name, stream)))
        return
    for number, (where, row) in enumerate(_stream_rows(source.name, stream, kind)):
        yield _checked(row, number, where, source)


def _parquet_rows(source: Source, path: Path) -> Iterator[tuple[str, str]]:
    try:
        file = pq.ParquetFile(path)
        known = file.schema_arrow.names
        for name in (source.text, source.id):
            if name is not None and name not in known:
                raise DataError(f"{path}: no column '{name}'{did_you_mean(name, known)}")
        columns = [name for name in dict.fromkeys((source.text, source.id or _ID)) if name in known]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in _python_rows(batch, number, path):
                yield _checked(row, number, f"{path}: row {number}", source)
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _python_rows(batch: pa.RecordBatch, number: int, path: Path) -> list[dict[str, Any]]:
    """Return the rows of a batch that starts at row ``number``; name a row that cannot be converted to Python."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # invalid UTF-8, or times that Python cannot represent
        for i in range(len(batch)):
            try:
                batch.slice(i, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                raise DataError(f"{path}: row {number + i}: {first_line(error)}") from error
        raise


def _checked(row: Any, number: int, where: str, source: Source) -> tuple[str, str]:
    check_field(where, row, source.text, str)
    one = row.get(source.id or _ID)
    if one is None and source.id is not None:
        hint = did_you_mean(source.id, row.keys() - {source.id})
        raise DataError(f"{where}: no field '{source.id}' with an id{hint}")
    if isinstance(one, list | dict):
        raise DataError(f"{where}: the id is {reprlib.repr(one)}; expected a text or a number")
    name = str(number if one is None else one)
    _refuse_surrogate(where, source.id or _ID, name)
    if "\n" in name:
        raise DataError(f"{where}: the id {name!r} holds a line end")
    return name, row[source.text]
