"""Invariants: a row is checked once, at the boundary; what cannot be used is named by file, line and field."""

from typing import Any

import pytest

from anchor.config.pack_recipe import Columns
from anchor.data.records import Pair, pair_from_row
from anchor.errors import DataError

ROW = {"query": "q", "positive": "p", "negative": ["n0", "n1"], "other": "n2"}


def make(row: Any, number: int = 0, hard_negatives: int = 2, negatives: tuple[str, ...] = ("negative",)) -> Pair:
    return pair_from_row(
        row,
        where="f.jsonl:7",
        number=number,
        source="s",
        columns=Columns(negatives=negatives),
        instructions=("first", "second"),
        symmetric=False,
        hard_negatives=hard_negatives,
    )


def test_a_row_becomes_a_pair() -> None:
    assert make(ROW) == Pair("q", "p", ("n0", "n1"), "first", "s", 0, False)
    assert make(ROW).texts() == ("q", "p", "n0", "n1")


def test_instructions_alternate_by_row() -> None:
    assert [make(ROW, number).instruction for number in range(4)] == ["first", "second", "first", "second"]


def test_negatives_come_from_several_columns_in_order_and_only_as_many_as_asked() -> None:
    assert make(ROW, hard_negatives=3, negatives=("other", "negative")).hard_negatives == ("n2", "n0", "n1")
    assert make(ROW, hard_negatives=1).hard_negatives == ("n0",)
    # A table's rows with fewer negatives have nulls.
    assert make(ROW | {"other": None}, negatives=("other", "negative")).hard_negatives == ("n0", "n1")
    # Nothing is asked of negatives that are not kept.
    assert make({"query": "q", "positive": "p"}, hard_negatives=0).hard_negatives == ()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (["q", "p"], "f.jsonl:7: expected a JSON object, got list"),
        ({"quer": "q", "positive": "p"}, "f.jsonl:7: no field 'query'; did you mean 'quer'?"),
        ({"query": 3}, "f.jsonl:7: field 'query' is int, expected text"),
        ({"query": " \n"}, "f.jsonl:7: field 'query' is empty; remove the row or use on_bad_row: skip"),
        (ROW | {"positive": None}, "f.jsonl:7: field 'positive' is empty; remove the row or use on_bad_row: skip"),
        (ROW | {"query": "a\0"}, "f.jsonl:7: field 'query' has a NUL character at character 2"),
        (
            ROW | {"positive": "\u200e\x07\u00a0"},
            "f.jsonl:7: field 'positive' holds only control characters; remove the row or use on_bad_row: skip",
        ),
        (ROW | {"query": "a\ud800b"}, "f.jsonl:7: field 'query' has half a surrogate pair at character 2"),
        (ROW | {"negative": ["n", ""]}, "f.jsonl:7: field 'negative' is empty; remove the row or use on_bad_row: skip"),
        (
            ROW | {"negative": "n"},
            "f.jsonl:7: 1 hard negatives, the recipe keeps 2; lower text.hard_negatives or mine more",
        ),
    ],
)
def test_unusable_rows_are_refused(row: Any, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        make(row)
    assert str(caught.value) == expected


@pytest.mark.parametrize("text", ["👍🏽", "e\u0301", "שלום\u200f", "漢", "\u0378"])
def test_visible_texts_in_any_script_are_taken(text: str) -> None:
    assert make(ROW | {"query": text}).query == text
