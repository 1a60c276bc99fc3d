"""Stage II: InfoNCE over the documents of all ranks (van den Oord et al. 2018, arXiv:1807.03748, eq. 4).

1. The pool is every positive and hard negative of the batch, in the order of the packs, whatever the ranks.
2. Each rank computes the rows of its own queries against the whole pool, gathered with a backward that sums over
   ranks. The sum of the ranks' shares has the gradient of one process that holds the batch.
3. Known false negatives are masked by text identity: documents equal to the query itself or to any positive that
   the batch holds for the query's text.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from anchor import dist
from anchor.config import schema
from anchor.data.batches import PackTensors, rank_packs
from anchor.data.records import QUERY
from anchor.data.shards import Batch
from anchor.models.embedder import Embedder
from anchor.objectives.base import PooledObjective, Shares


def info_nce(
    query: Float[Tensor, "B D"],
    pool: Float[Tensor, "N D"],
    target: Int[Tensor, " B"],
    keep: Bool[Tensor, "B N"],
    *,
    temperature: float,
) -> Float[Tensor, " B"]:
    """InfoNCE of each local query against a pool of documents.

    ``-log( exp(q_i . d_t / tau) / sum_{j kept} exp(q_i . d_j / tau) )``
    (van den Oord et al. 2018, arXiv:1807.03748, eq. 4).

    The caller gathers ``pool`` with :func:`anchor.dist.all_gather_with_grad`, whose backward sums over ranks, and
    divides by the number of queries of the whole batch. No factor of the world size belongs here.

    Args:
        query: unit vectors of the local queries.
        pool: unit vectors of all ranks' documents.
        target: index in ``pool`` of each query's positive.
        keep: False where a document is no negative of the query; must be True at the target.
        temperature: divides the similarities (dimensionless, > 0).

    Returns:
        One term per local query, float32, in nats.

    Raises:
        ValueError: if ``temperature`` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = (query @ pool.T) / temperature
    logits = logits.masked_fill(~keep, -torch.inf)
    return torch.logsumexp(logits, dim=1) - logits.gather(1, target[:, None])[:, 0]


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """Where queries and documents of a batch stand, seen from one rank.

    Attributes:
        local_queries: rows of this rank's embeddings that are queries, in order.
        local_documents: rows of this rank's embeddings that are documents, in order.
        documents_per_rank: documents of every rank.
        target: index in the pool of each local query's positive.
        keep: bool ``B N``; False at known false negatives.
        num_queries: queries of the whole batch.
    """

    local_queries: np.ndarray
    local_documents: np.ndarray
    documents_per_rank: tuple[int, ...]
    target: np.ndarray
    keep: np.ndarray
    num_queries: int


def pool_layout(batch: Batch, rank: int, world_size: int) -> PoolLayout:
    """The pool of a batch and this rank's place in it, from the shards' columns alone.

    Args:
        batch: the whole batch.
        rank, world_size: which packs are this rank's.
    """
    roles = [pack.roles for pack in batch.packs]
    texts = [pack.text_ids for pack in batch.packs]
    all_roles, all_texts = np.concatenate(roles), np.concatenate(texts)
    is_query = all_roles == QUERY
    query_at = np.flatnonzero(is_query)
    query_text, document_text = all_texts[query_at], all_texts[~is_query]
    # A pair's segments stand together: query, positive, hard negatives.
    target = (np.cumsum(~is_query) - 1)[query_at + 1]

    mine = rank_packs(len(batch.packs), rank, world_size)
    local_roles = np.concatenate([roles[i] for i in mine])
    first = sum(int((roles[i] == QUERY).sum()) for i in range(mine.start))
    local = slice(first, first + int((local_roles == QUERY).sum()))
    own_text, own_target = query_text[local], target[local]
    keep = document_text != document_text[own_target][:, None]
    keep &= document_text != own_text[:, None]
    texts_seen, times = np.unique(query_text, return_counts=True)
    for i in np.flatnonzero(np.isin(own_text, texts_seen[times > 1])):
        keep[i] &= ~np.isin(document_text, document_text[target[query_text == own_text[i]]])
    keep[np.arange(len(own_target)), own_target] = True
    return PoolLayout(
        local_queries=np.flatnonzero(local_roles == QUERY),
        local_documents=np.flatnonzero(local_roles != QUERY),
        documents_per_rank=tuple(
            sum(int((roles[i] != QUERY).sum()) for i in rank_packs(len(batch.packs), r, world_size))
            for r in range(world_size)
        ),
        target=own_target,
        keep=keep,
        num_queries=len(query_at),
    )


class ContrastiveObjective(PooledObjective):
    """InfoNCE with hard negatives and the documents of all ranks.

    Args:
        causal_lm: the model.
        section: the recipe's ``objective``.
    """

    def __init__(self, causal_lm: PreTrainedModel, section: schema.ContrastiveObjective) -> None:
        super().__init__()
        self.embedder = Embedder(causal_lm)
        self.temperature = section.temperature

    def forward(self, pack: PackTensors, batch: Batch) -> Tensor:
        return self.embedder(pack)

    def loss(self, embeddings: Tensor, batch: Batch, rank: int, world_size: int) -> tuple[Tensor, Shares]:
        layout = pool_layout(batch, rank, world_size)
        device = embeddings.device
        query = embeddings[torch.from_numpy(layout.local_queries).to(device)]
        documents = embeddings[torch.from_numpy(layout.local_documents).to(device)]
        pool = dist.all_gather_with_grad(documents, layout.documents_per_rank)
        target = torch.from_numpy(layout.target).to(device)
        keep = torch.from_numpy(layout.keep).to(device)
        loss = info_nce(query, pool, target, keep, temperature=self.temperature).sum() / layout.num_queries
        with torch.no_grad():
            cosine = query @ pool.T
            positive = cosine.gather(1, target[:, None])[:, 0]
            negative = cosine.masked_fill(~keep, -torch.inf).scatter(1, target[:, None], -torch.inf).amax(dim=1)
            shares = {
                "loss/total_nats": loss.detach(),
                "embedding/positive_cosine": positive.sum() / layout.num_queries,
                # A query whose every negative is masked has no hardest one: it counts as retrieved.
                "embedding/hardest_negative_cosine": negative.clamp(min=-1.0).sum() / layout.num_queries,
                "embedding/retrieved_fraction": (positive > negative).float().sum() / layout.num_queries,
            }
        return loss, shares
