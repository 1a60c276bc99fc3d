"""Invariants: every malformed row is one line with file, place and reason under `on_bad_row: fail`, and under `skip`
one row of quarantine with the same reason and the content, while the rows around it are packed. What swallows other
rows is refused under both.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import english_pairs, write_jsonl
from packs import MakeRecipe, files_source, packed, refusal

DELETE = "remove the row or use on_bad_row: skip"
MINE = "lower text.hard_negatives or mine more"
GOOD: dict[str, Any] = {"query": "q", "positive": "p", "negative": ["n"]}


def line(**changes: Any) -> bytes:
    return json.dumps(GOOD | changes).encode()


JSON_LINES: list[tuple[bytes, str]] = [
    (b'{"query": "q",', "malformed JSON: Illegal trailing comma before end of object at character 14"),
    (b'{"query" "q"}', "malformed JSON: Expecting ':' delimiter at character 10"),
    (b'{"query": "q"} {"query": "q"}', "malformed JSON: Extra data at character 16"),
    (b"{", "malformed JSON: Expecting property name enclosed in double quotes at character 3"),
    (b"query", "malformed JSON: Expecting value at character 1"),
    (b"\xef\xbb\xbf{}", "malformed JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) at character 1"),
    (b'{"query": "q\x00"}', "malformed JSON: Invalid control character at character 13"),
    (b'{"query": "\\x41"}', "malformed JSON: Invalid \\escape: line 1 column 12 (char 11)"),
    (b'{"query": "\\u12"}', "malformed JSON: Invalid \\uXXXX escape at character 13"),
    (b"[" * 100000, "malformed JSON: lists or objects are nested too deep"),
    (b'{"query": ' + b"9" * 5000 + b"}", "malformed JSON: a number has more than 4300 digits"),
    (b'{"query": "\xff"}', "not UTF-8: byte 12 is 0xff"),
    (b'{"query": "\xed\xa0\x80"}', "not UTF-8: byte 12 is 0xed"),
    (b'{"query": "\xe2\x82', "not UTF-8: byte 12 is 0xe2"),
    (b"[1]", "expected a JSON object, got list"),
    (b'"text"', "expected a JSON object, got str"),
    (b"null", "expected a JSON object, got NoneType"),
    (b"7", "expected a JSON object, got int"),
    (b"{}", "no field 'query'"),
    (b'{"query": "q", "positiv": "p"}', "no field 'positive'; did you mean 'positiv'?"),
    (b'{"query": "q", "positive": "p"}', "no field 'negative'; known are positive, query"),
    (line(query=3), "field 'query' is int, expected text"),
    (line(positive=["p"]), "field 'positive' is list, expected text"),
    (line(query=None), f"field 'query' is empty; {DELETE}"),
    (line(query=""), f"field 'query' is empty; {DELETE}"),
    (line(positive=" \n\t"), f"field 'positive' is empty; {DELETE}"),
    (line(positive="\u200b \u0007"), f"field 'positive' holds only control characters; {DELETE}"),
    (line(query="\0q"), "field 'query' has a NUL character at character 1"),
    (line(positive="p\ud800"), "field 'positive' has half a surrogate pair at character 2"),
    (line(negative=[]), f"0 hard negatives, the recipe keeps 1; {MINE}"),
    (line(negative=None), f"0 hard negatives, the recipe keeps 1; {MINE}"),
    (line(negative=[""]), f"field 'negative' is empty; {DELETE}"),
    (line(negative={"text": "n"}), "field 'negative' is dict, expected text"),
]
# The wording of these is Python's own and differs between its versions.
OTHER_WORDS = {
    "malformed JSON: Illegal trailing comma before end of object at character 14": (
        "malformed JSON: Expecting property name enclosed in double quotes at character 16"
    ),
    "malformed JSON: Invalid \\escape: line 1 column 12 (char 11)": "malformed JSON: Invalid \\escape at character 12",
}


def same(got: str, expected: str) -> bool:
    return got in (expected, OTHER_WORDS.get(expected))


def check(tmp_path: Path, make_recipe: MakeRecipe, file: Path, place: str, expected: str) -> Any:
    """Check the row under `fail` and under `skip`; return the quarantined content."""
    source = files_source(file)
    message = refusal(make_recipe([source]))
    assert message.startswith(f"{file}{place}: ")
    assert same(message.removeprefix(f"{file}{place}: "), expected), message
    reader = packed(make_recipe([source], on_bad_row="skip"))
    (summary,) = reader.index.sources
    assert (summary["rows_read"], summary["kept"], sum(summary["dropped"].values())) == (33, 32, 1)
    (aside,) = (reader.folder / "quarantine-small.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(aside)
    assert same(row["reason"], expected)
    assert row["file"] == str(file)
    assert (f":{row['line']}" if "line" in row else f": row {row['row']}") == place
    return row["content"]


@pytest.mark.parametrize(("bad", "expected"), JSON_LINES, ids=range(len(JSON_LINES)))
def test_a_malformed_line_is_refused_or_put_aside(
    tmp_path: Path, make_recipe: MakeRecipe, bad: bytes, expected: str
) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", english_pairs(32)).read_bytes().splitlines(keepends=True)
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b"".join([*rows[:2], b"\n \t\n", bad + b"\n", *rows[2:]]))
    content = check(tmp_path, make_recipe, file, ":5", expected)
    if "malformed" in expected or "UTF-8" in expected:
        assert content == (bad + b"\n").decode(errors="replace")
    else:
        assert content == json.loads(bad)


CELLS: list[tuple[str, bytes, str]] = [
    (".csv", b"q,p", "2 fields, the header has 3"),
    (".csv", b"q,p,n,more", "4 fields, the header has 3"),
    (".csv", b'"q"x,p,n', "malformed CSV: ',' expected after '\"'"),
    (".csv", b"q,\xe9,n", "not UTF-8: a byte is 0xe9"),
    (".csv", b",p,n", f"field 'query' is empty; {DELETE}"),
    (".csv", b"q,p,", f"0 hard negatives, the recipe keeps 1; {MINE}"),
    (".tsv", b"q\tp", "2 fields, the header has 3"),
    (".tsv", b"q\t\tn", f"field 'positive' is empty; {DELETE}"),
    (".tsv", b"q\t\xc3(\tn", "not UTF-8: a byte is 0xc3"),
]


@pytest.mark.parametrize(("suffix", "bad", "expected"), CELLS)
def test_a_malformed_table_row_is_refused_or_put_aside(
    tmp_path: Path, make_recipe: MakeRecipe, suffix: str, bad: bytes, expected: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="," if suffix == ".csv" else "\t", lineterminator="\n")
    writer.writerow(["query", "positive", "negative"])
    writer.writerows([row["query"], row["positive"], row["negative"][0]] for row in english_pairs(32))
    lines = text.getvalue().encode().splitlines(keepends=True)
    file = tmp_path / f"bad{suffix}"
    file.write_bytes(b"".join([*lines[:3], bad + b"\n", *lines[3:]]))
    check(tmp_path, make_recipe, file, ":4", expected)


def test_rows_that_a_quote_has_swallowed_are_not_skipped_silently(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    """Regression: 500 good rows after an unbalanced quote vanished; the run dropped one of 201 rows and succeeded."""
    file = tmp_path / "bad.csv"
    good = [f"query {i} of many,answer {i} of many" for i in range(700)]
    file.write_text("\n".join(["query,positive", *good[:200], 'bad,"unbalanced', *good[200:], ""]))
    source = files_source(file, columns={})
    recipe = make_recipe([source], on_bad_row="skip", text__hard_negatives=0)
    assert refusal(recipe) == (
        f"{file}:202: malformed CSV: unexpected end of data; a quote makes one row of lines 202 to 702: close it, or "
        "double it where it is text"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"query": None}, f"field 'query' is empty; {DELETE}"),
        ({"negative": None}, f"0 hard negatives, the recipe keeps 1; {MINE}"),
        ({"positive": "\u0007"}, f"field 'positive' holds only control characters; {DELETE}"),
    ],
)
def test_a_bad_parquet_row_is_refused_or_put_aside(
    tmp_path: Path, make_recipe: MakeRecipe, changes: dict[str, Any], expected: str
) -> None:
    rows = english_pairs(32)
    file = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist([*rows[:2], GOOD | changes, *rows[2:]]), file)
    assert check(tmp_path, make_recipe, file, ": row 2", expected) == GOOD | changes
