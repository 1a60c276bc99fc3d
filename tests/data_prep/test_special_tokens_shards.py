"""Invariants: packed answers end in all trained special tokens and say what ends an answer; parts and merge give the
bytes of one run; an answer without text is refused by file and line, or put aside.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ANCHOR, END, english_pairs, write_jsonl
from packs import folder_bytes, refusal
from transformers import AutoTokenizer

from anchor.data.shards import ShardReader
from anchor.errors import AnchorError
from data_prep.inspection.inspect import examples, inspect
from data_prep.inspection.verify import verify
from data_prep.packing.pack import merge, pack

MakeRecipe = Callable[..., Path]


def answers_recipe(tmp_path: Path, make_recipe: MakeRecipe, rows: list[Any] | None = None, **changes: Any) -> Path:
    if rows is None:
        rows = [{"id": i, "question": r["query"], "answer": r["positive"]} for i, r in enumerate(english_pairs(40))]
    columns = {"query": "question", "positive": "answer"}
    file = write_jsonl(tmp_path / "answers.jsonl", rows)
    source = {"kind": "files", "name": "a", "path": str(file), "columns": columns, "instructions": []}
    template = {"kind": "special_tokens", "tokens": 4}
    return make_recipe([source], template=template, text__hard_negatives=0, **changes)


def test_every_segment_is_its_text_and_all_special_tokens(
    tmp_path: Path, make_recipe: MakeRecipe, tiny_tokenizer_dir: Path
) -> None:
    recipe = answers_recipe(tmp_path, make_recipe)
    pack(str(recipe), [])
    reader = ShardReader(recipe.parent / "shards")
    verify(reader)
    first = len(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))
    assert reader.index.version == 1
    assert reader.index.template == {
        "prefix": "",
        "suffix": "<|anchor_0|><|anchor_1|><|anchor_2|><|anchor_3|>",
        "instruction_format": "{instruction}: {text}",
        "special_tokens": 4,
        "end": ANCHOR,
    }
    assert reader.index.anchor_token_id == first + 3
    saved = AutoTokenizer.from_pretrained(reader.folder / "tokenizer")
    assert reader.index.end_token_id == saved.convert_tokens_to_ids(ANCHOR)
    segments = 0
    for number in range(len(reader)):
        for one in reader.read(number).packs:
            for rest in np.split(one.input_ids, np.cumsum(one.segment_lengths)[:-1]):
                assert rest[-4:].tolist() == list(range(first, first + 4))
                assert (rest[:-4] < first).all()
                segments += 1
    assert segments == 64
    shown = examples(reader, 1)[0]["segments"]["positive"]
    assert shown.startswith("⟦answer ")
    assert shown.endswith("⟧<|anchor_0|><|anchor_1|><|anchor_2|><|anchor_3|>")


def test_inspect_says_that_the_teacher_is_missing(
    tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = answers_recipe(tmp_path, make_recipe, template__end=END)
    pack(str(recipe), [])
    inspect(recipe.parent / "shards", verify_all=True, show=0, as_json=False)
    shown = capsys.readouterr().out
    assert "special tokens    4 behind every segment\n" in shown
    assert f"end of an answer  {END}\n" in shown
    assert "teacher           none; add one with `python -m data_prep teach`\n" in shown


def test_parts_and_merge_give_the_bytes_of_one_run(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = answers_recipe(tmp_path, make_recipe)
    pack(str(recipe), [])
    folder = recipe.parent / "shards"
    expected = folder_bytes(folder)
    folder.rename(recipe.parent / "one")
    for part in ((0, 2), (1, 2)):
        pack(str(recipe), [], part=part)
    merge(str(recipe), [])
    assert folder_bytes(folder) == expected


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(" \n", "field 'answer' is empty"), ("\u200b", "field 'answer' holds only control characters")],
)
def test_an_answer_without_text_is_refused_or_put_aside(
    tmp_path: Path, make_recipe: MakeRecipe, answer: str, reason: str
) -> None:
    rows: list[Any] = [{"question": r["query"], "answer": r["positive"]} for r in english_pairs(40)]
    rows[6]["answer"] = answer
    recipe = answers_recipe(tmp_path, make_recipe, rows)
    file = tmp_path / "answers.jsonl"
    assert refusal(recipe) == f"{file}:7: {reason}; remove the row or use on_bad_row: skip"
    skipping = answers_recipe(tmp_path, make_recipe, rows, on_bad_row="skip")
    pack(str(skipping), [])
    folder = skipping.parent / "shards"
    (aside,) = (json.loads(line) for line in (folder / "quarantine-a.jsonl").read_text().splitlines())
    assert (aside["line"], aside["reason"].split(";")[0]) == (7, reason)
    verify(ShardReader(folder))
    assert ShardReader(folder).index.sources[0]["kept"] == 39


def test_an_end_token_that_the_tokenizer_lacks_is_refused(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = answers_recipe(tmp_path, make_recipe, template__end="<|eot_id|>")
    assert refusal(recipe, AnchorError).endswith(
        "the tokenizer has no token '<|eot_id|>' to end a text; name one of its tokens in template.end"
    )
