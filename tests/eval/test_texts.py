"""Invariants: texts are read as they are written, from every format; bad input is one line."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_jsonl

from anchor.data.row_files import open_output
from anchor.errors import ConfigError, DataError
from eval.decode import read_pairs
from eval.embedding.texts import Source, read_texts


def test_parquet_plain_text_and_other_columns_are_read(tmp_path):
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"name": [7, 8], "body": ["x", "y"]}), table)
    assert read_texts(Source(table, text="body", id="name")) == (["7", "8"], ["x", "y"])
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_texts(Source(tmp_path / "a.txt")) == (["0", "1", "2"], ["one", "", "two"])


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
def test_what_pack_reads_is_embedded_too(tmp_path, kind):
    """Regression: compressed files and tables were refused, although `data_prep pack` reads them."""
    contents = {
        "jsonl": '{"id": "x", "text": "a, b"}\n{"id": "y", "text": "c\u2028"}\n',
        "csv": 'id,text\nx,"a, b"\n\ny,c\u2028\n',
        "tsv": "id\ttext\nx\ta, b\ny\tc\u2028\n",
    }
    for name, content in contents.items():
        path = tmp_path / f"a.{name}{kind}"
        with open_output(path) as stream:
            stream.write(content.encode())
        assert read_texts(Source(path)) == (["x", "y"], ["a, b", "c\u2028"])
    other = (tmp_path / f"a.csv{kind}").rename(tmp_path / f"table{kind}")
    assert read_texts(Source(other, kind="csv")) == (["x", "y"], ["a, b", "c\u2028"])
    with open_output(tmp_path / f"a.txt{kind}") as stream:
        stream.write(b"one\n\ntwo")
    assert read_texts(Source(tmp_path / f"a.txt{kind}"))[1] == ["one", "", "two"]
    with open_output(tmp_path / f"pairs.jsonl{kind}") as stream:
        stream.write(b'{"query": "a", "positive": "b"}\n')
    assert read_pairs(tmp_path / f"pairs.jsonl{kind}") == [("a", "b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b"", ": 0 bytes, cut off"),
        ("a.jsonl.zst", b"x", ": cannot be read: "),
        ("a.txt", "one\ntwo".encode("utf-16"), ": UTF-16 text, expected UTF-8"),
        ("a.csv", b"id,text\nx\n", ":2: 1 fields, the header has 2"),
        ("a.csv", b"id,txt\nx,y\n", ":2: no field 'text' with a text; did you mean 'txt'?"),
        ("a.csv", b"id,text\nx,\n", ":2: 'text' is null; expected a text"),
        ("a.parquet.gz", b"x", ": not a readable Parquet file"),
    ],
)
def test_files_of_other_kinds_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_texts(Source(path))
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_standard_input_may_be_a_table_but_not_utf16(monkeypatch):
    def put(data):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))

    put(b"text,id\na,7\n")
    assert read_texts(Source(None, kind="csv")) == (["7"], ["a"])
    put("one\n".encode("utf-16"))
    with pytest.raises(DataError) as error:
        read_texts(Source(None))
    assert str(error.value).startswith("standard input: UTF-16 text, expected UTF-8; convert it")


def test_blank_json_lines_are_skipped_and_blank_plain_ones_are_texts(tmp_path):
    for content in (b'{"text": "a"}\n{"text": "b"}\n\n', b'\n{"text": "a"}\n\r\n  \n{"text": "b"}'):
        (tmp_path / "a.jsonl").write_bytes(content)
        assert read_texts(Source(tmp_path / "a.jsonl")) == (["0", "1"], ["a", "b"])
    rows = b'\n{"query": "a", "positive": "b"}\n\n{"query": "c", "positive": "d"}\n\n'
    (tmp_path / "pairs.jsonl").write_bytes(rows)
    assert read_pairs(tmp_path / "pairs.jsonl") == [("a", "b"), ("c", "d")]
    assert read_pairs(tmp_path / "pairs.jsonl", 1) == [("a", "b")]


def test_an_id_field_that_is_asked_for_must_be_there(tmp_path):
    """Regression: with a mistyped --id-field, the texts were numbered."""
    rows = write_jsonl(tmp_path / "a.jsonl", [{"key": "x", "text": "a"}, {"key": None, "text": "b"}])
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"key": ["x", None], "text": ["a", "b"]}), table)
    (tmp_path / "a.txt").write_text("a\n")
    for path, name, message in (
        (rows, "kye", f"{rows}:1: no field 'kye' with an id; did you mean 'key'?"),
        (rows, "key", f"{rows}:2: no field 'key' with an id; known are text"),
        (table, "kye", f"{table}: no column 'kye'; did you mean 'key'?"),
        (table, "key", f"{table}: row 1: no field 'key' with an id; known are text"),
    ):
        with pytest.raises(DataError) as error:
            read_texts(Source(path, id=name))
        assert str(error.value) == message
        assert read_texts(Source(path)) == (["0", "1"], ["a", "b"])
    with pytest.raises(ConfigError) as error:
        read_texts(Source(tmp_path / "a.txt", id="key"))
    message = "plain text has no fields; leave out --text-field and --id-field"
    assert str(error.value) == f"{tmp_path / 'a.txt'}: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', ":2: malformed JSON: Expecting value at character 11"),
        (b'{"txt": "a"}\n', ":1: no field 'text' with a text; did you mean 'txt'?"),
        (b'{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', ": the id '1' is given twice; ids must differ"),
        (b'{"id": "a\\nb", "text": "a"}\n', ":1: the id 'a\\nb' holds a line end"),
        (b'{"text": "\xff"}\n', ":1: not UTF-8: byte 11 is 0xff"),
        (b'{"text": "ab\\ud800"}\n', ":1: 'text' holds half a surrogate pair at character 3"),
        (b"", ": holds no text"),
        (b"\n \r\n", ": holds no text"),
        (b'{"text": "a"}\n\n \n{"text": null}\n', ":4: 'text' is null; expected a text"),
        (b'{"text": ["a"]}\n', ":1: 'text' is ['a']; expected a text"),
        (b'["a"]\n', ":1: no field 'text' with a text"),
        (b'{"id": "x\\ud800", "text": "a"}\n', ":1: 'id' holds half a surrogate pair at character 2"),
        (b'{"id": %s, "text": "a"}\n' % (b"7" * 5000), ":1: malformed JSON: a number has more than 4300 digits"),
        (b'{"id": [1], "text": "a"}\n', ":1: the id is [1]; expected a text or a number"),
        (b'{"text": "a", "more": %s' % (b"[" * 100_000), ":1: malformed JSON: lists or objects are nested too deep"),
    ],
)
def test_bad_input_files_are_refused_by_line(tmp_path, content, message):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_texts(Source(path))
    assert str(error.value) == f"{path}{message}"


def test_parquet_values_that_python_cannot_hold_are_refused_by_row(tmp_path):
    text = pa.array([b"a", b"b", b"c\xff"], pa.binary()).cast(pa.string(), safe=False)
    texts = pa.StringArray.from_buffers(3, *text.buffers()[1:])
    far = pa.array([0, 253402300800000, 0]).cast(pa.timestamp("ms"))
    path = tmp_path / "a.parquet"
    for table, message in (
        ({"text": texts}, "row 2: 'utf-8' codec can't decode byte 0xff in position 1: invalid start byte"),
        ({"id": far, "text": ["a", "b", "c"]}, "row 1: date value out of range"),
    ):
        pq.write_table(pa.table(table), path)
        with pytest.raises(DataError) as error:
            read_texts(Source(path))
        assert str(error.value).startswith(f"{path}: {message}")
        assert "\n" not in str(error.value)
