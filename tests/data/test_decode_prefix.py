"""Invariants: the tokens before the anchor vector are what each family's tokenizer and template say, by hand."""

import dataclasses
import json
from pathlib import Path

import pytest

from anchor.config.pack_recipe import CustomTemplate, PresetTemplate
from anchor.data.decode_prefix import decode_prefix_ids, template_prefix_ids
from anchor.data.index import Index
from anchor.data.templates import resolve_template
from anchor.data.tokenization import prepare_tokenizer
from anchor.data.tokenizer_files import load_tokenizer
from anchor.errors import ShardError

TOKENIZERS = Path(__file__).parents[3] / "shared/data/tokenizers"
CHAT = {"kind": "custom", "instruction_format": "{instruction}: {text}"}


def shards_of(folder: Path, tokenizer_folder: Path, template: PresetTemplate | CustomTemplate) -> tuple[Index, Path]:
    """A folder of shards, as far as a decode prefix reads it."""
    tokenizer = load_tokenizer(str(tokenizer_folder))
    prepared = prepare_tokenizer(tokenizer, resolve_template(template, tokenizer), "template")
    prepared.save_pretrained(folder / "tokenizer")
    anchor = prepared.backend_tokenizer.encode("a").ids[-1]
    return Index(1, "", anchor, {}, {}, [], {}, []), folder


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="no real tokenizers beside the project")
@pytest.mark.parametrize(
    ("name", "prefix", "suffix", "bos", "template"),
    [
        (
            "Llama-3.2-1B-Instruct",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|>",
            128000,
            (128000, 128006, 882, 128007, 271),
        ),
        # Qwen has no BOS token: the template's first token stands for it.
        ("Qwen3-0.6B", "<|im_start|>user\n", "<|im_end|>", 151644, (151644, 872, 198)),
        ("Mistral-7B-Instruct-v0.3", "<s>[INST] ", "[/INST]</s>", 1, (1, 3)),
        ("gemma-3-1b-it", "<bos><start_of_turn>user\n", "<end_of_turn>", 2, (2, 105, 2364, 107)),
        # A BOS token that the chat layout does not use.
        ("gpt-oss-20b", "<|start|>user<|message|>", "<|end|>", 199998, (200006, 1428, 200008)),
    ],
)
def test_prefixes_of_real_families(name, prefix, suffix, bos, template, tmp_path):
    section = CustomTemplate(**CHAT, prefix=prefix, suffix=suffix)
    index, shards = shards_of(tmp_path, TOKENIZERS / name, section)
    assert decode_prefix_ids("none", index, shards) == ()
    assert decode_prefix_ids("bos", index, shards) == (bos,)
    assert decode_prefix_ids("template", index, shards) == template == tuple(template_prefix_ids(shards))


def test_a_template_without_a_prefix_has_none_to_decode_behind(tiny_tokenizer_dir, tmp_path):
    section = CustomTemplate(**CHAT, prefix="", suffix="<|im_end|>")
    index, shards = shards_of(tmp_path, tiny_tokenizer_dir, section)
    assert decode_prefix_ids("bos", index, shards) == (1,)  # <|im_start|>, this tokenizer's BOS token
    config = shards / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "bos_token": None}))
    assert decode_prefix_ids("bos", index, shards) == (index.anchor_token_id,)
    with_end = dataclasses.replace(index, end_token_id=7)
    assert decode_prefix_ids("bos", with_end, shards) == (7,), "trained special tokens are no beginning of a text"
    with pytest.raises(ShardError) as error:
        decode_prefix_ids("template", index, shards)
    assert str(error.value) == (
        f"{shards}: objective.decode_prefix is template, but these shards' template has no prefix; use bos or none"
    )
