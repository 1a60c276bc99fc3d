"""Invariants: every kind of source ends in the same shards, which hold every kept pair once with its texts; equal
recipes give equal bytes, for any number of worker processes.
"""

import gzip
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import english_pairs, write_jsonl
from packs import MakeRecipe, contents, files_source, folder_bytes, packed, refusal

import data_prep.packing.shard_files as writing_module
import data_prep.packing.workers as workers_module
import data_prep.sources.units as units_module
from anchor.data.shards import ShardReader
from anchor.data.tokenizer_files import tokenizer_fingerprint
from anchor.errors import ConfigError, DataError
from data_prep.__main__ import main
from data_prep.options import parse
from data_prep.packing.pack import pack
from data_prep.sources.e5 import E5_TRAITS


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


def test_a_dataset_that_breaks_off_is_one_line(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    file = write_jsonl(tmp_path / "plain" / "a.jsonl", english_pairs(3))
    file.write_text(file.read_text() + '{"query": \n')
    hub = {"kind": "hub", "dataset": str(tmp_path / "plain"), "split": "train", "name": "s"}
    recipe = make_recipe([hub | {"columns": {"negatives": ["negative"]}, "instructions": []}])
    assert refusal(recipe).startswith(f"dataset {tmp_path / 'plain'}: row 0 of split train cannot be read: ")


def test_a_dataset_whose_files_have_other_types_is_one_line(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    write_jsonl(tmp_path / "plain" / "a.jsonl", [english_pairs(1)[0] | {"more": 1}])
    write_jsonl(tmp_path / "plain" / "b.jsonl", [english_pairs(1)[0] | {"more": {"list": [1]}}])
    hub = {"kind": "hub", "dataset": str(tmp_path / "plain"), "split": "train", "name": "s"}
    recipe = make_recipe([hub | {"columns": {"negatives": ["negative"]}, "instructions": []}])
    assert refusal(recipe) == (
        f"dataset {tmp_path / 'plain'}: row 1 of split train cannot be read: a column differs in type between files: "
        "Couldn't cast array of type struct<list: list<item: int64>> to int64; read it with kind: files, path: "
        f"{tmp_path / 'plain'}, which takes rows of any columns"
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [({"extra": 1}, "has column 'extra' that"), ({"a": 1, "b": 2}, "has columns 'a', 'b' that")],
)
def test_columns_that_differ_between_files_of_a_dataset_are_named(
    tmp_path: Path, make_recipe: MakeRecipe, more: dict[str, int], said: str
) -> None:
    """Regression: the error said only "Couldn't cast"."""
    rows = english_pairs(16)
    write_jsonl(tmp_path / "plain" / "a.jsonl", rows[:4])
    write_jsonl(tmp_path / "plain" / "b.jsonl", [row | more for row in rows[4:]])
    hub = {"kind": "hub", "dataset": str(tmp_path / "plain"), "split": "train", "name": "s"}
    recipe = make_recipe([hub | {"columns": {"negatives": ["negative"]}, "instructions": []}])
    assert refusal(recipe) == (
        f"dataset {tmp_path / 'plain'}: row 4 of split train cannot be read: a file {said} the first file lacks; read "
        f"it with kind: files, path: {tmp_path / 'plain'}, which takes rows of any columns"
    )
    assert packed(make_recipe([files_source(tmp_path / "plain")])).index.sources[0]["kept"] == 16


def test_a_dataset_with_a_file_cut_to_nothing_is_refused(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    """The `datasets` library reads it as a file without rows."""
    write_jsonl(tmp_path / "plain" / "a.jsonl", english_pairs(8))
    (tmp_path / "plain" / "b.jsonl.gz").touch()
    hub = {"kind": "hub", "dataset": str(tmp_path / "plain"), "split": "train", "name": "s"}
    recipe = make_recipe([hub | {"columns": {"negatives": ["negative"]}, "instructions": []}])
    assert refusal(recipe).startswith(f"{tmp_path / 'plain' / 'b.jsonl.gz'}: 0 bytes, cut off")


def test_a_local_dataset_has_no_revision(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    write_jsonl(tmp_path / "plain" / "a.jsonl", english_pairs(3))
    hub = {"kind": "hub", "dataset": str(tmp_path / "plain"), "split": "train", "name": "s", "revision": "main"}
    recipe = make_recipe([hub | {"columns": {"negatives": ["negative"]}, "instructions": []}])
    assert refusal(recipe, ConfigError) == (
        f"{recipe}: sources.0: {tmp_path / 'plain'} is a local folder, which has no revision; remove it"
    )


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
    section |= {"weights": {"own": 2.0}, "languages": {"own": ["de"]}}
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
    others = {source["name"]: (source["weight"], source["languages"]) for source in reader.index.sources}
    assert (others["own"], others["squad"]) == ((2.0, ["de"]), (1.0, ["en"]))
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
    only = packed(make_recipe([{"kind": "e5", "path": str(tmp_path), "only": ["squad"]}]))
    assert [source["name"] for source in only.index.sources] == ["squad"]


def test_documents_of_symmetric_sources_are_bare_where_the_recipe_says_so(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    write_jsonl(tmp_path / "allnli.jsonl", [row | {"negative": row["negative"][0]} for row in english_pairs(20)])
    starts: dict[str, dict[int, set[int]]] = {}
    for way in ("instruction", "bare"):
        source = {"kind": "e5", "path": str(tmp_path), "symmetric_documents": way}
        reader = packed(make_recipe([source], text__max_tokens=120))
        assert [one["symmetric"] for one in reader.index.sources] == [way == "instruction"]
        packs = [one for number in range(len(reader)) for one in reader.read(number).packs]
        starts[way] = {role: {int(s) for p in packs for s in p.body_starts[p.roles == role]} for role in (0, 1, 2)}
    assert starts["instruction"][0] == starts["bare"][0] == starts["instruction"][1] == starts["instruction"][2]
    assert starts["bare"][1] == starts["bare"][2]
    assert max(starts["bare"][1]) < min(starts["bare"][0])


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


def test_long_texts_are_cut_and_counted(make_recipe: MakeRecipe) -> None:
    reader = packed(make_recipe(text__max_tokens=24))
    (summary,) = reader.index.sources
    lengths = np.concatenate([one.segment_lengths for n in range(4) for one in reader.read(n).packs])
    assert lengths.max() == 24
    # Uncut texts can have 24 tokens as well, so the longest are at least the cut ones.
    assert 0 < summary["truncated_texts"] <= (lengths == 24).sum() < len(lengths)
    assert packed(make_recipe(text__max_tokens=250, batch__pack_tokens=1000)).index.sources[0]["truncated_texts"] == 0


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
    monkeypatch.setattr(units_module, "UNIT_ROWS", 7)
    monkeypatch.setattr(writing_module, "BATCHES_PER_SHARD", 4)
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
    monkeypatch.setattr(workers_module, "_run", _die)
    with pytest.raises(DataError) as caught:
        pack(str(make_recipe()), [], 2)
    assert str(caught.value) == (
        "--workers 2: a process was killed, perhaps for want of memory; lower --workers and run again"
    )


def test_texts_longer_than_the_positions_of_the_tokenizers_model_are_refused(
    make_recipe: MakeRecipe, tiny_model_dir: Path
) -> None:
    recipe = make_recipe(tokenizer=str(tiny_model_dir), text__max_tokens=257, batch__pack_tokens=1024)
    with pytest.raises(DataError) as caught:
        pack(str(recipe), [])
    assert str(caught.value) == (
        f"{recipe}: text.max_tokens is 257, but {tiny_model_dir} has 256 positions (max_position_embeddings); give "
        "texts at most 256 tokens"
    )
    assert not (recipe.parent / "shards").exists()


def _die(*_: Any) -> None:
    os._exit(9)


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


@pytest.mark.parametrize("command", ["pack", "merge"])
def test_overrides_may_stand_anywhere(command: str) -> None:
    """Regression: overrides after an option were "unrecognized arguments"."""
    for arguments in (
        ["R", "a.b=1", "c=2", "--workers", "3"],
        ["R", "a.b=1", "--workers", "3", "c=2"],
        ["R", "--workers", "3", "a.b=1", "c=2"],
        ["--workers", "3", "R", "a.b=1", "c=2"],
    ):
        found = parse([command, *arguments])
        assert (found.recipe, found.overrides, found.workers) == ("R", ["a.b=1", "c=2"], 3)


COMMANDS = ("pack", "merge", "inspect", "docs", "decontaminate", "mine", "respond", "teach")


def test_every_command_is_known_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert tuple(re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([name, "--help"] for name in COMMANDS)],
)
def test_every_help_fits_a_screen_and_shows_an_example(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert len(lines) <= 24
    assert any(line.startswith("example: python -m data_prep ") for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["pak"],
        ["inspect", "x", "--show", "many"],
        ["docs", "--output"],
        ["pack", "x", "--part", "4/4"],
        ["pack", "x", "--part", "1"],
        ["merge"],
        ["pack", "x", "--worker", "1", "--parts", "0/2"],
        ["inspect", "x", "--verify", "y"],
    ],
)
def test_a_wrong_command_line_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
