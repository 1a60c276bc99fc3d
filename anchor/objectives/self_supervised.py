"""Self-supervision: train a frozen LLM's special tokens to represent its own answer to a query (arXiv:2603.10913).

``L = a L_align + b L_rec (+ w InfoNCE)`` with

* ``L_align``: mean of ``(e - t)^2`` over the batch's pairs and the D dimensions; e is the query's embedding, t the
  teacher's embedding of the answer;
* ``L_rec``: mean negative log-likelihood of the batch's target tokens (each answer's body, then the end token), given
  the query's soft prompts;
* InfoNCE over the unit vectors of e for queries, positives and hard negatives (:mod:`anchor.objectives.info_nce`).

Both means are sums over packs divided by counts of the whole batch, so they are exact over ranks and packs without
communication.
"""

from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor.config.objectives import SelfSupervisedSection
from anchor.config.train_recipe import TrainRecipe
from anchor.data.batches import PackTensors
from anchor.data.decode_prefix import decode_prefix_of
from anchor.data.records import POSITIVE, QUERY
from anchor.data.shards import Batch, Pack, read_index
from anchor.models.embedder import unit_vectors
from anchor.models.self_supervisor import SelfSupervisor
from anchor.models.special_tokens import SpecialTokens
from anchor.objectives.base import Objective, Output, PackShape, Whole
from anchor.objectives.contrastive import ContrastiveTerm


class SelfSupervisedObjective(Objective):
    """Align a query's special tokens with the teacher's embedding of its answer, and reconstruct the answer.

    Only queries are encoded; hard negatives are ignored. A contrastive term needs all segments, and encodes them.

    Args:
        causal_lm: the frozen model, or one with adapters.
        special: special tokens and projections.
        section: the recipe's ``objective``.
        end_token_id: ends an answer.
        decode_prefix_ids: tokens before the soft prompts in every decode row.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        special: SpecialTokens,
        section: SelfSupervisedSection,
        end_token_id: int,
        decode_prefix_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.supervisor = SelfSupervisor(causal_lm, special, end_token_id, decode_prefix_ids)
        self.alignment, self.reconstruction = section.alignment_weight, section.reconstruction_weight
        if section.contrastive is not None:
            self.pooled_loss = ContrastiveTerm(section.contrastive, special.dimension)

    def prepare(self, pack: Pack) -> Pack:
        if self.pooled_loss is not None:
            return pack
        # Without a decode pass, training does not read answers; evaluation still needs them for retrieval.
        queries_only = self.training and not self.reconstruction
        return pack.select(pack.roles <= (QUERY if queries_only else POSITIVE))

    def forward(self, pack: PackTensors, batch: Batch, embeddings_only: bool = False) -> Output:
        token_weight = self.reconstruction / batch.document_target_tokens if self.reconstruction else None
        if embeddings_only:
            token_weight = None
        encode_all = self.pooled_loss is not None
        encoded, *decoded = self.supervisor(pack, token_weight, encode_all=encode_all)
        if embeddings_only:
            return Output(unit_vectors(encoded), None, {})
        if pack.teacher is None:
            raise ValueError("no teacher in this pack")
        is_query = torch.from_numpy(pack.pack.roles == QUERY).to(encoded.device)
        own = encoded[is_query] if encode_all else encoded
        # Both losses.
        wide = own.to(torch.promote_types(own.dtype, torch.float32))
        alignment = (wide - pack.teacher).square().sum() / (batch.num_pairs * pack.teacher.shape[1])
        cosine = (unit_vectors(wide.detach()) * unit_vectors(pack.teacher)).sum() / batch.num_pairs
        # Keep the term even at weight 0: the optimiser expects the alignment's parameters to have a (zero) gradient.
        loss = self.alignment * alignment + decoded[0]
        metrics = {
            "loss/total_nats": loss.detach(),
            "loss/alignment_mean_square": alignment.detach(),
            "embedding/teacher_cosine": cosine,
        }
        if self.reconstruction:
            metrics["loss/reconstruction_nats"] = decoded[1] / batch.document_target_tokens
        embeddings = None
        if encode_all:
            embeddings = unit_vectors(encoded)
        elif self.reads_embeddings:
            embeddings = _with_teacher(encoded.detach(), pack.teacher, is_query)
        return Output(embeddings, loss, metrics)

    def step_shape(self, pack: Pack) -> PackShape:
        encoded = pack.segment_lengths.astype(np.int64)
        if self.pooled_loss is None:
            encoded = encoded[pack.roles == QUERY]
        answers = pack.roles == POSITIVE if self.reconstruction else np.zeros(len(pack.roles), dtype=bool)
        bodies = (pack.body_ends - pack.body_starts)[answers].astype(np.int64)
        special = self.supervisor.embedder.special
        prefix = len(self.supervisor.decode_prefix_ids) + special.count
        return PackShape(encoded, bodies + prefix, int((bodies + 1).sum()))


def _with_teacher(
    embeddings: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"], is_query: Bool[Tensor, " S"]
) -> Float[Tensor, "S D"]:
    """Return each query's own unit vector, and the teacher's for each positive.

    Positives are not encoded. The teacher's vector is the one that the query should retrieve.
    """
    own = unit_vectors(embeddings)
    vectors = own.new_empty(len(is_query), own.shape[1])
    vectors[is_query], vectors[~is_query] = own, unit_vectors(teacher).to(own.dtype)
    return vectors


def build(causal_lm: PreTrainedModel, recipe: TrainRecipe, whole: Whole) -> SelfSupervisedObjective:
    """Build the objective with new special tokens near the mean of the backbone's embeddings; every rank calls it.

    Args:
        causal_lm: the backbone, partitioned or not; on the meta device nothing is computed.
        recipe: the training recipe; its shards have special tokens, a teacher and an end token.
        whole: makes a partitioned parameter whole.

    Raises:
        ValueError: the shards have no teacher or no end token.
    """
    section, index = recipe.objective, read_index(recipe.data.shards)
    if not isinstance(section, SelfSupervisedSection):
        raise TypeError(f"not a self-supervised recipe: {section.kind}")
    if index.teacher is None or index.end_token_id is None:
        raise ValueError("shards without a teacher or an end token")
    count, dimension = index.template["special_tokens"], index.teacher["dimension"]
    special = new_special_tokens(causal_lm, count, dimension, index.first_special_id, recipe.seed, whole)
    return SelfSupervisedObjective(causal_lm, special, section, index.end_token_id, decode_prefix_of(recipe))


def new_special_tokens(
    causal_lm: PreTrainedModel, count: int, dimension: int, first_id: int, seed: int, whole: Whole
) -> SpecialTokens:
    """Create special tokens in the backbone's dtype, see :meth:`SpecialTokens.initialise`."""
    embeddings = cast(nn.Embedding, causal_lm.get_input_embeddings()).weight
    with torch.device("meta" if embeddings.is_meta else "cpu"):
        special = SpecialTokens(count, causal_lm.config.hidden_size, dimension, first_id).to(embeddings.dtype)
    if not embeddings.is_meta:
        with whole(embeddings):
            special.initialise(embeddings, seed)
    return special
