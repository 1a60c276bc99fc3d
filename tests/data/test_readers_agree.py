"""Invariant: 400 texts (many scripts, emoji, code, names of special tokens) have the same ids in the shards, in `eval
embed`, in sentence-transformers and in the JavaScript reader, for real tokenizers of five families.

The JavaScript reader runs where node and the package @huggingface/tokenizers are: ANCHOR_NODE_MODULES names the folder
`node_modules` (tests/data/install_node.sh makes one).
"""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from sentence_transformers import SentenceTransformer
from transformers import LlamaConfig, LlamaForCausalLM

from anchor.data.index import read_index
from anchor.data.shards import ShardReader
from anchor.data.tokenizer_files import load_tokenizer
from anchor.encoding.encoder import Encoder
from anchor.model_folder.consumer_files import write_consumer_files
from data_prep.packing.pack import pack

TOKENIZERS = Path(__file__).parents[3] / "shared/data/tokenizers"
FAMILIES = ("Llama-3.2-1B-Instruct", "Qwen3-0.6B", "Mistral-7B-Instruct-v0.3", "gemma-3-1b-it", "gpt-oss-20b")
MAX_TOKENS = 1024
NODE_MODULES = os.environ.get("ANCHOR_NODE_MODULES")

PIECES = [
    "The quick brown fox jumps over the lazy dog.",
    "Größe und Übung am Fluß",
    "L'été dernier, à Noël",
    "¿Dónde está la biblioteca?",
    "Что делать, если идёт дождь?",
    "Η θάλασσα είναι ήρεμη",
    "שלום עולם, מה שלומך",
    "مرحبا بالعالم، كيف حالك",
    "नमस्ते दुनिया, आप कैसे हैं",
    "ওহে বিশ্ব",
    "สวัสดีชาวโลก",
    "漢字とかなとカナ、交じり文。",
    "今天天气很好，我们去公园吧。",
    "안녕하세요 세계",
    "Xin chào thế giới",
    "გამარჯობა მსოფლიო",
    "ሰላም ዓለም",
    "e\u0301 combining \u0323\u035c marks, ﬁ ligature ½ ²",
    "  spaces around  ",
    "tabs\tand\nnew\n\nlines\r\n",
    "\u00a0no-break\u2003em space\u200bzero width",
    "1234567890 3.14159 1e-9",
    "👩‍👩‍👧‍👦 🇩🇪🇫🇷 😀😃😄",
    "❤️‍🔥 burning 👍🏽 ok 🏴󠁧󠁢󠁳󠁣󠁴󠁿 1️⃣2️⃣ ♥♠",
    "def f(x):\n    return x**2  # square\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "SELECT * FROM t WHERE a >= 1 AND b <> 'x';",
    '<div class="a">&amp; text</div>',
    "$ ls -la | grep '^d' > out.txt",
    '{"key": [1, 2.5, null], "k": "\\u00e9"}',
    "\\frac{a}{b} + \\sum_{i=1}^n x_i",
    "https://example.org/a?b=c&d=e#f",
]


def texts_of(tokenizer: Any) -> list[str]:
    """Return 400 different texts; the last 100 contain names of special tokens."""
    draw = random.Random(0)
    out = dict.fromkeys(PIECES)
    while len(out) < 300:
        out[draw.choice(["", " ", "\n"]).join(draw.sample(PIECES, draw.randint(2, 4)))] = None
    special = [one.content for one in tokenizer.backend_tokenizer.get_added_tokens_decoder().values() if one.special]
    names = [*special, *special, "<|im_end|>", "</s>", "[INST]", "<end_of_turn>"]
    out |= dict.fromkeys(special[:20])
    while len(out) < 400:
        before, behind = draw.sample(PIECES, 2)
        first, second = draw.choice(special), draw.choice(names)
        out[draw.choice([f"{before}{first}{behind}", f"{before} {first} {behind}{second}", f"{first}{second}"])] = None
    return list(out)


def shards_ids(folder: Path, tokenizer: Path, texts: list[str]) -> dict[str, list[int]]:
    """Pack the texts as documents, and read their segments back."""
    rows = [{"query": f"question {i}", "positive": text} for i, text in enumerate(texts)]
    recipe = {
        "output_dir": str(folder / "shards"),
        "seed": 0,
        "tokenizer": str(tokenizer),
        "template": {"kind": "chat"},
        "sources": [
            {"kind": "files", "name": "s", "path": str(write_jsonl(folder / "p.jsonl", rows)), "instructions": []}
        ],
        "text": {"max_tokens": MAX_TOKENS, "hard_negatives": 0},
        "batch": {"pairs": 50, "pack_tokens": 8192, "pack_multiple": 1},
    }
    (folder / "pack.yaml").write_text(json.dumps(recipe))
    pack(str(folder / "pack.yaml"), [])
    reader, found = ShardReader(folder / "shards"), {}
    for batch in (reader.read(number) for number in range(len(reader))):
        for one in batch.packs:
            segments = np.split(one.input_ids, np.cumsum(one.segment_lengths)[:-1])
            for ids, role, row in zip(segments, one.roles, one.pair_ids, strict=True):
                if role == 1:
                    found[texts[row]] = ids.tolist()
    return found


def exported(folder: Path) -> Path:
    """Write a model folder with the shards' tokenizer and the smallest model that fits its vocabulary."""
    index, export = read_index(folder / "shards"), folder / "export"
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    highest = max(load_tokenizer(str(folder / "shards/tokenizer")).get_vocab().values())
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=highest + 1, tie_word_embeddings=True, **size)).save_pretrained(export)
    shutil.copytree(folder / "shards/tokenizer", export, dirs_exist_ok=True)
    write_consumer_files(export, 8, index)
    (export / "anchor.json").write_text(json.dumps({"prompts": index.prompts, "max_tokens": MAX_TOKENS}))
    return export


def javascript(export: Path, texts: list[str], *protect: str) -> list[list[int]]:
    given = export.parent / "texts.json"
    given.write_text(json.dumps(texts))
    command = ["node", str(Path(__file__).with_name("encode.mjs")), str(export), str(given), *protect]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


Packed = tuple[Path, dict[str, list[int]]]
"""The export of a family, and its texts with their ids in the shards."""


@pytest.fixture(scope="module", params=FAMILIES)
def packed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[int]]]:
    """The export of a family, and its texts with their ids in the shards."""
    source = TOKENIZERS / request.param
    if not source.is_dir():
        pytest.skip(f"{source} is not here: real tokenizers are no part of the project")
    folder = tmp_path_factory.mktemp(request.param)
    found = shards_ids(folder, source, texts_of(load_tokenizer(str(source))))
    assert len(found) == 400
    return exported(folder), found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # turns that end in [/INST]; deprecations in these packages
def test_shards_evaluation_and_sentence_transformers_have_the_same_ids(
    packed: tuple[Path, dict[str, list[int]]],
) -> None:
    export, expected = packed
    texts = list(expected)
    encoder = Encoder(export, dtype="fp32")
    ours = [ids.tolist() for _, block in encoder._tokenised(texts, "") for ids in block]
    model = SentenceTransformer(str(export), device="cpu")
    for text, ids in zip(texts, ours, strict=True):
        assert ids == expected[text]
        assert model.preprocess([text])["input_ids"][0].tolist() == expected[text]


@pytest.mark.slow
@pytest.mark.skipif(
    NODE_MODULES is None or shutil.which("node") is None,
    reason="needs node, and ANCHOR_NODE_MODULES: the folder node_modules with @huggingface/tokenizers",
)
def test_the_javascript_reader_has_the_same_ids(packed: Packed) -> None:
    """Regression: the reader took the pieces `prefix` and `suffix` for ordinary words.

    It encodes names of special tokens as the tokens, unless they are first made ordinary words of the vocabulary (see
    eval/README.md).
    """
    export, expected = packed
    assert javascript(export, list(expected), "protect") == list(expected.values())
    special = {
        t["content"] for t in json.loads((export / "tokenizer.json").read_text())["added_tokens"] if t["special"]
    }
    plain = [text for text in expected if not any(name in text for name in special)]
    assert 250 < len(plain) < 390
    assert javascript(export, plain) == [expected[text] for text in plain]
