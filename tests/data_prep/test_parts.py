"""Invariants: parts merged are byte for byte what one run packs, for any number of parts; merge refuses a missing,
double or unfinished part, parts of different recipes or inputs, and units that are lost or twice, by name.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import english_pairs, write_jsonl
from packs import MakeRecipe, files_source, folder_bytes, packed

import data_prep.packing.gathered as gathered_module
import data_prep.sources.units as units_module
from anchor.data.shards import ShardReader
from anchor.errors import DataError
from data_prep.__main__ import main
from data_prep.inspection.inspect import examples
from data_prep.inspection.verify import verify
from data_prep.packing.pack import merge, pack


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units_module, "UNIT_ROWS", 8)


@pytest.fixture
def recipe(tmp_path: Path, make_recipe: MakeRecipe) -> Path:
    """Two sources of 12 and 2 units, with rows for quarantine, and equal pairs in different parts."""
    rows: list[Any] = english_pairs(90)
    rows[3] = rows[33] = {"query": "q"}
    rows[70] = rows[5]
    sources = [
        files_source(write_jsonl(tmp_path / "a.jsonl", rows), name="a", instructions=["I", "J"]),
        files_source(write_jsonl(tmp_path / "b.jsonl", english_pairs(16, seed=1)), name="b"),
    ]
    return make_recipe(sources, on_bad_row="skip", epochs=2)


def work_of(recipe: Path) -> Path:
    return recipe.parent / "shards" / "work"


@pytest.mark.parametrize("parts", [1, 2, 3, 20])
def test_parts_merged_equal_one_run_byte_for_byte(recipe: Path, parts: int) -> None:
    folder = packed(recipe).folder
    expected = folder_bytes(folder)
    assert json.loads(expected["index.json"])["sources"][0]["dropped"] == {
        "equal to an earlier pair": 1,
        "no field 'positive'": 2,
    }
    assert len(expected["quarantine-a.jsonl"].splitlines()) == 2
    shutil.rmtree(folder)
    for part in reversed(range(parts)):
        assert pack(str(recipe), [], part=(part, parts)) is None
        assert not (folder / "index.json").exists()
    index = merge(str(recipe), [])
    assert index.num_batches == 12
    assert folder_bytes(folder) == expected
    assert merge(str(recipe), []) == index  # already complete


def test_the_command_line_packs_parts_and_merges_them(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["pack", str(recipe), "batch.pairs=8", "--part", "0/2"])
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(recipe), "batch.pairs=8"])
    assert stop.value.code == 2
    part = work_of(recipe) / "part-00001-of-00002"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {part}: missing; run `python -m data_prep pack {recipe} --part 1/2`"
    )
    main(["pack", str(recipe), "batch.pairs=8", "--part", "1/2"])
    main(["merge", str(recipe), "batch.pairs=8", "--workers", "1"])
    assert (recipe.parent / "shards" / "index.json").is_file()
    assert not work_of(recipe).exists()


def _move_unit(work: Path) -> None:
    """Replace part 1 by a copy of part 0, as if one part had been packed under two numbers."""
    one, two = (work / f"part-0000{i}-of-00002" for i in (0, 1))
    shutil.rmtree(two)
    shutil.copytree(one, two)


def _lose_last_unit(work: Path) -> None:
    for name in ("pairs.bin", "tokens.bin", "quarantine.jsonl", "units.jsonl"):
        (work / "part-00001-of-00002" / name).write_bytes(b"")


def _set(name: str, key: str, value: Any) -> Callable[[Path], Any]:
    """Set another value in the second part's file."""

    def change(work: Path) -> None:
        file = work / "part-00001-of-00002" / name
        content = json.loads(file.read_text())
        content[key] = content[key] | value if isinstance(value, dict) else value
        file.write_text(json.dumps(content))

    return change


AGAIN = "delete the wrong part and run it again"
DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (shutil.rmtree, "{work}: holds no part; run `{pack} --part i/n` first"),
    (lambda work: shutil.rmtree(work / "part-00000-of-00002"), "{zero}: missing; run `{pack} --part 0/2`"),
    (lambda work: (work / "part-00001-of-00002" / "done.json").unlink(), "{one}: unfinished; run `{pack} --part 1/2`"),
    (
        lambda work: shutil.copytree(work / "part-00001-of-00002", work / "part-00001-of-00004"),
        "{work}: holds parts of 2 and of 4; delete all but one set",
    ),
    (_move_unit, f"{{one}}: holds unit 0 of source 'a', which part-00000-of-00002 holds too; {AGAIN}"),
    (_lose_last_unit, "{work}: unit 1 of 12 of source 'a' is in no part; delete all parts and run them again"),
    (
        _set("part.json", "recipe", {"seed": 9}),
        f"{{one}}: its recipe's values of seed differ from those of part-00000-of-00002; {AGAIN}",
    ),
    (
        _set("part.json", "inputs", []),
        f"{{one}}: its input files differ from those of part-00000-of-00002; {AGAIN}",
    ),
    (
        _set("part.json", "tokenizer_sha256", "0"),
        f"{{one}}: its tokenizer's ids differ from those of part-00000-of-00002; {AGAIN}",
    ),
    (
        _set("done.json", "units", {"a": 13}),
        "{one}: counted other units than part-00000-of-00002; the input changed, delete all parts and run them again",
    ),
    (
        lambda work: (work / "part-00001-of-00002" / "tokens.bin").write_bytes(b"less"),
        "{one}/tokens.bin: not {size} bytes long; delete {one} and run the part again",
    ),
    (
        lambda work: (work / "part-00000-of-00002" / "done.json").write_text(""),
        "{zero}/done.json: not readable (Expecting value: line 1 column 1 (char 0)); delete {zero} and run again",
    ),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
def test_merge_refuses_parts_that_are_not_one_whole(recipe: Path, damage: Callable[[Path], Any], expected: str) -> None:
    for part in (0, 1):
        pack(str(recipe), [], part=(part, 2))
    work = work_of(recipe)
    zero, one = (work / f"part-0000{i}-of-00002" for i in (0, 1))
    size = (one / "tokens.bin").stat().st_size
    damage(work)
    with pytest.raises(DataError) as caught:
        merge(str(recipe), [])
    command = f"python -m data_prep pack {recipe}"
    assert str(caught.value) == expected.format(work=work, zero=zero, one=one, pack=command, size=size)
    assert not (recipe.parent / "shards" / "index.json").exists()


def test_merge_wants_the_recipe_of_the_parts(recipe: Path) -> None:
    for part in (0, 1):
        pack(str(recipe), [], part=(part, 2))
    with pytest.raises(DataError) as caught:
        merge(str(recipe), ["text.max_tokens=32"])
    assert str(caught.value) == (
        f"{work_of(recipe)}: holds parts of another recipe, text differs; give merge the recipe and overrides of the "
        "parts"
    )
    # Nor is another cut begun in the same folder.
    with pytest.raises(DataError) as caught:
        pack(str(recipe), [])
    assert str(caught.value) == (
        f"{recipe.parent}/shards: holds part-00000-of-00002, this run is part 0 of 1; finish that array of parts with "
        f"`merge`, or delete {work_of(recipe)}"
    )


def test_merge_refuses_parts_of_another_tokenizer(recipe: Path, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    # Their ids would be decoded, and trained on, as other words.
    other = shutil.copytree(tiny_tokenizer_dir, tmp_path / "tokenizer")
    tokenizer = [f"tokenizer={other}"]
    pack(str(recipe), tokenizer, part=(0, 1))
    stored = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    ids = stored["model"]["vocab"]
    one, two = [name for name in ids if name.isalpha()][:2]
    ids[one], ids[two] = ids[two], ids[one]
    (other / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        merge(str(recipe), tokenizer)
    assert str(caught.value) == (
        f"{work_of(recipe)}: its parts were made with another tokenizer than {other} and this program give now; put "
        f"back what was there, or delete {work_of(recipe)} and pack again"
    )


def test_a_chat_template_that_names_the_day_is_the_one_of_the_first_part(
    make_recipe: MakeRecipe, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_tokenizer_dir, tmp_path / "tokenizer")

    def write_day(day: str) -> None:
        turn = "<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>"
        text = f"<|im_start|>system\nToday is {day}.<|im_end|>{turn}"
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")

    write_day("Monday")
    chat = make_recipe(tokenizer=str(folder), template={"kind": "chat"})
    pack(str(chat), [], part=(0, 2))
    write_day("Tuesday")
    pack(str(chat), [], part=(1, 2))
    merge(str(chat), [])
    reader = ShardReader(chat.parent / "shards")
    verify(reader)
    assert "Today is Monday." in reader.index.template["prefix"]
    assert {"Monday" in example["segments"]["query"] for example in examples(reader, 20)} == {True}


def test_many_parts_need_few_open_files(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed(recipe).folder
    expected = folder_bytes(folder)
    shutil.rmtree(folder)
    for part in range(8):
        pack(str(recipe), [], part=(part, 8))
    monkeypatch.setattr(gathered_module, "_MAX_OPEN", 3)
    opened: list[int] = []
    read = gathered_module.Gathered._read

    def counted(self: gathered_module.Gathered, *arguments: Any) -> bytes:
        found = read(self, *arguments)
        opened.append(len(self._open))
        return found

    monkeypatch.setattr(gathered_module.Gathered, "_read", counted)
    merge(str(recipe), [])
    assert max(opened) == 3
    assert folder_bytes(folder) == expected
