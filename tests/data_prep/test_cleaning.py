"""Invariants: a row that cannot be used is named by file and line, or put aside and counted by reason; equal pairs and
pairs of one text are dropped and counted; a source or file that cannot be used is refused by name.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import english_pairs, write_jsonl
from packs import MakeRecipe, files_source, packed, refusal

from anchor.errors import ConfigError, DataError
from data_prep.packing.pack import pack


def test_no_half_characters_are_lost_on_the_way_to_quarantine(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", english_pairs(16))
    file.write_bytes(file.read_bytes() + b'{"query": "\\ud800", "positive": "p"}\n{"query": "\xff"}\n')
    recipe = make_recipe([files_source(file)], on_bad_row="skip", max_skipped_fraction=0.5)
    reader = packed(recipe)
    assert reader.index.sources[0]["dropped"] == {"field 'query' has half a surrogate pair": 1, "not UTF-8": 1}
    aside = [json.loads(line) for line in (reader.folder / "quarantine-small.jsonl").read_text().splitlines()]
    assert [row["content"] for row in aside] == [{"query": "\ud800", "positive": "p"}, '{"query": "\ufffd"}\n']


def test_equal_pairs_and_queries_that_are_their_positive_are_dropped_and_counted(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    rows = english_pairs(36)
    rows[5] = rows[3] | {"negative": ["another"]}
    rows[9] = rows[3]
    rows[11] = rows[11] | {"positive": rows[11]["query"]}
    rows[12] = rows[12] | {"positive": rows[3]["positive"]}  # one document of two queries stays
    # They are no mistake, so neither stops a run nor counts against the bound.
    (clean,) = packed(make_recipe([files_source(write_jsonl(tmp_path / "a.jsonl", rows))])).index.sources
    reader = packed(
        make_recipe([files_source(tmp_path / "a.jsonl")], on_bad_row="skip", max_skipped_fraction=0.0, batch__pairs=4)
    )
    (summary,) = reader.index.sources
    assert clean["dropped"] == summary["dropped"] == {"equal to an earlier pair": 2, "query equals positive": 1}
    assert (summary["rows_read"], summary["kept"], summary["batches"], summary["remainder_pairs"]) == (36, 33, 8, 1)
    assert not (reader.folder / "quarantine-small.jsonl").exists()
    packs = [one for n in range(len(reader)) for one in reader.read(n).packs]
    seen = {int(i) for one in packs for i in one.pair_ids}
    assert len(seen) == 32
    assert seen.isdisjoint({5, 9, 11})
    # What is counted is what is kept.
    distinct = [row for i, row in enumerate(rows) if i not in (5, 9, 11)]
    (alone,) = packed(make_recipe([files_source(write_jsonl(tmp_path / "b.jsonl", distinct))])).index.sources
    assert [summary[key] for key in ("tokens", "truncated_texts")] == [alone[k] for k in ("tokens", "truncated_texts")]


def test_bad_rows_are_put_aside_and_counted_by_reason(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    rows: list[Any] = english_pairs(32)
    rows[3] = rows[3] | {"query": ""}
    rows[5] = {"query": "q"}
    rows[7] = rows[7] | {"query": "  "}
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    file.write_bytes(file.read_bytes() + b"{broken\n")
    recipe = make_recipe([files_source(file)], on_bad_row="skip")
    with pytest.raises(DataError) as caught:
        pack(str(recipe), ["batch.pairs=4"])
    aside_file = recipe.parent / "shards" / "quarantine-small.jsonl"
    assert str(caught.value) == (
        f"{aside_file}: 4 of 33 rows of source 'small' cannot be used, more than max_skipped_fraction (0.05); mend the "
        "source or raise max_skipped_fraction"
    )
    recipe = make_recipe([files_source(file)], on_bad_row="skip", max_skipped_fraction=4 / 33)
    reader = packed(recipe, "batch.pairs=4")
    (summary,) = reader.index.sources
    assert (summary["rows_read"], summary["kept"]) == (33, 29)
    assert summary["dropped"] == {"field 'query' is empty": 2, "malformed JSON": 1, "no field 'positive'": 1}
    aside = [json.loads(line) for line in (reader.folder / "quarantine-small.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in aside] == [(str(file), line) for line in (4, 6, 8, 33)]
    assert [row["content"] for row in aside] == [rows[3], rows[5], rows[7], "{broken\n"]
    assert aside[0]["reason"] == "field 'query' is empty; remove the row or use on_bad_row: skip"
    rows_packed = {int(i) for n in range(len(reader)) for one in reader.read(n).packs for i in one.pair_ids}
    assert len(rows_packed) == 28
    assert rows_packed.isdisjoint({3, 5, 7, 32})


def test_an_instruction_that_fills_the_segment_is_refused_by_file_and_line(make_recipe: MakeRecipe) -> None:
    rows = write_jsonl(make_recipe().parent / "x.jsonl", english_pairs(16))
    source = files_source(rows, instructions=["river mountain " * 40])
    message = refusal(make_recipe([source]))
    assert message.startswith(f"{rows}:1: the instruction alone takes ")
    assert message.endswith(" tokens; raise text.max_tokens (64)")
    recipe = make_recipe([source], on_bad_row="skip", max_skipped_fraction=1.0)
    assert refusal(recipe) == (
        f"{recipe}: no batch can be made: batch.pairs is 16, pairs left per source are small 0; lower batch.pairs or "
        "add data"
    )


def test_too_few_pairs_are_refused(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    one = files_source(write_jsonl(tmp_path / "a.jsonl", english_pairs(15)), name="a")
    two = files_source(write_jsonl(tmp_path / "b.jsonl", english_pairs(9)), name="b")
    recipe = make_recipe([one, two])
    assert refusal(recipe) == (
        f"{recipe}: no batch can be made: batch.pairs is 16, pairs left per source are a 15, b 9; lower batch.pairs "
        "or add data"
    )


def test_wrong_sources_are_refused(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    write_jsonl(tmp_path / "e5" / "squad.jsonl", english_pairs(16))
    write_jsonl(tmp_path / "e5" / "sqaud.jsonl", english_pairs(16))
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "links" / "a.jsonl", english_pairs(1))
    (tmp_path / "links" / "b.jsonl").symlink_to("gone.jsonl")
    e5 = {"kind": "e5", "path": str(tmp_path / "e5")}
    cases = [
        (
            [e5],
            "sources.0: source 'sqaud' has no instruction in the E5 preset; give sources.N.instructions.sqaud ([] for "
            "none); did you mean 'squad'?",
        ),
        ([e5 | {"only": ["squat"]}], f"sources.0: no source 'squat' in {tmp_path}/e5; did you mean 'squad'?"),
        (
            [e5 | {"only": ["squad"], "symmetric": ["nq"]}],
            f"sources.0: traits for 'nq', which is not in {tmp_path}/e5; known are sqaud, squad",
        ),
        ([files_source(tmp_path / "none")], f"sources.0: {tmp_path}/none: no such file or folder"),
        (
            [files_source(tmp_path / "empty")],
            f"sources.0: {tmp_path}/empty: holds no file ending in .jsonl, .jsonl.gz, .jsonl.zst, .csv, "
            ".csv.gz, .csv.zst, .tsv, .tsv.gz, .tsv.zst, .parquet",
        ),
        (
            [files_source(tmp_path / "links")],
            f"sources.0: {tmp_path}/links/b.jsonl: a folder, or a link to a file that is not there; mend or remove it",
        ),
        (
            [files_source(tmp_path / "e5" / "squad.jsonl")] * 2,
            "two sources are called 'small'; rename one",
        ),
    ]
    for sources, expected in cases:
        recipe = make_recipe(sources)
        assert refusal(recipe, ConfigError) == f"{recipe}: {expected}"


def test_unreadable_files_are_refused(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(b'{"query": "q"}\n' * 100)[:-12])
    assert refusal(make_recipe([files_source(zipped)], on_bad_row="skip")) == (
        f"{zipped}: cannot be read: Truncated compressed stream"
    )
    table = tmp_path / "a.parquet"
    table.write_bytes(b"no parquet at all")
    assert refusal(make_recipe([files_source(table)])).startswith(f"{table}: not a readable Parquet file: ")
