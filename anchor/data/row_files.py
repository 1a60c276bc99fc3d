"""Read rows from JSON lines, CSV, TSV (each also as .gz or .zst) and Parquet files, in constant memory.

Every row comes with its place. :func:`raw_rows` leaves JSON lines as bytes, so that the caller can parse them later or
in another process. A row that cannot be parsed is returned with its problem, so that the caller can quarantine it. A
file that cannot be read is a :class:`DataError`. So is a malformed CSV row of several lines: its quotes are wrong, and
it may have swallowed any number of rows.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from anchor.errors import DataError

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TABLE_SUFFIXES = (*JSON_SUFFIXES, *(f"{k}{c}" for k in (".csv", ".tsv") for c in ("", ".gz", ".zst")), ".parquet")
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_BUFFER_BYTES = 1 << 20
_MAX_FIELD_CHARACTERS = 1 << 24


class Place(NamedTuple):
    """Location of a row; its text begins every message about the row.

    Attributes:
        file: path, or name of a dataset.
        number: line from 1, or row from 0.
        unit: ``line`` or ``row``.
    """

    file: str
    number: int
    unit: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file}: row {self.number}"


class Row(NamedTuple):
    """One row.

    Attributes:
        place: location of the row.
        value: the parsed row. JSON lines are bytes until :func:`parsed` reads them; a row with a problem keeps its raw
            content, if there is any.
        problem: reason why the row could not be parsed, or None.
        unused_positives: number of the row's positives that the recipe leaves out.
    """

    place: Place
    value: Any
    problem: str | None = None
    unused_positives: int = 0


class Meter:
    """Counter of the bytes read from files, as stored on disk (compressed or not)."""

    def __init__(self) -> None:
        self._finished_bytes = 0
        self._tell: Callable[[], int] = int  # int() is 0: no file is open

    @property
    def read_bytes(self) -> int:
        return self._finished_bytes + self._tell()

    def begin(self, tell: Callable[[], int]) -> None:
        """Start counting a file; ``tell`` returns the position in it."""
        self._tell = tell

    def end(self, file: Path) -> None:
        """Count the whole file as read."""
        self._finished_bytes += file.stat().st_size
        self._tell = int


def read_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a file with one of :data:`TABLE_SUFFIXES`, in order.

    Raises:
        DataError: the file cannot be read or decompressed, or a table has no usable header or has a malformed row of
            several lines.
    """
    return map(parsed, raw_rows(file, Meter()))


def raw_rows(file: Path, meter: Meter) -> Iterator[Row]:
    """Yield the rows of :func:`read_rows`, but leave JSON lines unparsed.

    Raises:
        DataError: see :func:`read_rows`.
    """
    kind = kind_of(file)
    try:
        if kind == "parquet":
            yield from _parquet_rows(file, meter)
        else:
            with open_input(file, meter) as stream:
                yield from stream_rows(str(file), stream, kind)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    finally:
        meter.end(file)


def kind_of(file: Path) -> str:
    """Return the last suffix of a file's name, ignoring a compression suffix."""
    return file.name.removesuffix(file.suffix if file.suffix in _CODECS else "").rpartition(".")[2]


def stream_rows(name: str, stream: io.BufferedReader, kind: str) -> Iterator[Row]:
    """Yield the rows of an open ``jsonl``, ``csv`` or ``tsv`` file, as :func:`raw_rows` does.

    Raises:
        DataError: a table has no usable header or has a malformed row of several lines.
    """
    return _lines(name, stream) if kind == "jsonl" else _csv_rows(name, stream, kind)


def open_input(file: Path, meter: Meter | None = None) -> io.BufferedReader:
    """Open a text file for reading bytes, decompressed according to its suffix; a meter tracks the position.

    Raises:
        DataError: a compressed file has 0 bytes, or the text is UTF-16 or UTF-32.
        OSError: the file cannot be read or decompressed.
    """
    codec = _CODECS.get(file.suffix)
    refuse_zero_bytes(file)
    raw: Any = io.FileIO(file) if codec is None else pa.OSFile(str(file))
    unpacked: Any = raw if codec is None else pa.CompressedInputStream(raw, codec)
    stream = io.BufferedReader(unpacked, _BUFFER_BYTES)
    with ExitStack() as stack:
        stack.enter_context(stream)
        refuse_wide_text(str(file), stream)
        stack.pop_all()
    if meter is not None:
        meter.begin(stream.tell if codec is None else raw.tell)
    return stream


def refuse_zero_bytes(file: Path) -> None:
    """Refuse a compressed file of 0 bytes: decompressors accept it as empty, but no compressor writes it.

    Raises:
        DataError: the file is compressed and has 0 bytes.
    """
    if file.suffix in _CODECS and file.stat().st_size == 0:
        raise DataError(
            f"{file}: 0 bytes, cut off: even an empty {_CODECS[file.suffix]} file has a header; write it again or "
            "remove it"
        )


def refuse_wide_text(name: str, stream: io.BufferedReader) -> None:
    """Refuse UTF-16 and UTF-32 text, detected by its byte order mark or by every other byte being NUL.

    Raises:
        DataError: the text is UTF-16 or UTF-32.
    """
    head = stream.peek(4)[:4]
    found = next((encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    if found is None and len(head) == 4 and any(not any(head[i::2]) and all(head[1 - i :: 2]) for i in (0, 1)):
        found = "UTF-16"
    if found is not None:
        raise DataError(f"{name}: {found} text, expected UTF-8; convert it, with `iconv -f {found} -t UTF-8` for one")


def open_output(file: Path) -> io.BufferedWriter:
    """Create a file for writing, compressed according to its suffix. Equal contents give equal bytes."""
    codec = _CODECS.get(file.suffix)
    # Not `BinaryIO`: the type checker of the tests remembers its first answer for a class, whatever the stream beneath.
    raw: Any = io.FileIO(file, "wb") if codec is None else pa.OSFile(str(file), "wb")
    packed: Any = raw if codec is None else pa.CompressedOutputStream(raw, codec)
    return io.BufferedWriter(packed, _BUFFER_BYTES)


def _lines(name: str, lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line and not line.isspace():
            yield Row(Place(name, number, "line"), line)


def parsed(row: Row) -> Row:
    """Return a row with its JSON parsed, or with the reason why it cannot be parsed. Return other rows unchanged."""
    line, place = row.value, row.place
    if not isinstance(line, bytes):
        return row
    try:
        return Row(place, json.loads(line.decode()))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}"
        return Row(place, line.decode(errors="replace"), problem)
    except json.JSONDecodeError as error:
        problem = f"malformed JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
        return Row(place, line.decode(), problem)
    except ValueError:
        return Row(
            place, line.decode(), f"malformed JSON: a number has more than {sys.get_int_max_str_digits()} digits"
        )
    except RecursionError:
        return Row(place, line.decode(), "malformed JSON: lists or objects are nested too deep")


def _csv_rows(name: str, stream: io.BufferedReader, kind: str) -> Iterator[Row]:
    """Yield rows by header. A quoted CSV field may hold line ends; TSV has no quoting (IANA's definition)."""
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)  # the csv module's default of 131,072 is too short for long documents
    # Bytes that are not UTF-8 become surrogates, so that they can be refused row by row.
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        if kind == "tsv":
            yield from _table_rows(name, csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True), "TSV")
        else:
            yield from _table_rows(name, csv.reader(text, strict=True), "CSV")


def _table_rows(name: str, reader: Any, kind: str) -> Iterator[Row]:
    header: list[str] | None = None
    while True:
        place = Place(name, reader.line_num + 1, "line")
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if header is None:
                raise DataError(f"{place}: malformed header: {error}") from error
            _refuse_lines(place, reader.line_num, f"malformed {kind}: {error}")
            yield Row(place, None, f"malformed {kind}: {error}")
            continue
        if cells is None:
            break
        if not cells:
            continue
        if header is None:
            header = cells
            twice = [cell for cell in cells if cells.count(cell) > 1]
            if twice:
                raise DataError(f"{place}: the header names column '{twice[0]}' twice; rename one")
            continue
        if len(cells) != len(header):
            _refuse_lines(place, reader.line_num, f"{len(cells)} fields, the header has {len(header)}")
        yield _csv_row(place, header, cells)
    if header is None:
        raise DataError(f"{name}: empty; expected a header line with the names of the columns")


def _refuse_lines(place: Place, last: int, problem: str) -> None:
    """Refuse a malformed row that a quote has stretched over several lines, up to ``last``: they may hold good rows."""
    if last > place.number:
        raise DataError(
            f"{place}: {problem}; a quote makes one row of lines {place.number} to {last}: close it, or double it "
            "where it is text"
        )


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


def _parquet_rows(file: Path, meter: Meter) -> Iterator[Row]:
    number = 0
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DataError(f"{file}: two columns are called '{twice[0]}'; rename one")
        size, rows = file.stat().st_size, max(table.metadata.num_rows, 1)
        meter.begin(lambda: size * number // rows)
        for batch in table.iter_batches(batch_size=1024):
            for value in _values(batch):
                yield Row(Place(str(file), number, "row"), value)
                number += 1
    except (pa.ArrowException, OSError, OverflowError, ValueError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from error


def _values(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of a batch. If Python cannot represent a time in it, return all its times as stored numbers."""
    try:
        return batch.to_pylist()
    except (OverflowError, ValueError):
        # No layout reads times, since they are not texts, but a quarantined row includes them.
        return batch.cast(pa.schema([field.with_type(_timeless(field.type)) for field in batch.schema])).to_pylist()


def _timeless(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind):
        return pa.int32() if kind.bit_width == 32 else pa.int64()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_timeless(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_timeless(kind.value_type)))
    return kind
