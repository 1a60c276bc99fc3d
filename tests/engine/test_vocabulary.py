"""Invariants: shards are refused whose tokens a backbone does not have, or has under other ids, trained or dry-run;
added tokens, which no text becomes, do not matter."""

import json
import shutil
from pathlib import Path

import pytest
from taught import TEMPLATE
from test_train import write_recipe
from transformers import AutoConfig

from anchor.data.shards import read_index
from anchor.engine.vocabulary import check_vocabulary
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
    """A model folder whose tokenizer is another."""
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
