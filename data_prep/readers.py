"""Files -> rows: JSON lines, CSV, TSV (each also as .gz or .zst) and Parquet, in constant memory.

Every row comes with its place. A row that cannot be parsed is passed on with its problem, so that the caller can put
it aside; a file that cannot be read is a :class:`DataError`.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from anchor.errors import DataError

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TABLE_SUFFIXES = (*JSON_SUFFIXES, *(f"{k}{c}" for k in (".csv", ".tsv") for c in ("", ".gz", ".zst")), ".parquet")
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BUFFER_BYTES = 1 << 20
_MAX_FIELD_CHARACTERS = 1 << 24


class Place(NamedTuple):
    """Where a row comes from; its text begins every message.

    Attributes:
        file: path, or name of a dataset.
        number: line from 1, or row from 0.
        unit: what is counted, ``line`` or ``row``.
    """

    file: str
    number: int
    unit: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file}: row {self.number}"


class Row(NamedTuple):
    """One row.

    Attributes:
        place: where it comes from.
        value: the parsed row; the raw text when there is a problem.
        problem: why it could not be parsed, or None.
        unused_positives: positives of the row that the recipe leaves out.
    """

    place: Place
    value: Any
    problem: str | None = None
    unused_positives: int = 0


def read_rows(file: Path) -> Iterator[Row]:
    """Rows of a file of :data:`TABLE_SUFFIXES`, in order.

    Raises:
        DataError: the file cannot be read or decompressed, or a table has no usable header.
    """
    kind = file.name.removesuffix(file.suffix if file.suffix in _CODECS else "").rpartition(".")[2]
    if kind == "parquet":
        yield from _parquet_rows(file)
        return
    try:
        with open_input(file) as stream:
            yield from _json_rows(file, stream) if kind == "jsonl" else _csv_rows(file, stream, kind)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def open_input(file: Path) -> BinaryIO:
    """The bytes of a file, decompressed as its suffix says."""
    codec = _CODECS.get(file.suffix)
    if codec is None:
        return file.open("rb", buffering=_BUFFER_BYTES)
    stream = pa.CompressedInputStream(pa.OSFile(str(file)), codec)
    return cast(BinaryIO, io.BufferedReader(cast(Any, stream), _BUFFER_BYTES))


def open_output(file: Path) -> BinaryIO:
    """A new file, compressed as its suffix says; equal contents give equal bytes."""
    codec = _CODECS.get(file.suffix)
    if codec is None:
        return file.open("wb", buffering=_BUFFER_BYTES)
    stream = pa.CompressedOutputStream(pa.OSFile(str(file), "wb"), codec)
    return cast(BinaryIO, io.BufferedWriter(cast(Any, stream), _BUFFER_BYTES))


def _json_rows(file: Path, lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.isspace() or not line:
            continue
        place = Place(str(file), number, "line")
        try:
            yield Row(place, json.loads(line.decode()))
        except UnicodeDecodeError as error:
            problem = f"not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}"
            yield Row(place, line.decode(errors="replace"), problem)
        except json.JSONDecodeError as error:
            yield Row(
                place, line.decode(), f"malformed JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
            )
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 nested lists
            yield Row(place, line.decode(), f"malformed JSON: {str(error).split(';')[0]}")


def _csv_rows(file: Path, stream: BinaryIO, kind: str) -> Iterator[Row]:
    """Rows by header. A CSV text may be quoted and then hold line ends; TSV knows no quotes (IANA's definition)."""
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)  # the module's own 131,072 is less than a long document
    # Bytes that are no UTF-8 become surrogates, to be refused row by row.
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        if kind == "tsv":
            yield from _table_rows(file, csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True), "TSV")
        else:
            yield from _table_rows(file, csv.reader(text, strict=True), "CSV")


def _table_rows(file: Path, reader: Any, kind: str) -> Iterator[Row]:
    header: list[str] | None = None
    while True:
        place = Place(str(file), reader.line_num + 1, "line")
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if header is None:
                raise DataError(f"{place}: malformed header: {error}") from error
            yield Row(place, None, f"malformed {kind}: {error}")
            continue
        if cells is None:
            break
        if not cells:
            continue
        if header is None:
            header = cells
            twice = [name for name in cells if cells.count(name) > 1]
            if twice:
                raise DataError(f"{place}: the header names column '{twice[0]}' twice; rename one")
            continue
        yield _csv_row(place, header, cells)
    if header is None:
        raise DataError(f"{file}: empty; expected a header line with the names of the columns")


def _csv_row(place: Place, header: list[str], cells: list[str]) -> Row:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        wrong = ord(error.object[error.start]) - 0xDC00
        raw = [cell.encode(errors="surrogateescape").decode(errors="replace") for cell in cells]
        return Row(place, raw, f"not UTF-8: a byte is 0x{wrong:02x}")
    if len(cells) != len(header):
        return Row(place, cells, f"{len(cells)} fields, the header has {len(header)}")
    return Row(place, {name: cell or None for name, cell in zip(header, cells, strict=True)})


def _parquet_rows(file: Path) -> Iterator[Row]:
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                yield Row(Place(str(file), number, "row"), value)
                number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from error
