"""``index.json`` of a folder of shards. It is written last and atomically."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchor.errors import ShardError

INDEX_NAME = "index.json"
FORMAT_VERSION = 1
TEACHER_VERSION = 2
"""Format version of shards with a teacher column; all other shards have version 1."""


@dataclass(frozen=True, slots=True)
class Index:
    """Contents of ``index.json``.

    Attributes:
        version: format version.
        tokenizer_sha256: fingerprint of ``tokenizer/tokenizer.json``.
        anchor_token_id: id of the last token of every segment.
        template: prefix, suffix and instruction format. With trained special tokens, also their number and the end
            token.
        recipe: the resolved recipe.
        sources: for each source, rows read, kept and dropped by reason, unused positives, batches, remainder,
            truncated, tokens, traits.
        prompts: prompts of an exported model: ``query``, ``document`` and those that the recipe names.
        shards: for each file, file, bytes, sha256, batches, packs, tokens.
        end_token_id: id of the token that ends a decoded text; only with trained special tokens.
        teacher: model, dimension, prompt, normalized and other data that identifies the teacher. None if the shards
            have no teacher column.
    """

    version: int
    tokenizer_sha256: str
    anchor_token_id: int
    template: dict[str, Any]
    recipe: dict[str, Any]
    sources: list[dict[str, Any]]
    prompts: dict[str, str]
    shards: list[dict[str, Any]]
    end_token_id: int | None = None
    teacher: dict[str, Any] | None = None

    @property
    def first_special_id(self) -> int:
        """Id of the first trained special token; the last one is the anchor token."""
        return self.anchor_token_id - self.template["special_tokens"] + 1

    @property
    def num_batches(self) -> int:
        return sum(shard["batches"] for shard in self.shards)

    @property
    def num_epochs(self) -> int:
        """Number of epochs in the folder. They follow one another and have the same number of batches."""
        return self.recipe.get("epochs", 1)  # absent in shards from versions that packed only one epoch

    @property
    def batches_per_epoch(self) -> int:
        return self.num_batches // self.num_epochs

    @property
    def pack_multiple(self) -> int:
        return self.recipe["batch"]["pack_multiple"]

    def write(self, folder: Path) -> None:
        """Write the index atomically: to a temporary file, then rename. Leave out fields that are None."""
        stored = {key: value for key, value in asdict(self).items() if value is not None}
        beside = folder / (INDEX_NAME + ".tmp")
        beside.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, folder / INDEX_NAME)


def read_index(folder: Path) -> Index:
    """Read and check ``index.json``.

    Raises:
        ShardError: the folder is missing or unfinished, or the index is unreadable or has another format version.
    """
    file = folder / INDEX_NAME
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder of shards; run `python -m data_prep pack` first")
    if not file.is_file():
        raise ShardError(f"{folder}: unfinished, it has no {INDEX_NAME}; run `python -m data_prep pack` again")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        version = raw["version"]
        if version not in (FORMAT_VERSION, TEACHER_VERSION):
            raise ShardError(
                f"{file}: format version {version}, this program reads {FORMAT_VERSION} and {TEACHER_VERSION}; "
                "pack again"
            )
        index = Index(**raw)
        _check(index)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{file}: not a readable index ({error}); pack again") from error
    if (index.teacher is None) == (version == TEACHER_VERSION):
        raise ShardError(f"{file}: format version {version}, but teacher is {index.teacher}; pack again")
    return index


def _check(index: Index) -> None:
    """Check the types of the values that readers rely on: a damaged index may still be valid JSON.

    Raises:
        ValueError: a value has the wrong type, a count is below 1, or the index lists no shards.
        KeyError: a value is missing.
    """
    expected: dict[str, tuple[Any, type]] = {
        **{name: (getattr(index, name), dict) for name in ("template", "recipe", "prompts")},
        **{name: (getattr(index, name), list) for name in ("sources", "shards")},
        "anchor_token_id": (index.anchor_token_id, int),
    }
    _check_kinds(expected)
    batch = index.recipe["batch"]
    _check_kinds({"recipe.batch": (batch, dict), "recipe.text": (index.recipe.get("text", {}), dict)})
    counts = {"recipe.batch.pack_multiple": batch["pack_multiple"], "recipe.epochs": index.num_epochs}
    for number, shard in enumerate(index.shards):
        _check_kinds({f"shards.{number}": (shard, dict)})
        _check_kinds({f"shards.{number}.file": (shard["file"], str)})
        counts |= {f"shards.{number}.{name}": shard[name] for name in ("bytes", "batches", "packs")}
    _check_kinds({name: (count, int) for name, count in counts.items()})
    empty = next((name for name, count in counts.items() if count < 1), None)
    if empty is not None or not index.shards:
        raise ValueError(f"{empty} is {counts[empty]}, expected at least 1" if empty else "it lists no shards")


def _check_kinds(values: dict[str, tuple[Any, type]]) -> None:
    for name, (value, kind) in values.items():
        if type(value) is not kind:
            raise ValueError(f"{name} is {str(value)[:40]}, expected {kind.__name__}")


def index_hash(folder: Path) -> str:
    """Return the sha256 (hex) of index.json, which identifies the data of a run."""
    return hashlib.sha256((folder / INDEX_NAME).read_bytes()).hexdigest()
