"""Invariants: every kind of source ends in the same shards; a bad row is named by file and line, or counted and put
aside; equal recipes give equal bytes, also after an interruption; a folder of another recipe is left alone.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import english_pairs, write_jsonl

import data_prep.checking as checking_module
import data_prep.pack as pack_module
import data_prep.reading as reading_module
from anchor.data.shards import Batch, ShardReader
from anchor.data.tokenization import tokenizer_fingerprint
from anchor.errors import AnchorError, ConfigError, DataError
from data_prep.__main__ import main
from data_prep.e5 import E5_TRAITS
from data_prep.inspect import verify
from data_prep.pack import pack

MakeRecipe = Callable[..., Path]


def files_source(path: Path, **changes: Any) -> dict[str, Any]:
    source = {"kind": "files", "name": "small", "path": str(path), "columns": {"negatives": ["negative"]}}
    return source | {"instructions": []} | changes


def packed(recipe: Path, *overrides: str) -> ShardReader:
    pack(str(recipe), list(overrides))
    reader = ShardReader(recipe.parent / "shards")
    verify(reader)
    return reader


def contents(reader: ShardReader) -> list[tuple[Any, ...]]:
    """Everything in the shards, in order."""
    batches: list[Batch] = [reader.read(i) for i in range(len(reader))]
    return [
        (batch.source, pack.input_ids.tolist(), pack.pair_ids.tolist(), pack.text_ids.tolist(), pack.roles.tolist())
        for batch in batches
        for pack in batch.packs
    ]


def refusal(recipe: Path, kind: type[AnchorError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        pack(str(recipe), [])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_kind_of_source_gives_the_same_shards(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    rows = english_pairs(40)
    write_jsonl(tmp_path / "plain" / "a.jsonl", rows)
    (tmp_path / "zipped").mkdir()
    with gzip.open(tmp_path / "zipped" / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "parquet").mkdir()
    for part in range(2):  # a folder's files are read in the order of their names
        pq.write_table(pa.Table.from_pylist(rows[part * 20 : part * 20 + 20]), tmp_path / "parquet" / f"{part}.parquet")
    columns = {"negatives": ["negative"]}
    hub = {"kind": "hub", "dataset": str(tmp_path / "plain"), "split": "train"}
    sources = [
        files_source(tmp_path / "plain" / "a.jsonl", name="s"),
        files_source(tmp_path / "zipped", name="s"),
        files_source(tmp_path / "parquet", name="s"),
        hub | {"name": "s", "columns": columns, "instructions": []},
    ]
    read = [contents(packed(make_recipe([source]))) for source in sources]
    assert len(read[0]) == 8
    assert all(other == read[0] for other in read[1:])


def test_the_shards_hold_every_kept_pair_once_with_its_texts(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(num_rows=70)
    reader = packed(recipe)
    (summary,) = reader.index.sources
    assert {key: summary[key] for key in ("rows_read", "kept", "batches", "remainder_pairs", "dropped")} == {
        "rows_read": 70,
        "kept": 70,
        "batches": 4,
        "remainder_pairs": 6,
        "dropped": {},
    }
    rows = english_pairs(70)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(reader.folder / "tokenizer" / "tokenizer.json"))
    seen = 0
    for number in range(len(reader)):
        for one in reader.read(number).packs:
            ends = np.cumsum(one.segment_lengths)
            for s, (role, row) in enumerate(zip(one.roles.tolist(), one.pair_ids.tolist(), strict=True)):
                segment = one.input_ids[ends[s] - one.segment_lengths[s] : ends[s]]
                body = segment[one.body_starts[s] : one.body_ends[s]].tolist()
                # A token may span the seam of instruction and text, here the space between them.
                text = tokenizer.decode(body, skip_special_tokens=False).removeprefix(" " if role == 0 else "")
                expected = (rows[row]["query"], rows[row]["positive"], *rows[row]["negative"])[role]
                assert text == expected if len(segment) < 64 else expected.startswith(text)
                seen += 1
    assert seen == 64 * 3
    assert tokenizer_fingerprint(reader.folder / "tokenizer") == reader.index.tokenizer_sha256
    assert reader.index.prompts == {"query": "Answer it: ", "document": ""}
    assert not (reader.folder / "work").exists()


def test_e5_folders_bring_their_own_instructions_and_split_files(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    names = ("allnli_split1", "allnli_split2", "quora_duplicates", "squad", "own")
    for i, name in enumerate(names):
        rows = [row | {"negative": row["negative"][0]} for row in english_pairs(20, seed=i)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    section = {"kind": "e5", "path": str(tmp_path), "instructions": {"own": []}}
    reader = packed(make_recipe([section], text__max_tokens=120, prompts={"STS": "Alike"}))
    traits = {source["name"]: (source["instructions"], source["symmetric"]) for source in reader.index.sources}
    nli = E5_TRAITS["allnli"].instructions
    assert traits == {
        "allnli_split1": ([nli[0]], True),
        "allnli_split2": ([nli[1]], True),
        "own": ([], False),
        "quora_duplicates": (list(E5_TRAITS["quora_duplicates"].instructions), True),
        "squad": (["Retrieve Wikipedia passages that answer the question"], False),
    }
    assert reader.index.prompts["STS"] == "Alike: "
    # Symmetric sources carry the instruction on both sides, so their positives' bodies begin later.
    starts: dict[str, set[int]] = {}
    for number in range(len(reader)):
        batch = reader.read(number)
        for one in batch.packs:
            starts.setdefault(batch.source, set()).update(one.body_starts[one.roles == 1].tolist())
    prefix = min(starts["squad"])
    assert starts["squad"] == starts["own"] == {prefix}
    assert min(starts["allnli_split1"]) > prefix
    assert len(starts["quora_duplicates"]) == 2  # two instructions alternate by row
    only = packed(make_recipe([section | {"only": ["squad"], "instructions": {}}]))
    assert [source["name"] for source in only.index.sources] == ["squad"]


def test_the_e5_preset_knows_the_public_portion() -> None:
    public = {
        *("allnli", "dureader", "eli5_question_answer", "fever", "hotpot_qa", "miracl", "mrtydi", "msmarco_passage"),
        *("msmarco_document", "nq", "quora_duplicates", "squad", "t2ranking", "trivia_qa"),
    }
    assert public <= set(E5_TRAITS)
    assert {name for name, traits in E5_TRAITS.items() if traits.symmetric} == {
        *("allnli", "allnli_split1", "allnli_split2"),
        *("quora_duplicates", "quora_duplicates_split1", "quora_duplicates_split2"),
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"query": "q",', "3: malformed JSON: Illegal trailing comma before end of object at character 14"),
        (b'{"query": "\xff"}', "3: not UTF-8: byte 12 is 0xff"),
        (b"[1]", "3: expected a JSON object, got list"),
        (b"\n \t\n{", "5: malformed JSON: Expecting property name enclosed in double quotes at character 3"),
        (b"[" * 100000, "3: malformed JSON: maximum recursion depth exceeded"),
        (
            b'{"query": ' + b"9" * 5000 + b"}",
            "3: malformed JSON: Exceeds the limit (4300 digits) for integer string conversion",
        ),
        (b'{"query": "q\x00"}', "3: malformed JSON: Invalid control character at character 13"),
        (b'{"query": "\\u0000q", "positive": "p"}', "3: field 'query' has a NUL character at character 1"),
        (
            b'{"query": "q", "positive": "\\u200b \\u0007"}',
            "3: field 'positive' holds only control characters; remove the row or use on_bad_row: skip",
        ),
        (b'{"query": "q", "positiv": "p"}', "3: no field 'positive'; did you mean 'positiv'?"),
        (b'{"query": " ", "positive": "p"}', "3: field 'query' is empty; remove the row or use on_bad_row: skip"),
        (b'{"query": "q", "positive": "\\ud800"}', "3: field 'positive' has half a surrogate pair at character 1"),
        (
            b'{"query": "q", "positive": "p", "negative": []}',
            "3: 0 hard negatives, the recipe keeps 1; lower text.hard_negatives or mine more",
        ),
    ],
)
def test_a_bad_row_stops_with_file_and_line(
    tmp_path: Path, make_recipe: MakeRecipe, line: bytes, expected: str
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", english_pairs(2))
    file.write_bytes(file.read_bytes() + line + b"\n")
    got = refusal(make_recipe([files_source(file)]))
    # The wording of a JSON error is Python's own and differs between its versions.
    got = got.split(" while decoding")[0].replace(": value has 5000 digits", "")
    got = got.replace(
        "Expecting property name enclosed in double quotes at character 16",
        "Illegal trailing comma before end of object at character 14",
    )
    assert got == f"{file}:{expected}"


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


def test_only_the_first_rows_are_read(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    write_jsonl(tmp_path / "e5" / "squad.jsonl", [*english_pairs(20), "not reached"])
    for source in (
        {"kind": "e5", "path": str(tmp_path / "e5"), "max_rows": 17},
        files_source(tmp_path / "e5", max_rows=17),
        files_source(tmp_path / "e5", max_rows=17) | {"kind": "hub", "dataset": str(tmp_path / "e5"), "split": "train"},
    ):
        if source["kind"] == "hub":
            del source["path"]
            write_jsonl(tmp_path / "e5" / "squad.jsonl", english_pairs(20))  # `datasets` reads ahead
        reader = packed(make_recipe([source]))
        assert reader.index.sources[0]["rows_read"] == 17
        assert max(one.pair_ids.max() for one in reader.read(0).packs) <= 16


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


def test_long_texts_are_cut_and_counted(make_recipe: MakeRecipe) -> None:
    reader = packed(make_recipe(text__max_tokens=24))
    (summary,) = reader.index.sources
    lengths = np.concatenate([one.segment_lengths for n in range(4) for one in reader.read(n).packs])
    assert lengths.max() == 24
    # Uncut texts can have 24 tokens as well, so the longest are at least the cut ones.
    assert 0 < summary["truncated_texts"] <= (lengths == 24).sum() < len(lengths)
    assert packed(make_recipe(text__max_tokens=250, batch__pack_tokens=1000)).index.sources[0]["truncated_texts"] == 0


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


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_equal_recipes_give_equal_bytes(make_recipe: MakeRecipe) -> None:
    first, second = make_recipe(), make_recipe()
    # The same input file, and a folder of another name.
    second.write_text(first.read_text().replace(str(first.parent / "shards"), str(second.parent / "shards")))
    one, two = packed(first), packed(second)
    a, b = folder_bytes(one.folder), folder_bytes(two.folder)
    assert len(a) >= 4
    index_a, index_b = json.loads(a.pop("index.json")), json.loads(b.pop("index.json"))
    assert a == b
    assert index_a["recipe"].pop("output_dir") != index_b["recipe"].pop("output_dir")
    assert index_a == index_b
    assert contents(packed(make_recipe(seed=1))) != contents(one)


def test_the_number_of_workers_changes_no_byte(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_module, "CHUNK_ROWS", 7)
    rows: list[Any] = english_pairs(120)
    rows[3]["query"] += " <|im_end|> is text"  # a tokenizer that was sent to another process forgot this once
    rows[10] = rows[40] = {"query": "q"}
    rows[41] = rows[42] | {"positive": rows[42]["query"]}
    rows[77] = rows[5]
    sources = [files_source(write_jsonl(tmp_path / f"{n}.jsonl", rows), name=n, instructions=["I"]) for n in "ab"]
    recipe = make_recipe(sources, on_bad_row="skip")
    folder = recipe.parent / "shards"
    found = []
    for workers in (1, 2, 5):
        pack(str(recipe), [], workers)
        found.append(folder_bytes(folder))
        shutil.rmtree(folder)
    assert {"quarantine-a.jsonl", "quarantine-b.jsonl", "00000.arrow", "index.json"} <= set(found[0])
    assert found[0] == found[1] == found[2]
    # The first bad row is named, not the one that a worker met first; and rows before an unreadable end come first.
    (tmp_path / "z.jsonl.gz").write_bytes(b"plain")
    good = write_jsonl(tmp_path / "good" / "a.jsonl", english_pairs(9))
    (good.parent / "z.jsonl.gz").write_bytes(b"plain")
    for source, expected in (
        (sources[0] | {"path": str(tmp_path)}, f"{tmp_path}/a.jsonl:11: no field 'positive'"),
        (sources[0] | {"path": str(good.parent)}, f"{good.parent}/z.jsonl.gz: cannot be read: "),
    ):
        for workers in (1, 2):
            with pytest.raises(DataError) as caught:
                pack(str(make_recipe([source])), [], workers)
            assert str(caught.value).startswith(expected)


def test_a_worker_that_is_killed_is_reported(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking_module, "_in_worker", _die)
    with pytest.raises(DataError) as caught:
        pack(str(make_recipe()), [], 2)
    assert str(caught.value) == (
        "--workers 2: a process was killed, perhaps for want of memory; lower --workers and run again"
    )


def _die(*_: Any) -> None:
    os._exit(9)


def test_an_interrupted_run_is_continued(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [
        files_source(write_jsonl(tmp_path / f"{name}.jsonl", english_pairs(32, seed=i)), name=name)
        for i, name in enumerate(("a", "b"))
    ]
    recipe = make_recipe(sources)
    expected = folder_bytes(packed(recipe).folder)
    check_rows = checking_module.check_rows
    for stop_at in ("b", "write"):
        folder = recipe.parent / "shards"
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        read: list[str] = []

        def check_some(check: Any, *rest: Any, stop_at: str = stop_at, read: list[str] = read) -> Any:
            name = check.source
            if name == stop_at and name not in read:
                read.append(name)
                raise KeyboardInterrupt
            read.append(name)
            return check_rows(check, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(checking_module, "check_rows", check_some)
            if stop_at == "write":
                patch.setattr(pack_module, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pack(str(recipe), [])
        assert read == ["a", "b"]
        assert not (folder / "index.json").exists()
        # What was finished is not read again.
        (tmp_path / "a.jsonl").rename(tmp_path / "moved")
        (tmp_path / "a.jsonl").touch()
        assert folder_bytes(packed(recipe).folder) == expected
        (tmp_path / "moved").rename(tmp_path / "a.jsonl")


def test_a_finished_folder_is_left_alone(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe()
    folder = packed(recipe).folder
    before = folder_bytes(folder)
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "load_tokenizer", lambda *_: pytest.fail("packed again"))
        assert pack(str(recipe), []).num_batches == 4
    assert folder_bytes(folder) == before
    assert refusal(make_recipe(output_dir=str(folder))) == (
        f"{folder}: already holds shards of another recipe; choose another output_dir or delete it"
    )
    # A deleted file comes back, as the messages about altered files promise.
    (folder / "00000.arrow").unlink()
    caplog.clear()
    assert folder_bytes(packed(recipe).folder) == before
    assert f"{folder}: 00000.arrow missing or of another size; packing again" in caplog.messages


def test_other_folders_are_left_alone(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert refusal(make_recipe(output_dir=str(tmp_path / "full"))) == (
        f"{tmp_path}/full: not empty and not an unfinished run; choose another output_dir or delete it"
    )
    bad = make_recipe([files_source(write_jsonl(tmp_path / "x.jsonl", [{}]))])
    refusal(bad)
    assert (bad.parent / "shards" / "work").is_dir()
    assert refusal(make_recipe(output_dir=str(bad.parent / "shards"))) == (
        f"{bad.parent}/shards: holds an unfinished run of another recipe; delete it or choose another output_dir"
    )
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_the_command_line_packs_with_overrides_and_exits_2_on_a_users_error(
    make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe()
    main(["pack", str(recipe), "batch.pairs=32"])
    assert len(ShardReader(recipe.parent / "shards")) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["pack", str(recipe), "batch.pears=32"])
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"error: {recipe}: unknown key batch.pears; did you mean 'pairs'?\n")


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("pack", "inspect", "docs", "decontaminate"))]
)
def test_every_help_fits_a_screen_and_shows_an_example(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert len(lines) <= 24
    assert any(line.startswith("example: python -m data_prep ") for line in lines)


@pytest.mark.parametrize("arguments", [[], ["pak"], ["inspect", "x", "--show", "many"], ["docs", "--output"]])
def test_a_wrong_command_line_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
