"""Invariants: shards are refused whose tokens a backbone does not have, or has under other ids, whose texts are longer
than its positions, or whose template is not that of the exported folder, trained or dry-run; added tokens that no
segment holds do not matter."""

import json
import shutil
from pathlib import Path

import pytest
from taught import TEMPLATE
from test_train import write_recipe
from transformers import AutoConfig

from anchor.data.index import read_index
from anchor.engine.checks import check_exported_template, check_vocabulary
from anchor.errors import ModelError
from anchor.train import main


@pytest.fixture(scope="module")
def vocabulary(tiny_model_dir) -> int:
    return AutoConfig.from_pretrained(tiny_model_dir).vocab_size


@pytest.fixture(scope="module")
def shards(make_shards):
    return make_shards(num_rows=32)


def refusal(vocabulary: int, path: str, shards: Path) -> str:
    with pytest.raises(ModelError) as error:
        check_vocabulary(vocabulary, path, read_index(shards), shards)
    return str(error.value)


def test_too_few_tokens(vocabulary, shards, tiny_model_dir):
    check_vocabulary(vocabulary, str(tiny_model_dir), read_index(shards), shards)
    assert refusal(399, "m", shards) == (
        f"m: 399 tokens, {shards}/tokenizer/tokenizer.json has ids up to 399; pack with this model's tokenizer"
    )
    anchor = read_index(shards).anchor_token_id
    assert refusal(2, "m", shards) == (
        f"m: 2 tokens, the shards' anchor token is {anchor}; pack with this model's tokenizer"
    )


def altered(tokenizer_dir: Path, folder: Path, alter) -> Path:
    """Copy a model folder and alter its tokenizer."""
    copy = Path(shutil.copytree(tokenizer_dir, folder))
    stored = json.loads((copy / "tokenizer.json").read_text())
    alter(stored)
    (copy / "tokenizer.json").write_text(json.dumps(stored))
    return copy


def swap(stored: dict) -> None:
    vocabulary = stored["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def test_another_tokenizer_of_the_same_size(vocabulary, shards, tiny_model_dir, tmp_path, capsys):
    other = altered(tiny_model_dir, tmp_path / "other", swap)
    ids = json.loads((tiny_model_dir / "tokenizer.json").read_text())["model"]["vocab"]
    first = min("ab", key=ids.__getitem__)
    second = "ab".replace(first, "")
    assert refusal(vocabulary, str(other), shards) == (
        f"{other}: its tokenizer is not the one of {shards}: {first!r} is {ids[second]} there and {ids[first]} in the "
        "shards; pack with this model's tokenizer"
    )
    recipe = write_recipe(tmp_path, other, shards)
    for mode in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as exit_:
            main([str(recipe), *mode])
        assert exit_.value.code == 2
        assert "its tokenizer is not the one of" in capsys.readouterr().err


def test_added_tokens_do_not_matter(vocabulary, shards, tiny_model_dir, tmp_path):
    def add(stored: dict) -> None:
        stored["added_tokens"].append({**stored["added_tokens"][0], "id": 5000, "content": "<|pad|>"})

    more = altered(tiny_model_dir, tmp_path / "more", add)
    check_vocabulary(vocabulary, str(more), read_index(shards), shards)


def test_special_tokens_stand_behind_the_models_own(vocabulary, make_shards, tiny_model_dir):
    shards = make_shards(num_rows=32, template=TEMPLATE)
    check_vocabulary(vocabulary, str(tiny_model_dir), read_index(shards), shards)
    assert refusal(399, "m", shards) == (
        "m: 399 tokens, the shards have 400 before the special tokens and end texts with 2; pack with this model's "
        "tokenizer"
    )


def refused_by_training_and_dry_run(recipe: Path, capsys) -> str:
    lines = set()
    for mode in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as exit_:
            main([str(recipe), *mode])
        assert exit_.value.code == 2
        lines.add(capsys.readouterr().err.splitlines()[-1])
    (line,) = lines
    return line


def rename(stored: dict) -> None:
    """Rename the anchor's token, as in a model of another family over the same vocabulary."""
    for token in stored["added_tokens"]:
        if token["content"] == "<|im_end|>":
            token["content"] = "<|other|>"


def test_template_tokens_that_mean_another_token_in_the_model(vocabulary, shards, tiny_model_dir, tmp_path):
    def alter(stored: dict) -> None:
        rename(stored)
        stored["model"]["vocab"].pop("<|im_end|>")
        stored["model"]["vocab"]["<|other|>"] = 2

    def unlisted(stored: dict) -> None:
        stored["added_tokens"] = [one for one in stored["added_tokens"] if one["content"] != "<|endoftext|>"]

    other = altered(tiny_model_dir, tmp_path / "other", alter)
    assert refusal(vocabulary, str(other), shards).startswith(f"{other}: its tokenizer is not the one of {shards}: ")
    # A token that no segment holds may be missing.
    check_vocabulary(vocabulary, str(altered(tiny_model_dir, tmp_path / "fewer", unlisted)), read_index(shards), shards)


def test_added_template_tokens_are_compared_too(vocabulary, make_shards, tiny_tokenizer_dir, tiny_model_dir, tmp_path):
    """Regression: shards with a template token at id 400 trained a model that had another token there."""

    def add(name: str):
        def alter(stored: dict) -> None:
            stored["added_tokens"].append({**stored["added_tokens"][0], "id": 400, "content": name, "special": False})

        return alter

    packing = altered(tiny_tokenizer_dir, tmp_path / "packing", add("<|turn|>"))
    template = {"kind": "custom", "prefix": "<|turn|>", "suffix": "<|im_end|>"}
    shards = make_shards(num_rows=32, tokenizer=str(packing), template=template)
    check_vocabulary(401, str(altered(tiny_model_dir, tmp_path / "same", add("<|turn|>"))), read_index(shards), shards)
    check_vocabulary(401, str(tiny_model_dir), read_index(shards), shards)
    other = altered(tiny_model_dir, tmp_path / "other", add("<|pause|>"))
    assert refusal(401, str(other), shards) == (
        f"{other}: its tokenizer is not the one of {shards}: 400 is '<|pause|>' there, and '<|turn|>' is 400 in the "
        "shards; pack with this model's tokenizer"
    )


def test_an_export_of_another_template(shards, tiny_model_dir, tmp_path, capsys):
    """Regression: a chat template with the date differs from day to day, and Stage II trained on without an error."""
    export = Path(shutil.copytree(tiny_model_dir, tmp_path / "export"))
    template = read_index(shards).template
    about = {"template": template, "prompts": {}, "max_tokens": 64}
    (export / "anchor.json").write_text(json.dumps(about))
    check_exported_template(str(export), read_index(shards), shards)
    older = "<|im_start|>Today is Monday.\nuser\n"
    (export / "anchor.json").write_text(json.dumps({**about, "template": {**template, "prefix": older}}))
    assert refused_by_training_and_dry_run(write_recipe(tmp_path, export, shards), capsys) == (
        f"error: {export}: has another template than {shards}: prefix is {older!r} in its anchor.json and "
        f"{template['prefix']!r} in the shards; pack with template.kind: custom and the values of anchor.json"
    )


def test_texts_longer_than_the_models_positions(make_shards, tiny_model_dir, tmp_path, capsys):
    """Regression: 1,024 tokens trained over 256 positions, and the export promised max_seq_length 1,024."""
    shards = make_shards(num_rows=32, max_tokens=300, pack_tokens=1024)
    recipe = write_recipe(tmp_path, tiny_model_dir, shards)
    expected = (
        f"text.max_tokens is 300, but {tiny_model_dir} has 256 positions (max_position_embeddings); give texts at most "
        "256 tokens"
    )
    assert refused_by_training_and_dry_run(recipe, capsys) == f"error: {shards}: {expected}"
    packing = shards.parent / "pack.yaml"
    with pytest.raises(SystemExit) as exit_:
        main([str(recipe), "--dry-run", "--pack", str(packing)])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {packing}: {expected}"
