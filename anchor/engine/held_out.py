"""Loss and retrieval on held-out shards during training.

1. Compute the objective's own loss and metrics on each of the first batches, without gradient or dropout. Average each
   metric over the batches that have it.
2. Put all documents of these batches into one pool. A query's rank is the number of documents that score at least as
   high as its positive, not counting copies of the positive. A tie counts against the model, so equal vectors score
   nothing. nDCG@10 with one relevant document is ``1 / log2(rank + 2)`` below rank 10 (Järvelin & Kekäläinen 2002).
"""

from collections import Counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anchor import dist
from anchor.config.train_recipe import EvaluationSection
from anchor.data.batches import check_ranks, rank_packs, to_tensors
from anchor.data.index import Index
from anchor.data.records import POSITIVE, QUERY
from anchor.data.shards import Batch, Pack, ShardReader
from anchor.engine.deepspeed import Engine
from anchor.engine.step import objective_of, reduced
from anchor.errors import ShardError
from anchor.objectives.base import Output, Shares, add_shares

_TOP = 10
_TEACHER_KEYS = ("dimension", "normalized", "prompt", "sha256")
_CHUNK_QUERIES = 1024
_TIE = 1e-6  # cosine; summing one dot product in different orders in float32 differs by less


class HeldOut:
    """Held-out batches, and the evaluation of a model on them.

    Args:
        section: the recipe's ``evaluation``.
        index: index of the shards trained on.
        world_size: number of ranks.
        where: the recipe's path, for messages.

    Raises:
        ShardError: the held-out shards have another tokenizer, template or teacher, or do not fit the number of ranks.
    """

    def __init__(self, section: EvaluationSection, index: Index, world_size: int, where: str) -> None:
        self.reader = ShardReader(section.shards)
        theirs = self.reader.index
        if (theirs.tokenizer_sha256, theirs.template) != (index.tokenizer_sha256, index.template):
            raise ShardError(
                f"{where}: evaluation.shards ({section.shards}) and data.shards were packed with different tokenizers "
                "or templates; pack the held-out pairs with the training recipe's"
            )
        _check_teacher(theirs.teacher, index.teacher, section, where)
        check_ranks(theirs.pack_multiple, world_size, section.shards, where)
        self.num_batches = min(section.max_batches, len(self.reader))

    def __call__(self, engine: Engine) -> dict[str, float]:
        """Return the ``held_out/...`` metrics; every rank calls it."""
        total: Shares = {}
        measured: Counter[str] = Counter()
        queries: list[_Side] = []
        documents: list[_Side] = []
        with engine.evaluating():
            for number in range(self.num_batches):
                batch = self.reader.read(number)
                packs, embeddings, shares = _forward(engine, batch)
                total = add_shares(total, {f"held_out/{name.replace('/', '_')}": s for name, s in shares.items()})
                measured.update(f"held_out/{name.replace('/', '_')}" for name in shares)
                queries.append(_Side.of(packs, embeddings, queries=True))
                documents.append(_Side.of(packs, embeddings, queries=False))
            metrics = {name: value / measured[name] for name, value in reduced(total).items()}
            return metrics | _retrieval(_Side.joined(queries), _Side.joined(documents), engine.ranks.device)


def _check_teacher(
    theirs: dict[str, Any] | None, ours: dict[str, Any] | None, section: EvaluationSection, where: str
) -> None:
    """Refuse held-out shards whose teacher column differs in meaning from the training shards'."""
    if ours is None:
        return
    if theirs is None:
        raise ShardError(
            f"{where}: evaluation.shards ({section.shards}) has no teacher's embeddings, data.shards has; run "
            "`python -m data_prep teach` on it with the same teacher"
        )
    differing = [
        f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} in data.shards"
        for key in _TEACHER_KEYS
        if theirs.get(key) != ours.get(key)
    ]
    if differing:
        raise ShardError(
            f"{where}: evaluation.shards ({section.shards}) was taught by another teacher: {'; '.join(differing)}; run "
            "`python -m data_prep teach` on it with the same teacher"
        )


class _Side:
    """One side of this rank's pairs: vectors, hashes of the texts, and for queries the scores of their positives."""

    def __init__(self, vectors: Float[Tensor, "B D"], text_ids: Int[Tensor, " B"], scores: Float[Tensor, " B"]) -> None:
        self.vectors, self.text_ids, self.scores = vectors, text_ids, scores

    @classmethod
    def of(cls, packs: list[Pack], embeddings: list[Tensor], *, queries: bool) -> "_Side":
        """Return the queries, each with its positive's score and text hash, or all documents."""
        vectors, text_ids, scores = [], [], []
        for pack, rows in zip(packs, embeddings, strict=True):
            at = {role: _by_pair(pack, role) for role in (QUERY, POSITIVE)}
            chosen = at[QUERY] if queries else np.flatnonzero(pack.roles != QUERY)
            named = at[POSITIVE] if queries else chosen
            vectors.append(rows[torch.from_numpy(chosen)])
            text_ids.append(torch.from_numpy(pack.text_ids[named]).to(rows.device))
            positives = rows[torch.from_numpy(at[POSITIVE])] if queries else vectors[-1]
            scores.append((vectors[-1] * positives).sum(dim=1))
        return cls(torch.cat(vectors), torch.cat(text_ids), torch.cat(scores))

    @classmethod
    def joined(cls, sides: list["_Side"]) -> "_Side":
        return cls(*(torch.cat([getattr(side, name) for side in sides]) for name in ("vectors", "text_ids", "scores")))


def _by_pair(pack: Pack, role: int) -> Int[np.ndarray, " B"]:
    """Return the segments of a role in the order of their pairs."""
    segments = np.flatnonzero(pack.roles == role)
    return segments[np.argsort(pack.pair_ids[segments], kind="stable")]


def _forward(engine: Engine, batch: Batch) -> tuple[list[Pack], list[Tensor], Shares]:
    """Return this rank's packs of a batch, their unit vectors, and its shares of the objective's metrics."""
    objective, ranks = objective_of(engine), engine.ranks
    packs = [objective.prepare(batch.packs[i]) for i in rank_packs(len(batch.packs), ranks.rank, ranks.world_size)]
    outputs: list[Output] = [engine.forward(to_tensors(pack, ranks.device), batch) for pack in packs]
    embeddings = [output.embeddings for output in outputs if output.embeddings is not None]
    shares: Shares = {}
    if objective.pooled_loss is not None:
        shares = objective.pooled_loss(torch.cat(embeddings), batch, ranks.rank, ranks.world_size)[1]
    for output in outputs:
        shares = add_shares(shares, output.metrics)
    return packs, embeddings, shares


def _retrieval(queries: _Side, documents: _Side, device: torch.device) -> dict[str, float]:
    counts = dist.gather_objects((len(queries.vectors), len(documents.vectors)))
    per_rank = [count for _, count in counts]
    pool = dist.all_gather_with_grad(documents.vectors, per_rank)
    pool_ids = torch.cat([ids.to(device) for ids in dist.gather_objects(documents.text_ids.cpu())])
    found = torch.zeros(2, dtype=torch.float64, device=device)
    for rows in torch.arange(len(queries.vectors), device=device).split(_CHUNK_QUERIES):
        scores = queries.vectors[rows] @ pool.T
        other: Bool[Tensor, "C N"] = queries.text_ids[rows, None] != pool_ids[None, :]
        # "Not less" instead of "at least": a similarity that is NaN then counts against the model.
        rank = (~(scores < queries.scores[rows, None] - _TIE) & other).sum(dim=1)
        gain = torch.where(rank < _TOP, 1 / torch.log2(rank.double() + 2), 0.0)
        found += torch.stack([gain.sum(), (rank == 0).double().sum()])
    found = dist.all_reduce_sum(found) / sum(count for count, _ in counts)
    return {"held_out/ndcg_at_10": float(found[0]), "held_out/accuracy_at_1": float(found[1])}
