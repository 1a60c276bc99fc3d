"""Shards with trained special tokens and a random teacher's vectors, and slow references for the losses."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import torch
from reference import segments_of
from torch import Tensor
from transformers import PreTrainedModel

from anchor.data.index import TEACHER_VERSION
from anchor.data.shards import Batch, ShardReader, ShardWriter
from anchor.models.special_tokens import SpecialTokens

TOKENS, DIMENSION, END = 3, 12, 2
TEMPLATE = {"kind": "special_tokens", "tokens": TOKENS, "end": "<|im_end|>"}


def teach_at_random(shards: Path, dimension: int = DIMENSION) -> Path:
    """Write the same shards with a teacher column; equal texts get equal vectors."""
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


def plain_embeddings(model: PreTrainedModel, special: SpecialTokens, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Soft prompts and embedding of one text."""
    count = len(special.rows)
    inputs = torch.cat([model.get_input_embeddings()(ids[:-count]), special.rows])
    hidden = model.base_model(inputs_embeds=inputs[None]).last_hidden_state[0, -count:]
    prompts = hidden @ special.reconstruction.weight.T + special.reconstruction.bias
    return prompts, (prompts @ special.alignment.weight.T + special.alignment.bias).mean(dim=0)


def plain_losses(
    encoder: PreTrainedModel, special: SpecialTokens, batch: Batch, decoder: PreTrainedModel | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``L_align`` and ``L_rec``, one pair at a time, with full logits; the encoder decodes by default."""
    decoder = encoder if decoder is None else decoder
    squares, nll = [], []
    for pack in batch.packs:
        assert pack.teacher is not None
        segments = [s for s in segments_of(pack) if s["role"] <= 1]
        for pair, (query, answer) in enumerate(zip(segments[::2], segments[1::2], strict=True)):
            prompts, embedding = plain_embeddings(encoder, special, query["ids"])
            squares.append((embedding - torch.from_numpy(pack.teacher[pair].astype("float64"))) ** 2)
            body = answer["ids"][slice(*answer["body"])]
            rows = torch.cat([prompts, decoder.get_input_embeddings()(body)])
            logits = decoder(inputs_embeds=rows[None]).logits[0]
            wanted = torch.cat([body, torch.tensor([END])])
            nll.append(torch.nn.functional.cross_entropy(logits[-len(wanted) :].double(), wanted, reduction="none"))
    assert len(squares) == batch.num_pairs > 1
    return torch.stack(squares).mean(), torch.cat(nll).mean()
