"""Invariants: the same rows from every kind of file, compressed or not; a row that cannot be parsed is named by its
line and does not hide the rows after it; a file that cannot be read is refused by name.
"""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from anchor.data.row_files import open_output, read_rows
from anchor.errors import DataError

HEADER = "file has a header; write it again or remove it"
UTF8 = "text, expected UTF-8; convert it, with `iconv -f"
ROWS = [{"query": "Was?\nWo?", "positive": 'a "quoted", text'}, {"query": "漢字", "positive": "é" * 200_000}]


def compressed(file: Path, data: bytes, kind: str) -> Path:
    codec = {"": None, ".gz": "gzip", ".zst": "zstd"}[kind]
    file = file.with_name(file.name + kind)
    if codec is None:
        file.write_bytes(data)
    else:
        # In two frames, as `cat a.zst b.zst` gives them.
        parts = (data[:7], data[7:])
        file.write_bytes(
            b"".join(gzip.compress(p) if codec == "gzip" else pa.Codec(codec).compress(p, asbytes=True) for p in parts)
        )
    return file


def test_the_same_rows_come_from_every_kind_of_file(tmp_path: Path) -> None:
    json_file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    json_file.write_bytes(b"\xef\xbb\xbf" + json_file.read_bytes().replace(b"\n", b"\r\n\n", 1))
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["query", "positive"])
        table.writeheader()
        table.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    lines = {"jsonl": (1, 3), "csv": (2, 4)}
    for name in ("a.jsonl", "a.csv"):
        for kind in ("", ".gz", ".zst"):
            file = compressed(tmp_path / name, (tmp_path / name).read_bytes(), kind)
            read = list(read_rows(file))
            assert [row.value for row in read] == ROWS
            assert [str(row.place) for row in read] == [f"{file}:{line}" for line in lines[name[2:]]]
    read = list(read_rows(tmp_path / "a.parquet"))
    assert [row.value for row in read] == ROWS
    assert [str(row.place) for row in read] == [f"{tmp_path}/a.parquet: row {i}" for i in range(2)]


def test_tsv_knows_no_quotes_and_empty_cells_are_absent(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text('query\tpositive\tnegative\n"Who" said it?\ta "b\t\n')
    assert [row.value for row in read_rows(file)] == [{"query": '"Who" said it?', "positive": 'a "b', "negative": None}]


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2), min_size=1))
def test_whatever_was_written_as_csv_is_read(tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]]) -> None:
    file = tmp_path_factory.mktemp("csv") / "a.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *cells])
    assert [list(row.value.values()) for row in read_rows(file)] == [[cell or None for cell in row] for row in cells]


@pytest.mark.parametrize(
    ("name", "line", "expected", "content"),
    [
        ("a.csv", b"x", "1 fields, the header has 2", ["x"]),
        ("a.csv", b"x,y,z", "3 fields, the header has 2", ["x", "y", "z"]),
        ("a.tsv", b"x", "1 fields, the header has 2", ["x"]),
        ("a.csv", b'"x"y,z', "malformed CSV: ',' expected after '\"'", None),
        ("a.csv", b"x,\xe9", "not UTF-8: a byte is 0xe9", ["x", "\ufffd"]),
        ("a.tsv", b"x\t\xe9", "not UTF-8: a byte is 0xe9", ["x", "\ufffd"]),
        ("a.jsonl", b"\xe9", "not UTF-8: byte 1 is 0xe9", "\ufffd\n"),
        ("a.jsonl", b"{", "malformed JSON: Expecting property name enclosed in double quotes at character 3", "{\n"),
    ],
)
def test_a_malformed_row_is_named_and_the_next_is_read(
    tmp_path: Path, name: str, line: bytes, expected: str, content: object
) -> None:
    file = tmp_path / name
    separator = b"\t" if name.endswith("tsv") else b","
    good, first = (
        (json.dumps({"a": "1", "b": "2"}).encode(), b"")
        if name.endswith("jsonl")
        else (separator.join((b"1", b"2")), separator.join((b"a", b"b")))
    )
    file.write_bytes(b"\n".join((first, good, line, good, b"")))
    read = list(read_rows(file))
    assert [row.problem for row in read] == [None, expected, None]
    assert [str(row.place) for row in read] == [f"{file}:{n}" for n in (2, 3, 4)]
    assert read[1].value == content
    assert read[0].value == read[2].value == {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    ("bad", "good", "expected"),
    [
        ('3,"4', "5,6", "malformed CSV: unexpected end of data"),
        ('3,"4', '5,"6"', "malformed CSV: ',' expected after '\"'"),
        ('3,"4', '5",6', "3 fields, the header has 2"),
    ],
)
def test_a_quote_that_takes_in_other_rows_is_refused(tmp_path: Path, bad: str, good: str, expected: str) -> None:
    """Regression: one row was set aside for the quote; the rows inside the quote were lost without being counted."""
    file = tmp_path / "a.csv"
    file.write_text(f"a,b\n1,2\n{bad}\n7,8\n{good}\n")
    with pytest.raises(DataError) as caught:
        list(read_rows(file))
    assert str(caught.value) == (
        f"{file}:3: {expected}; a quote makes one row of lines 3 to 5: close it, or double it where it is text"
    )


def test_a_quote_that_is_not_closed_on_the_last_line_costs_that_row_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('a,b\n1,2\n"3,4\n')
    assert [(row.place.number, row.problem) for row in read_rows(file)] == [
        (2, None),
        (3, "malformed CSV: unexpected end of data"),
    ]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.csv", b"", "{f}: empty; expected a header line with the names of the columns"),
        ("a.csv", b"a,b,a\n", "{f}:1: the header names column 'a' twice; rename one"),
        ("a.csv", b'"a"b\n', "{f}:1: malformed header: ',' expected after '\"'"),
        ("a.jsonl.gz", b"plain", "{f}: cannot be read: zlib inflate failed: incorrect header check"),
        ("a.jsonl.zst", b"plain", "{f}: cannot be read: ZSTD decompress failed: Unknown frame descriptor"),
        (
            "a.jsonl.zst",
            pa.Codec("zstd").compress(b"{}\n" * 99, asbytes=True)[:-1],
            "{f}: cannot be read: Truncated compressed stream",
        ),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:-9], "{f}: cannot be read: Truncated compressed stream"),
        ("a.jsonl.gz", b"", f"{{f}}: 0 bytes, cut off: even an empty gzip {HEADER}"),
        ("a.csv.gz", b"", f"{{f}}: 0 bytes, cut off: even an empty gzip {HEADER}"),
        ("a.jsonl.zst", b"", f"{{f}}: 0 bytes, cut off: even an empty zstd {HEADER}"),
        ("a.jsonl", '{"a": "b"}'.encode("utf-16"), f"{{f}}: UTF-16 {UTF8} UTF-16 -t UTF-8` for one"),
        ("a.jsonl", '{"a": "b"}'.encode("utf-16-le"), f"{{f}}: UTF-16 {UTF8} UTF-16 -t UTF-8` for one"),
        ("a.csv", "a,b".encode("utf-16-be"), f"{{f}}: UTF-16 {UTF8} UTF-16 -t UTF-8` for one"),
        ("a.tsv.gz", gzip.compress("a\tb".encode("utf-32"), mtime=0), f"{{f}}: UTF-32 {UTF8} UTF-32 -t UTF-8` for one"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(read_rows(file))
    assert str(caught.value) == expected.format(f=file)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_every_cut_of_a_compressed_file_is_refused(tmp_path: Path, kind: str) -> None:
    """Regression: a file cut to 0 bytes was read as a file without rows; every other length was refused."""
    data = b"".join(json.dumps({"query": f"q{i}", "positive": f"p{i}"}).encode() + b"\n" for i in range(8))
    whole = gzip.compress(data) if kind == "gz" else pa.Codec("zstd").compress(data, asbytes=True)
    file = tmp_path / f"a.jsonl.{kind}"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.jsonl\."):
            list(read_rows(file))
    file.write_bytes(whole)
    assert len(list(read_rows(file))) == 8


@pytest.mark.parametrize("data", [b"", b"\n", b'{"a": 1}\n', "{}\n".encode("utf-8-sig")])
def test_an_empty_or_short_plain_file_is_read(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(data)
    assert [row.problem for row in read_rows(file)] == [None] * data.count(b"{")


def test_a_time_that_python_does_not_know_is_its_number(tmp_path: Path) -> None:
    """Regression: the year 148,000 in a column that no recipe names made packing fail with a traceback."""
    file, far = tmp_path / "a.parquet", 2**62
    time, day = pa.array([far, None]).cast(pa.timestamp("us")), pa.array([2**30, 1], pa.int32()).cast(pa.date32())
    table = pa.table(
        {
            "query": ["Was?", "Wo?"],
            "time": time,
            "day": day,
            "struct": pa.StructArray.from_arrays([time], ["time"]),
            "list": pa.ListArray.from_arrays([0, 1, 2], time),
        }
    )
    pq.write_table(table, file)
    assert [row.value for row in read_rows(file)] == [
        {"query": "Was?", "time": far, "day": 2**30, "struct": {"time": far}, "list": [far]},
        {"query": "Wo?", "time": None, "day": 1, "struct": {"time": None}, "list": [None]},
    ]


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table([["q"], ["p"], ["r"]], names=["query", "positive", "query"]), file)
    with pytest.raises(DataError) as caught:
        list(read_rows(file))
    assert str(caught.value) == f"{file}: two columns are called 'query'; rename one"


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
def test_what_is_written_is_read_and_equal_contents_give_equal_bytes(tmp_path: Path, kind: str) -> None:
    files = [tmp_path / folder / f"x.jsonl{kind}" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        with open_output(file) as stream:
            for row in ROWS:
                stream.write(json.dumps(row).encode() + b"\n")
    assert [row.value for row in read_rows(files[0])] == ROWS
    assert files[0].read_bytes() == files[1].read_bytes()
