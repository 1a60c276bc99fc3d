"""Stage II: InfoNCE over the documents of all ranks (van den Oord et al. 2018, arXiv:1807.03748, eq. 4).

1. The pool is every positive and hard negative of the batch, in pack order, independent of the number of ranks
   (:mod:`anchor.objectives.pool`).
2. Each rank computes the rows of its own pairs against the whole pool. The gather's backward sums over ranks, so the
   sum of the ranks' shares has the gradient of one process that holds the batch.
3. :mod:`anchor.objectives.info_nce` describes the options for the denominator, the masks and the dimensions.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from anchor import dist
from anchor.config.objectives import (
    ContrastiveSection,
    ContrastiveTermSection,
    JointContrastiveSection,
    Similarity,
)
from anchor.config.train_recipe import TrainRecipe
from anchor.data.batches import PackTensors
from anchor.data.shards import Batch
from anchor.errors import ConfigError
from anchor.models.embedder import Embedder
from anchor.objectives.base import Objective, Output, PooledLoss, Shares, Whole
from anchor.objectives.info_nce import RowTerms, Softmax, chunked_info_nce
from anchor.objectives.pool import KnownMatches, OwnTexts, PoolLayout, pool_layout

_POSITIVE_FIRST: tuple[Similarity, ...] = (
    "query_to_document",
    "query_to_query",
    "document_to_query",
    "document_to_document",
)


class ContrastiveTerm(PooledLoss):
    """The contrastive loss of a batch's embeddings. It has no parameters.

    Args:
        section: the recipe's coefficients.
        hidden_size: dimension of the embeddings.
        chunk_rows: number of pairs whose similarities exist at a time; None derives it from the device and the pool.

    Raises:
        ConfigError: a Matryoshka dimension is not below the hidden size.
    """

    def __init__(self, section: ContrastiveTermSection, hidden_size: int, *, chunk_rows: int | None = None) -> None:
        if section.matryoshka_dimensions and section.matryoshka_dimensions[-1] >= hidden_size:
            raise ConfigError(
                f"objective: matryoshka_dimensions holds {section.matryoshka_dimensions[-1]}, the model's embeddings "
                f"have {hidden_size}; leave it out, the whole embedding is always trained"
            )
        self.section, self.chunk_rows = section, chunk_rows
        self.dimensions = (*section.matryoshka_dimensions, hidden_size)

    def loss(
        self, embeddings: Float[Tensor, "S D"], batch: Batch, rank: int, world_size: int
    ) -> tuple[Float[Tensor, ""], Shares]:
        """Return this rank's share of the loss, and of the metrics at full dimension; see :class:`PooledLoss`."""
        layout = pool_layout(batch, rank, world_size)
        if self.section.mask_known_matches:
            masks = KnownMatches(layout, embeddings.device, self.section.negatives)
        else:
            masks = OwnTexts(layout, embeddings.device)
        rows, columns = self._gathered(embeddings, layout)
        losses: list[Tensor] = []
        shares: Shares = {}
        for dimension in self.dimensions:
            terms = [
                chunked_info_nce(
                    rows,
                    columns,
                    softmax,
                    masks.keep,
                    temperature=self.section.temperature,
                    margin=self.section.false_negative_margin,
                    dimension=dimension,
                    chunk_rows=self.chunk_rows,
                )
                for softmax in self._softmaxes(layout, embeddings.device)
            ]
            at_dimension = [t.nll.sum() / layout.num_queries for t in terms]
            losses.append(_mean(at_dimension))
            if len(self.dimensions) > 1:
                shares[f"loss/contrastive_{dimension}d_nats"] = losses[-1].detach()
            if dimension == self.dimensions[-1]:
                shares |= self._metrics(terms[0], layout.num_queries)
        return _mean(losses), shares

    def __call__(
        self, embeddings: Float[Tensor, "S D"], batch: Batch, rank: int, world_size: int
    ) -> tuple[Float[Tensor, ""], Shares]:
        """Return :meth:`loss` times the section's weight, if it has one; see :class:`PooledLoss`."""
        loss, shares = self.loss(embeddings, batch, rank, world_size)
        if isinstance(self.section, JointContrastiveSection):
            shares = {"loss/contrastive_nats": loss.detach()} | shares
            loss = self.section.weight * loss
        return loss, {"loss/total_nats": loss.detach()} | shares

    def gathered_segments(self, num_pairs: int, num_segments: float) -> float:
        """Return how many of a batch's embeddings are gathered: documents, and queries if the loss needs them."""
        return gathered_segments(self.section, num_pairs, num_segments)

    def _gathered(
        self, embeddings: Tensor, layout: PoolLayout
    ) -> tuple[dict[str, Float[Tensor, "B D"]], dict[str, Float[Tensor, "_ D"]]]:
        """Return the local pairs by side, and all ranks' texts of the sides that the denominators need."""
        device = embeddings.device
        queries = embeddings[torch.from_numpy(layout.local_queries).to(device)]
        documents = embeddings[torch.from_numpy(layout.local_documents).to(device)]
        rows, columns = (
            {"query": queries},
            {"document": dist.all_gather_with_grad(documents, layout.documents_per_rank)},
        )
        if any(similarity.endswith("_to_query") for similarity in self.section.negatives):
            columns["query"] = dist.all_gather_with_grad(queries, layout.queries_per_rank)
        if any(similarity.startswith("document_to_") for similarity in self.section.negatives):
            rows["document"] = documents[torch.from_numpy(layout.local_target - layout.first_document).to(device)]
        return rows, columns

    def _softmaxes(self, layout: PoolLayout, device: torch.device) -> list[Softmax]:
        """Return a pair's denominators: one joint, or one for its query and one for its document."""
        chosen: list[Similarity] = [s for s in _POSITIVE_FIRST if s in self.section.negatives]
        document = torch.from_numpy(layout.local_target).to(device)
        if self.section.softmax == "joint":
            return [Softmax(tuple(chosen), document)]
        query = torch.arange(layout.local.start, layout.local.stop, device=device)
        return [
            Softmax(tuple(s for s in chosen if s.startswith(side)), target)
            for side, target in (("query", document), ("document", query))
        ]

    def _metrics(self, terms: RowTerms, num_queries: int) -> Shares:
        shares = {
            "embedding/positive_cosine": terms.positive.sum() / num_queries,
            # A query whose negatives are all masked has no hardest one and counts as retrieved.
            "embedding/hardest_negative_cosine": terms.hardest.clamp(min=-1.0).sum() / num_queries,
            "embedding/retrieved_fraction": (terms.positive > terms.hardest).float().sum() / num_queries,
        }
        if self.section.false_negative_margin is not None:
            shares["embedding/over_margin_documents"] = terms.over_margin.sum() / num_queries
        return shares


def _mean(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def gathered_segments(section: ContrastiveTermSection, num_pairs: int, num_segments: float) -> float:
    """Return how many of a batch's embeddings a contrastive term gathers from all ranks."""
    queries = any(similarity.endswith("_to_query") for similarity in section.negatives)
    return num_segments if queries else num_segments - num_pairs


class ContrastiveObjective(Objective):
    """InfoNCE with hard negatives and the documents of all ranks.

    Args:
        causal_lm: the model.
        section: the recipe's ``objective``.
    """

    def __init__(self, causal_lm: PreTrainedModel, section: ContrastiveSection) -> None:
        super().__init__()
        self.embedder = Embedder(causal_lm)
        self.pooled_loss: ContrastiveTerm = ContrastiveTerm(section, causal_lm.config.hidden_size)

    def forward(self, pack: PackTensors, batch: Batch, embeddings_only: bool = False) -> Output:
        return Output(self.embedder(pack), None, {})


def build(causal_lm: PreTrainedModel, recipe: TrainRecipe, whole: Whole) -> ContrastiveObjective:
    """Build the recipe's objective around a backbone."""
    if not isinstance(recipe.objective, ContrastiveSection):
        raise TypeError(f"not a contrastive recipe: {recipe.objective.kind}")
    return ContrastiveObjective(causal_lm, recipe.objective)
