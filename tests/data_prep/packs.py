"""Helpers for tests of packing: sections for recipes' sources, and shards and folders in comparable form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anchor.data.shards import Batch, ShardReader
from anchor.errors import AnchorError, DataError
from data_prep.inspection.verify import verify
from data_prep.packing.pack import pack

MakeRecipe = Callable[..., Path]


def files_source(path: Path, **changes: Any) -> dict[str, Any]:
    source = {"kind": "files", "name": "small", "path": str(path), "columns": {"negatives": ["negative"]}}
    return source | {"instructions": []} | changes


def packed(recipe: Path, *overrides: str) -> ShardReader:
    pack(str(recipe), list(overrides))
    reader = ShardReader(recipe.parent / "shards")
    verify(reader)
    return reader


def contents(reader: ShardReader) -> list[tuple[Any, ...]]:
    """Return everything in the shards, in order."""
    batches: list[Batch] = [reader.read(i) for i in range(len(reader))]
    return [
        (batch.source, pack.input_ids.tolist(), pack.pair_ids.tolist(), pack.text_ids.tolist(), pack.roles.tolist())
        for batch in batches
        for pack in batch.packs
    ]


def refusal(recipe: Path, kind: type[AnchorError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        pack(str(recipe), [])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
