"""Invariants: a run that is interrupted anywhere continues and ends in the same bytes, without doing finished work
again; a finished folder, and a folder of anything else or of another process, is left alone.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import english_pairs, write_jsonl
from packs import MakeRecipe, files_source, folder_bytes, packed, refusal

import data_prep.packing.pack as pack_module
import data_prep.packing.parts as reading_module
import data_prep.packing.shard_files as writing_module
import data_prep.sources.units as units_module
from anchor.data.shards import ShardWriter
from anchor.errors import DataError
from data_prep.packing.pack import merge, pack
from data_prep.packing.spool import Entry, PartWriter, read_journal
from data_prep.packing.tokenise import Checked


def emptied(folder: Path) -> None:
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()


@pytest.mark.parametrize(("workers", "stops"), [(1, (("a", 2), ("b", 1), "00002.arrow")), (2, (("b", 1),))])
def test_an_interrupted_run_is_continued_inside_a_source(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, workers: int, stops: tuple[Any, ...]
) -> None:
    monkeypatch.setattr(units_module, "UNIT_ROWS", 8)
    monkeypatch.setattr(writing_module, "BATCHES_PER_SHARD", 1)
    sources = [
        files_source(write_jsonl(tmp_path / f"{name}.jsonl", english_pairs(32, seed=i)), name=name)
        for i, name in enumerate(("a", "b"))
    ]
    recipe = make_recipe(sources)
    folder = recipe.parent / "shards"
    expected = folder_bytes(packed(recipe).folder)
    for stop_at in stops:
        emptied(folder)
        add, write = PartWriter.add, ShardWriter.close

        def add_some(self: PartWriter, unit: Checked, stop_at: Any = stop_at, add: Any = add) -> None:
            if (unit.source, unit.number) == stop_at:
                raise KeyboardInterrupt
            add(self, unit)

        def write_some(self: ShardWriter, stop_at: Any = stop_at, write: Any = write) -> None:
            if self._path.name == stop_at:
                raise KeyboardInterrupt
            write(self)

        with monkeypatch.context() as patch:
            patch.setattr(PartWriter, "add", add_some)
            patch.setattr(ShardWriter, "close", write_some)
            with pytest.raises(KeyboardInterrupt):
                pack(str(recipe), [])
        assert not (folder / "index.json").exists()
        there = [(entry.source, entry.number) for entry in read_journal(folder / "work" / "part-00000-of-00001")]
        everything = [(name, number) for name in "ab" for number in range(4)]
        assert there == everything[: everything.index(stop_at) if stop_at in everything else None]
        shard = folder / "00001.arrow"
        before = shard.stat().st_mtime_ns if shard.exists() else None
        done: list[tuple[str, int]] = []

        def add_all(self: PartWriter, unit: Checked, done: list[tuple[str, int]] = done, add: Any = add) -> None:
            done.append((unit.source, unit.number))
            add(self, unit)

        with monkeypatch.context() as patch:
            patch.setattr(PartWriter, "add", add_all)
            pack(str(recipe), [], workers)
        # What was finished is not done again.
        assert done == everything[len(there) :]
        assert before in (None, shard.stat().st_mtime_ns)
        assert folder_bytes(folder) == expected


def test_what_an_interruption_left_beyond_the_journal_is_cut_off(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units_module, "UNIT_ROWS", 8)
    recipe = make_recipe()
    folder = recipe.parent / "shards"
    expected = folder_bytes(packed(recipe).folder)
    emptied(folder)
    pack(str(recipe), [], part=(0, 1))
    part = folder / "work" / "part-00000-of-00001"
    (part / "done.json").unlink()
    journal = (part / "units.jsonl").read_bytes().splitlines(keepends=True)
    (part / "units.jsonl").write_bytes(b"".join(journal[:5]) + journal[5][:20])
    assert len(journal) == 8
    packed(recipe)
    assert folder_bytes(folder) == expected
    # So are units whose data the disk has not kept.
    for name, damage in (("tokens.bin", 3000), ("pairs.bin", 100), ("quarantine.jsonl", 0)):
        emptied(folder)
        pack(str(recipe), [], part=(0, 1))
        (part / "done.json").unlink()
        data = bytearray((part / name).read_bytes())
        if data:
            data[damage] ^= 1
        (part / name).write_bytes(data)
        packed(recipe)
        assert folder_bytes(folder) == expected


BUSY = "another process is packing it; wait for it or choose another output_dir"


@pytest.mark.parametrize("step", ["read_part", "make_shards"])
def test_a_folder_that_another_process_packs_is_refused_and_left_alone(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Regression: two runs appended their units to one spool; both failed, and so did every later run."""
    recipe = make_recipe()
    folder = recipe.parent / "shards"
    expected = folder_bytes(packed(recipe).folder)
    shutil.rmtree(folder)
    work, refused = getattr(pack_module, step), []

    def and_another(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(pack_module, step, work)
        refused.append(refusal(recipe))
        return work(*arguments, **named)

    monkeypatch.setattr(pack_module, step, and_another)
    pack(str(recipe), [])
    assert refused == [f"{folder}: {BUSY}"]
    assert folder_bytes(folder) == expected


def test_other_parts_may_be_packed_meanwhile_but_one_process_merges(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    folder = recipe.parent / "shards"
    expected = folder_bytes(packed(recipe).folder)
    shutil.rmtree(folder)
    read, make, refused = pack_module.read_part, pack_module.make_shards, []

    def and_the_other_part(*arguments: Any, **named: Any) -> None:
        monkeypatch.setattr(pack_module, "read_part", read)
        pack(str(recipe), [], part=(1, 2))
        read(*arguments, **named)

    def and_another(*arguments: Any) -> Any:
        monkeypatch.setattr(pack_module, "make_shards", make)
        with pytest.raises(DataError) as caught:
            merge(str(recipe), [])
        refused.append(str(caught.value))
        return make(*arguments)

    monkeypatch.setattr(pack_module, "read_part", and_the_other_part)
    monkeypatch.setattr(pack_module, "make_shards", and_another)
    pack(str(recipe), [], part=(0, 2))
    merge(str(recipe), [])
    assert refused == [f"{folder}: {BUSY}"]
    assert folder_bytes(folder) == expected


def test_a_lock_that_a_killed_run_left_is_taken_or_removed(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    folder = recipe.parent / "shards"
    folder.mkdir()
    (folder / "part-00000-of-00001.lock").touch()
    expected = folder_bytes(packed(recipe).folder)
    assert not [name for name in expected if name.endswith(".lock")]
    (folder / "merge.lock").touch()
    assert folder_bytes(packed(recipe).folder) == expected


def test_an_input_that_changed_is_not_continued(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*english_pairs(20), "broken"])
    recipe = make_recipe([files_source(file)])
    assert refusal(recipe).startswith(f"{file}:21: ")
    write_jsonl(file, english_pairs(20))
    part = recipe.parent / "shards" / "work" / "part-00000-of-00001"
    assert refusal(recipe) == f"{part}: its input, tokenizer or program is another than now; delete it and run again"
    shutil.rmtree(part)
    assert len(packed(recipe)) == 1


def test_a_folder_of_a_version_with_fewer_fields_is_finished(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Regression: after each new recipe field, folders of the version before counted as folders of another recipe."""
    rows = [{"query": q, "pos": [p], "neg": [n]} for q, p, n in (("a b c", f"d {i}", f"e {i}") for i in range(16))]
    source = {"kind": "files", "name": "x", "format": "flag_embedding", "instructions": []}
    recipe = make_recipe([source | {"path": str(write_jsonl(tmp_path / "x.jsonl", rows))}])
    folder = packed(recipe).folder
    index = json.loads((folder / "index.json").read_text())
    del index["recipe"]["epochs"], index["recipe"]["sources"][0]["positives"]
    (folder / "index.json").write_text(json.dumps(index))
    assert (pack(str(recipe), []) or pytest.fail("no index")).num_batches == 1
    index["recipe"]["epochs"] = 2
    (folder / "index.json").write_text(json.dumps(index))
    assert "already holds shards of another recipe" in refusal(recipe)


def test_a_finished_folder_is_left_alone(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe()
    folder = packed(recipe).folder
    before = folder_bytes(folder)
    assert len(before) > 3
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "load_tokenizer", lambda *_: pytest.fail("packed again"))
        assert (pack(str(recipe), []) or pytest.fail("no index")).num_batches == 4
    assert folder_bytes(folder) == before
    assert refusal(make_recipe(output_dir=str(folder))) == (
        f"{folder}: already holds shards of another recipe; choose another output_dir or delete it"
    )
    # A deleted file comes back, as the messages about altered files promise.
    (folder / "00000.arrow").unlink()
    caplog.clear()
    assert folder_bytes(packed(recipe).folder) == before
    assert f"{folder}: 00000.arrow missing or of another size; packing again" in caplog.messages


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_a_finished_folder_of_other_input_is_refused(tmp_path: Path, make_recipe: MakeRecipe, kind: str) -> None:
    rows = write_jsonl(tmp_path / "rows" / "a.jsonl", english_pairs(32))
    source = files_source(tmp_path / "rows")
    if kind == "hub":
        source |= {"kind": "hub", "dataset": source.pop("path"), "split": "train"}
    recipe = make_recipe([source])
    index = pack(str(recipe), [])
    size = rows.stat().st_size
    write_jsonl(rows, english_pairs(40))
    assert refusal(recipe) == (
        f"{recipe.parent / 'shards'}: packed from other input: {rows} had {size:,} bytes, has "
        f"{rows.stat().st_size:,} now; delete the folder or choose another output_dir"
    )
    write_jsonl(rows, english_pairs(32))
    other = write_jsonl(tmp_path / "rows" / "b.jsonl", english_pairs(8, seed=1))
    assert f"{other} was not there, has {other.stat().st_size:,} now" in refusal(recipe)
    shutil.rmtree(tmp_path / "rows")  # packed data needs its input no more
    assert pack(str(recipe), []) == index


def test_other_folders_are_left_alone(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert refusal(make_recipe(output_dir=str(tmp_path / "full"))) == (
        f"{tmp_path}/full: not empty and not an unfinished run, it holds thesis.txt; choose another output_dir or "
        "delete it"
    )
    bad = make_recipe([files_source(write_jsonl(tmp_path / "x.jsonl", [{}]))])
    refusal(bad)
    assert (bad.parent / "shards" / "work").is_dir()
    assert refusal(make_recipe(output_dir=str(bad.parent / "shards"))) == (
        f"{bad.parent}/shards: holds an unfinished run of another recipe, sources differs; delete it or choose another "
        "output_dir"
    )
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["work/thesis/chapter1.tex", "uv.lock"])
def test_what_only_looks_like_an_unfinished_run_is_left_alone(
    tmp_path: Path, make_recipe: MakeRecipe, name: str
) -> None:
    # `work` was once removed whole at the end, with all `.lock` files.
    precious = tmp_path / "full" / name
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    recipe = make_recipe(output_dir=str(tmp_path / "full"))
    shown = "thesis" if name.startswith("work") else name
    assert refusal(recipe).startswith(f"{tmp_path}/full: not empty and not an unfinished run, it holds {shown};")
    assert precious.read_text() == "mine"
    # Nor do later runs touch what came later.
    recipe = make_recipe()
    folder = packed(recipe).folder
    assert not (folder / "work").exists()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    pack(str(recipe), [])
    assert (folder / name).read_text() == "mine"


@pytest.mark.parametrize("change", ["max_skipped_fraction=0.5", "batch.pairs=8", "seed=7", "epochs=3"])
def test_what_only_later_steps_read_may_be_changed_after_reading(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    rows: list[Any] = english_pairs(40)
    rows[2] = rows[9] = rows[30] = {"query": "q"}
    recipe = make_recipe([files_source(write_jsonl(tmp_path / "a.jsonl", rows))], on_bad_row="skip")
    folder = recipe.parent / "shards"
    overrides = [] if change.startswith("max") else ["max_skipped_fraction=0.5"]
    expected = folder_bytes(packed(recipe, *overrides, change).folder)
    emptied(folder)
    with pytest.raises(DataError, match="raise max_skipped_fraction"):
        pack(str(recipe), [])
    monkeypatch.setattr(reading_module, "work", lambda *_: pytest.fail("tokenised again"))
    pack(str(recipe), [*overrides, change])
    assert folder_bytes(folder) == expected


def test_a_journal_that_lost_its_end_is_continued(tmp_path: Path) -> None:
    entry = Entry("a", 0, 1, 2, 0, 1, {}, 0, "0")
    line = json.dumps(entry.to_json()).encode() + b"\n"
    (tmp_path / "units.jsonl").write_bytes(line + b"\0" * 40 + b"\n" + line)
    assert read_journal(tmp_path) == [entry]
