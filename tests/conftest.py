"""Tiny random models, a tiny tokenizer and small packed shards, all made in code and without a network."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

# The `pytest` program, unlike `python -m pytest`, does not look for packages where it is started.
sys.path.insert(0, str(Path(__file__).parents[1]))
# Fixtures of the tests that need hosts or SLURM, and of those that score a retrieval task.
sys.path.insert(0, str(Path(__file__).parent / "cluster"))
pytest_plugins = ("clusters", "retrieval")
# Two cores: the tokenizer's own threads would only compete with pytest.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# No deadline: a first example pays for imports, and the machine may be busy with another rank. Every run of the default
# profile draws the same examples, so a newcomer's first run cannot fail by chance. `.ci/run` draws new ones each time
# with `--hypothesis-profile=random`.
# Both say `derandomize`, because Hypothesis's own default changes where the variable CI is set.
settings.register_profile("random", deadline=None, max_examples=60, derandomize=False)
settings.register_profile("anchor", settings.get_profile("random"), derandomize=True)
settings.load_profile("anchor")

END, TURN, ANCHOR = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
WORDS = """
    river mountain garden window letter summer winter music teacher doctor engine bridge forest island market
    school castle village harbour mirror blanket candle pepper butter orange silver yellow purple quiet narrow
    gentle ancient modern carries follows crosses paints repairs gathers explains measures before behind beside under
""".split()  # noqa: SIM905 - a list of 45 quoted words is harder to read


def english_pairs(number: int, negatives: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows with ``query``, ``positive`` and ``negative`` (a list); texts of many lengths, all different."""
    draw = random.Random(seed)

    def text(kind: str, i: int, words: int) -> str:
        return f"{kind} {i}: the {' '.join(draw.choices(WORDS, k=words))}."

    return [
        {
            "query": text("question", i, draw.randint(2, 6)),
            "positive": text("answer", i, draw.randint(3, 30)),
            "negative": [text(f"other {k}", i, draw.randint(3, 30)) for k in range(negatives)],
        }
        for i in range(number)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


_QUICK = {"config", "data", "models", "objectives"}
"""Folders whose tests train no model; `-m quick` runs them."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups and pytest the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, and those of the two hosts too, which start first: they wait most."""
    hosts = Path(__file__).parent / "cluster"
    items.sort(key=lambda item: hosts not in item.path.parents)
    for item in items:
        item.add_marker(pytest.mark.xdist_group("hosts" if hosts in item.path.parents else item.path.stem))
        if item.path.parent.name in _QUICK and not {"slow", "gpu"} & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.quick)


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE of some 400 tokens with ChatML's special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = english_pairs(200)
    tokenizer.train_from_iterator([row[side] for row in rows for side in ("query", "positive")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=TURN, eos_token=ANCHOR, pad_token=END)
    fast.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


def _save_tiny_model(folder: Path, tokenizer_dir: Path, family: str, *, tied: bool) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape)) if family == "llama" else Qwen3ForCausalLM(Qwen3Config(**shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A random Llama with tied embeddings, and its tokenizer."""
    return _save_tiny_model(tmp_path_factory.mktemp("llama"), tiny_tokenizer_dir, "llama", tied=True)


@pytest.fixture(scope="session")
def long_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The random Llama with positions for the texts of every shipped recipe."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("long") / "llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return folder


@pytest.fixture(scope="session")
def tiny_untied_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A random Qwen3 with an untied output layer, and its tokenizer."""
    return _save_tiny_model(tmp_path_factory.mktemp("qwen3"), tiny_tokenizer_dir, "qwen3", tied=False)


@pytest.fixture(scope="session")
def make_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Callable[..., Path]:
    """``make_recipe(sources=[...], **changes)`` writes a small pack recipe into a new folder.

    ``changes`` are ``section__key=value``. Without ``sources`` it is 64 English pairs in one file. The shards go to
    ``shards`` beside the recipe.
    """

    def make(sources: list[dict[str, Any]] | None = None, *, num_rows: int = 64, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("pack")
        if sources is None:
            rows = write_jsonl(folder / "pairs.jsonl", english_pairs(num_rows))
            columns = {"negatives": ["negative"]}
            sources = [
                {"kind": "files", "name": "small", "path": str(rows), "columns": columns, "instructions": ["Answer it"]}
            ]
        recipe: dict[str, Any] = {
            "output_dir": str(folder / "shards"),
            "seed": 0,
            "tokenizer": str(tiny_tokenizer_dir),
            "template": {"kind": "preset", "name": "chatml"},
            "sources": sources,
            "text": {"max_tokens": 64, "hard_negatives": 1},
            "batch": {"pairs": 16, "pack_tokens": 512, "pack_multiple": 4},
        }
        for name, value in changes.items():
            *sections, key = name.split("__")
            node = recipe
            for section in sections:
                node = node[section]
            node[key] = value
        path = folder / "pack.yaml"
        path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="session")
def make_shards(make_recipe: Callable[..., Path]) -> Callable[..., Path]:
    """``make_shards(pairs=16, pack_tokens=512, pack_multiple=4, hard_negatives=1, num_rows=64)`` packs English pairs.

    Returns the folder of shards: ``num_rows // pairs`` batches of one source, ``small``, with an instruction.
    """

    def make(
        *,
        pairs: int = 16,
        pack_tokens: int = 512,
        pack_multiple: int = 4,
        hard_negatives: int = 1,
        max_tokens: int = 64,
        num_rows: int = 64,
        **changes: Any,
    ) -> Path:
        from data_prep.packing.pack import pack

        recipe = make_recipe(
            num_rows=num_rows,
            batch__pairs=pairs,
            batch__pack_tokens=pack_tokens,
            batch__pack_multiple=pack_multiple,
            text__hard_negatives=hard_negatives,
            text__max_tokens=max_tokens,
            **changes,
        )
        pack(str(recipe), [])
        return recipe.parent / "shards"

    return make


@pytest.fixture(scope="session")
def export_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, make_shards: Callable[..., Path]
) -> Path:
    """Exported folder of an untrained model, made without the time that training takes."""
    from transformers import AutoModelForCausalLM

    from anchor.data.index import read_index
    from anchor.model_folder.consumer_files import write_consumer_files

    shards = make_shards(max_tokens=48)
    folder = tmp_path_factory.mktemp("untrained") / "export"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(folder)
    shutil.copytree(shards / "tokenizer", folder, dirs_exist_ok=True)
    index = read_index(shards)
    write_consumer_files(folder, 32, index)
    (folder / "anchor.json").write_text(json.dumps({"prompts": index.prompts, "max_tokens": 48}), encoding="utf-8")
    return folder


@pytest.fixture
def scale(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """Scale of a tiny study over seven tiny sources and one to retrieve from, in a new folder."""
    from studies import write_scale

    path, sources = write_scale(tmp_path, tiny_model_dir)
    for number, name in enumerate(sources):
        rows = [row | {"negative": row["negative"][0]} for row in english_pairs(40, seed=number)]
        for row in rows:
            row["query"] = f"{name} {row['query']}"
        write_jsonl(tmp_path / "pairs" / f"{name}.jsonl", rows)
    return path


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of a single rank, which the command would otherwise leave behind in this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def blocks(folder: Path) -> int:
    """Return the bytes that a folder takes on a disk with 4 KiB blocks."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(bytes)`` returns a folder on a disk of that size; a second call resizes the same disk."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        again = "remount," if mounted else ""
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "none", folder], check=False)
        if done.returncode:
            pytest.skip("mounting a small disk needs root")
        mounted[:] = [folder]
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)
