"""Invariant: the template's prefix is as long as it was packed."""

import json
from pathlib import Path
from typing import Any

from conftest import english_pairs
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import BpeTrainer

from anchor.data.decode_prefix import template_prefix_ids
from anchor.data.templates import Template
from anchor.data.tokenization import SegmentTokenizer, prepare_tokenizer
from anchor.data.tokenizer_files import load_tokenizer


def llama_tokenizer(folder: Path) -> Any:
    """Return a `legacy` tokenizer whose words begin with a mark, as sentencepiece makes it."""
    backend = Tokenizer(BPE(byte_fallback=True))
    backend.pre_tokenizer = Metaspace(prepend_scheme="always")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    texts = [text for row in english_pairs(50) for text in (row["query"], row["positive"], "[INST] a [/INST]")]
    backend.train_from_iterator(texts, BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False))
    stored = json.loads(backend.to_str())
    stored["added_tokens"] = stored["added_tokens"][:3]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    about = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"unk_token": "<unk>"}))
    return load_tokenizer(str(folder))


def test_the_prefix_is_as_long_as_it_was_packed_whatever_a_loaded_tokenizer_makes_of_its_text(tmp_path):
    """Regression: saving a `legacy` LlamaTokenizer drops `legacy`, and one template token became a target."""
    template = Template("<s>[INST] ", " [/INST]</s>", "{instruction}: {text}")
    tokenizer = prepare_tokenizer(llama_tokenizer(tmp_path / "llama"), template, "llama")
    packed = SegmentTokenizer(tokenizer, template, 64)
    tokenizer.save_pretrained(tmp_path / "shards/tokenizer")
    loaded = SegmentTokenizer(load_tokenizer(str(tmp_path / "shards/tokenizer")), template, 64)
    assert len(loaded.prefix) > len(packed.prefix)
    assert (
        len(template_prefix_ids(tmp_path / "shards")) == len(packed.prefix) == packed.encode([("a", 0)]).body_starts[0]
    )
