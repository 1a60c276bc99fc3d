"""Shards with trained special tokens and a teacher's vectors, drawn at random: nothing here embeds a text."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from anchor.data.shards import TEACHER_VERSION, Batch, ShardReader, ShardWriter

TOKENS, DIMENSION = 3, 12
TEMPLATE = {"kind": "special_tokens", "tokens": TOKENS, "end": "<|im_end|>"}


def teach_at_random(shards: Path, dimension: int = DIMENSION) -> Path:
    """The same shards with a teacher column; a text has the same vector wherever it stands."""
    folder = shards.with_name(f"{shards.name}-taught-{dimension}")
    reader = ShardReader(shards)
    folder.mkdir()
    writer = ShardWriter(folder, teacher=True)
    for number in range(len(reader)):
        batch = reader.read(number)
        packs = tuple(
            dataclasses.replace(pack, teacher=_vectors(pack.text_ids[pack.roles == 1], dimension))
            for pack in batch.packs
        )
        writer.write(Batch(packs, batch.source, batch.query_target_tokens, batch.document_target_tokens))
    writer.close()
    shutil.copytree(shards / "tokenizer", folder / "tokenizer")
    teacher = {"model": "random", "dimension": dimension, "prompt": "", "normalized": True}
    index = dataclasses.replace(reader.index, version=TEACHER_VERSION, teacher=teacher, shards=writer.shards)
    index.write(folder)
    return folder


def _vectors(text_ids: np.ndarray, dimension: int) -> np.ndarray:
    rows = [np.random.default_rng(abs(int(text))).normal(size=dimension) for text in text_ids]
    return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float16)
