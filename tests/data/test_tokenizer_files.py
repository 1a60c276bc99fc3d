"""Invariants: a template is one piece per token, named as that token, for any token; older files are rewritten without
changing an id; a tokenizer that cannot be read is one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from anchor.data.templates import Template
from anchor.data.tokenization import prepare_tokenizer
from anchor.data.tokenizer_files import load_tokenizer, name_pieces, read_tokenizer, template_processor
from anchor.errors import ModelError

CHATML = Template("<|im_start|>user\n", "<|im_end|>", "{instruction}: {text}")
TEXTS = ["the river", "", "a <|im_end|> inside"]


def piece_names(file: Path) -> list[str]:
    """Return the names of the post-processor's special pieces, in order; each stands for one token of that name."""
    processor = json.loads(file.read_text())["post_processor"]
    for name, piece in processor["special_tokens"].items():
        assert (piece["id"], piece["tokens"], len(piece["ids"])) == (name, [name], 1)
    return [piece["SpecialToken"]["id"] for piece in processor["single"] if "SpecialToken" in piece]


def test_each_template_token_is_a_piece_of_its_name(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Regression: the JavaScript reader took the pieces `prefix` and `suffix` for ordinary words."""
    tokenizer = prepare_tokenizer(load_tokenizer(str(tiny_tokenizer_dir)), CHATML, "tiny")
    tokenizer.save_pretrained(tmp_path)
    names = piece_names(tmp_path / "tokenizer.json")
    assert (names[0], names[-1]) == ("<|im_start|>", "<|im_end|>")
    bare = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    bare.encode_special_tokens = True
    assert bare.encode("").tokens == names
    assert len(names) > 4
    for text in TEXTS:
        assert bare.encode(text).ids == tokenizer(text)["input_ids"]


def test_tokens_that_would_be_read_as_something_else_are_pieces_too() -> None:
    words = [":", "$A", "a:1", "$0", "x"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "x"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = template_processor(backend, [0, 1, 2], [3, 0])
    assert backend.encode("x").tokens == [":", "$A", "a:1", "x", "$0", ":"]
    assert backend.encode("x", "x").type_ids == [0, 0, 0, 0, 1, 1, 1]


def test_a_tokenizer_of_an_earlier_version_is_rewritten_with_the_same_ids(
    tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = prepare_tokenizer(load_tokenizer(str(tiny_tokenizer_dir)), CHATML, "tiny")
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    new = file.read_bytes()
    name_pieces(tmp_path)
    assert file.read_bytes() == new  # nothing to do
    content = json.loads(new)
    frame = Tokenizer.from_file(str(file)).encode("")
    parts = {
        name: {"id": name, "ids": frame.ids[part], "tokens": frame.tokens[part]}
        for name, part in {"prefix": slice(-1), "suffix": slice(-1, None)}.items()
    }
    before, behind = ({"SpecialToken": {"id": name, "type_id": 0}} for name in parts)
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    after = {"SpecialToken": {"id": "suffix", "type_id": 1}}
    content["post_processor"] |= {
        "single": [before, first, behind],
        "pair": [before, first, second, after],
        "special_tokens": parts,
    }
    file.write_text(json.dumps(content))
    expected = [Tokenizer.from_file(str(file)).encode(text).ids for text in TEXTS]
    name_pieces(tmp_path)
    assert piece_names(file) == frame.tokens
    assert [Tokenizer.from_file(str(file)).encode(text).ids for text in TEXTS] == expected
    assert json.loads(file.read_text())["post_processor"] == json.loads(new)["post_processor"]


def newer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "BrandNewSplit", "pattern": "x"}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def without_unk(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GemmaTokenizerFast"}))


def pointer(name: str) -> Callable[[Path], None]:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9085657\n"
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (newer, "{folder}: no tokenizer could be loaded: data did not match any variant of untagged enum"),
        (without_unk, "{folder}: no tokenizer could be loaded: "),
        (pointer("tokenizer.json"), "{folder}/tokenizer.json: a Git LFS pointer, not the file itself; run `git lfs"),
        (pointer("model.safetensors"), "{folder}/model.safetensors: a Git LFS pointer, not the file itself; run"),
        (lambda f: (f / "tokenizer.json").write_text("[" * 100_000), "{folder}: no tokenizer could be loaded: "),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff{"), "{folder}: no tokenizer could be loaded: "),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "{folder}: no tokenizer could be loaded: "),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "{folder}: no tokenizer could be loaded: "),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "{folder}: no tokenizer could be loaded: "),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(
    tiny_model_dir: Path, tmp_path: Path, harm: Callable[[Path], object], message: str
) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))
    harm(folder)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(folder))
    assert str(caught.value).startswith(message.format(folder=folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harm", [newer, pointer("tokenizer.json"), lambda f: (f / "tokenizer.json").unlink()])
def test_a_bare_tokenizer_file_that_cannot_be_read_is_one_line(
    tiny_tokenizer_dir: Path, tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    folder = Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / "m"))
    harm(folder)
    with pytest.raises(ModelError, match=r"tokenizer.json: (no tokenizer could be loaded: |a Git LFS pointer)"):
        read_tokenizer(folder / "tokenizer.json")
