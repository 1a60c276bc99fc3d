"""Forward and backward of one Stage II step at equal pool, against sentence-transformers' two losses.

    python bench/contrastive_step.py --shards data/squad --model EXPORTED_FOLDER [--json PATH]

All contestants use the same weights, texts (query, positive, one hard negative), temperature and dtype. ``plain`` and
MNRL run the whole batch in one forward. ``cached`` and CachedMNRL run equally many texts at a time: ours all texts of
``mini`` pairs, theirs as many texts of one column.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from anchor.config.objectives import ContrastiveSection
from anchor.data.batches import PackTensors, to_tensors
from anchor.data.records import QUERY
from anchor.data.shards import Batch, Pack, ShardReader
from anchor.engine.deepspeed import Engine
from anchor.engine.grad_cache import pooled_backward
from anchor.errors import exit_on_user_error
from anchor.models.attention import implementation
from anchor.models.backbone import DTYPES, load_causal_lm
from anchor.objectives.base import Output
from anchor.objectives.contrastive import ContrastiveObjective
from bench.harness import alternate, arguments, report

TEMPERATURE = 0.02


class LocalEngine:
    """Single process without DeepSpeed, with the parts of an engine that :func:`pooled_backward` needs."""

    def __init__(self, objective: nn.Module) -> None:
        self.objective = objective
        self.ranks = SimpleNamespace(rank=0, world_size=1)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()


def split(pack: Pack, pairs: int) -> list[Pack]:
    """Cut a pack into packs of ``pairs`` pairs."""
    ordinal = (pack.roles == QUERY).cumsum() - 1
    return [pack.select(ordinal // pairs == part) for part in range(-(-pack.num_pairs // pairs))]


def ours(objective: ContrastiveObjective, batch: Batch, packs: list[PackTensors]) -> dict[str, float]:
    whole = Batch(tuple(p.pack for p in packs), batch.source, batch.query_target_tokens, batch.document_target_tokens)
    engine = cast(Engine, LocalEngine(objective))

    def forward(i: int, *, embeddings_only: bool = False) -> Output:
        return objective(packs[i], whole, embeddings_only)

    shares = pooled_backward(engine, objective.pooled_loss, len(packs), whole, forward)
    objective.zero_grad()
    return {"loss": float(shares["loss/total_nats"])}


def theirs(loss_module: nn.Module, columns: list[dict[str, Any]]) -> dict[str, float]:
    loss = loss_module([dict(column) for column in columns], None)
    loss.backward()
    loss_module.zero_grad()
    return {"loss": float(loss.detach())}


def main() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
    from torch.nn.utils.rnn import pad_sequence

    options = arguments(__doc__ or "", shards="data/squad", model="EXPORT", dtype="bf16", attention="segments", mini=8)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = ShardReader(Path(options.shards)).read(0)
    dtype = DTYPES[options.dtype]
    model: Any = load_causal_lm(options.model, dtype, implementation(options.attention, device.type, dtype))
    model.to(device)
    objective = ContrastiveObjective(model, ContrastiveSection(kind="contrastive", temperature=TEMPERATURE))
    st = SentenceTransformer(options.model, device=str(device), model_kwargs={"torch_dtype": dtype})

    # Leave out the teacher's embeddings: this benchmark does not use them.
    fields = [name for name in Pack.__slots__ if name != "teacher"]
    merged = Pack(*(np.concatenate([getattr(pack, name) for pack in batch.packs]) for name in fields))
    columns = []
    for role in range(int(merged.roles.max()) + 1):
        chosen = merged.select(merged.roles == role)
        parts = torch.from_numpy(chosen.input_ids.astype("int64")).split(chosen.segment_lengths.tolist())
        mask = pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
        columns.append(
            {"input_ids": pad_sequence(list(parts), batch_first=True).to(device), "attention_mask": mask.to(device)}
        )
    plain = [to_tensors(merged, device)]
    cached = [to_tensors(part, device) for part in split(merged, options.mini)]
    mnrl = MultipleNegativesRankingLoss(st, scale=1 / TEMPERATURE)
    cmnrl = CachedMultipleNegativesRankingLoss(st, scale=1 / TEMPERATURE, mini_batch_size=options.mini * len(columns))
    rows = alternate(
        {
            "plain": lambda: ours(objective, batch, plain),
            "cached": lambda: ours(objective, batch, cached),
            "MNRL": lambda: theirs(mnrl, columns),
            "CachedMNRL": lambda: theirs(cmnrl, columns),
        },
        options.turns,
    )
    for row in rows:
        row["pairs_per_second"] = batch.num_pairs / row["seconds"]
    by_name = {row["contestant"]: row for row in rows}
    ratios = {
        "speed": by_name["CachedMNRL"]["seconds"] / by_name["cached"]["seconds"],
        "speed_plain": by_name["MNRL"]["seconds"] / by_name["plain"]["seconds"],
        "peak_memory": by_name["cached"]["peak_gib"] / by_name["CachedMNRL"]["peak_gib"],
        "cached_over_plain_seconds": by_name["cached"]["seconds"] / by_name["plain"]["seconds"],
        "loss": by_name["cached"]["loss"] / by_name["CachedMNRL"]["loss"],
    }
    report("contrastive_step", rows, ratios, options)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
