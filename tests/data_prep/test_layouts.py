"""Invariants: the same pairs from every trainer's layout; each positive once, or counted; a row of another layout is
refused by field.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import english_pairs, write_jsonl
from tokenizers import Tokenizer

from anchor.data.shards import ShardReader
from anchor.errors import DataError
from data_prep.inspection.verify import verify
from data_prep.packing.pack import pack

MakeRecipe = Callable[..., Path]
PLAIN = {"query": "q", "positive": "p"}
SKIP = "remove the row or use on_bad_row: skip"
MINE = "lower text.hard_negatives or mine more"
NO_TEXT = "has a passage without text; expected objects with title and text"
FORMATS = ("columns", "sentence_transformers", "flag_embedding", "tevatron")


def in_format(row: dict[str, Any], kind: str, *more: str) -> dict[str, Any]:
    """Return one of `english_pairs` in a trainer's layout, with further positives."""
    query, positive, (first, second) = row["query"], row["positive"], row["negative"]
    if kind == "columns":
        return row
    if kind == "sentence_transformers":
        return {"anchor": query, "negative_10": second, "positive": positive, "negative": None, "negative_2": first}
    if kind == "flag_embedding":
        return {"query": query, "pos": [positive, *more], "neg": [first, second], "pos_scores": [1.0], "prompt": "x"}
    texts = [{"docid": "1", "title": "", "text": positive}, *({"title": "T", "text": text} for text in more)]
    negatives = [{"docid": str(i), "text": text} for i, text in enumerate((first, second))]
    return {"query_id": "7", "query": query, "positive_passages": texts, "negative_passages": negatives}


def source(file: Path, kind: str, **changes: Any) -> dict[str, Any]:
    columns = {"columns": {"negatives": ["negative"]}} if kind == "columns" else {"format": kind}
    return {"kind": "files", "name": "s", "path": str(file), "instructions": []} | columns | changes


def texts_by_pair(recipe: Path) -> tuple[ShardReader, dict[int, list[str]]]:
    pack(str(recipe), [])
    reader = ShardReader(recipe.parent / "shards")
    verify(reader)
    tokenizer = Tokenizer.from_file(str(reader.folder / "tokenizer" / "tokenizer.json"))
    found: dict[int, list[str]] = {}
    for number in range(len(reader)):
        for one in reader.read(number).packs:
            first = 0
            for s, length in enumerate(one.segment_lengths.tolist()):
                body = one.input_ids[first + one.body_starts[s] : first + one.body_ends[s]]
                found.setdefault(int(one.pair_ids[s]), []).append(tokenizer.decode(body.tolist()))
                first += length
    return reader, found


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_layout_gives_the_same_pairs(tmp_path: Path, make_recipe: MakeRecipe, kind: str, suffix: str) -> None:
    rows = english_pairs(32)
    file = tmp_path / f"x{suffix}"
    if suffix == ".jsonl":
        write_jsonl(file, [in_format(row, kind) for row in rows])
    else:
        pq.write_table(pa.Table.from_pylist([in_format(row, kind) for row in rows]), file)
    limits = {"text__hard_negatives": 2, "text__max_tokens": 200, "batch__pack_tokens": 800}
    reader, found = texts_by_pair(make_recipe([source(file, kind)], **limits))
    assert found == {i: [row["query"], row["positive"], *row["negative"]] for i, row in enumerate(rows)}
    assert reader.index.sources[0]["unused_positives"] == 0


@pytest.mark.parametrize("kind", ["flag_embedding", "tevatron"])
def test_further_positives_are_counted_or_become_pairs_of_their_own(
    tmp_path: Path, make_recipe: MakeRecipe, kind: str
) -> None:
    rows = [in_format(row, kind, f"more {i}", f"most {i}") for i, row in enumerate(english_pairs(16))]
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    limits = {"text__max_tokens": 200, "batch__pack_tokens": 800}
    first, found = texts_by_pair(make_recipe([source(file, kind)], **limits))
    assert [first.index.sources[0][key] for key in ("rows_read", "kept", "unused_positives")] == [16, 16, 32]
    assert sorted(found) == list(range(16))
    each, found = texts_by_pair(make_recipe([source(file, kind, positives="each")], **limits))
    assert [each.index.sources[0][key] for key in ("rows_read", "kept", "unused_positives")] == [48, 48, 0]
    title = "T " if kind == "tevatron" else ""
    assert [found[i][1] for i in (4, 5)] == [f"{title}more 1", f"{title}most 1"]
    assert found[3][0] == found[4][0] == found[5][0]


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("sentence_transformers", PLAIN, "no field 'anchor'; known are negative, positive, query"),
        ("sentence_transformers", {"anchor": "q", "positive": "p"}, f"0 hard negatives, the recipe keeps 1; {MINE}"),
        ("sentence_transformers", [1], "expected a JSON object, got list"),
        ("flag_embedding", PLAIN, "no field 'pos'; known are positive, query"),
        ("flag_embedding", {"query": "q", "pos": "p"}, "field 'pos' is str, expected a list"),
        ("flag_embedding", {"query": "q", "pos": []}, f"field 'pos' is empty; {SKIP}"),
        ("flag_embedding", {"query": "q", "pos": [3], "neg": []}, "field 'pos' is int, expected text"),
        ("flag_embedding", {"qery": "q", "pos": ["p"]}, "no field 'query'; did you mean 'qery'?"),
        ("flag_embedding", {"query": "q", "pos": ["p"]}, "no field 'neg'; known are pos, query"),
        ("tevatron", {"query": "q", "positive_passages": []}, f"field 'positive_passages' is empty; {SKIP}"),
        ("tevatron", {"query": "q", "positive_passages": ["p"]}, f"field 'positive_passages' {NO_TEXT}"),
        ("tevatron", {"query": "q", "positive_passages": [{"title": "t"}]}, f"field 'positive_passages' {NO_TEXT}"),
        ("tevatron", {"query": "q", "positive_passages": [{"text": "\0"}]},
         "field 'positive_passages' has a NUL character at character 1"),
        ("tevatron", {"query": "q", "positive_passages": [{"text": "p"}], "negative_passages": {}},
         "field 'negative_passages' is dict, expected a list"),
    ],
)  # fmt: skip
def test_a_row_of_another_layout_is_refused_by_field(
    tmp_path: Path, make_recipe: MakeRecipe, kind: str, row: Any, expected: str
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [in_format(english_pairs(1)[0], kind), row])
    with pytest.raises(DataError) as caught:
        pack(str(make_recipe([source(file, kind)])), [])
    assert str(caught.value) == f"{file}:2: {expected}"
