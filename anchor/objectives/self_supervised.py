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

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from anchor.config.objectives import SelfSupervisedSection
from anchor.data.batches import PackTensors
from anchor.data.records import POSITIVE, QUERY
from anchor.data.shards import Batch, Pack
from anchor.models.embedder import unit_vectors
from anchor.models.self_supervisor import SelfSupervisor
from anchor.models.special_tokens import SpecialTokens
from anchor.objectives.base import JointObjective, SeparableObjective, Shares
from anchor.objectives.contrastive import ContrastiveTerm


class _SelfSupervision:
    """Weights and metrics of the two losses for a batch. It has no parameters."""

    def __init__(self, section: SelfSupervisedSection) -> None:
        self.alignment, self.reconstruction = section.alignment_weight, section.reconstruction_weight

    def token_weight(self, batch: Batch) -> float | None:
        """Return the weight of a target token's negative log-likelihood; None if nothing is decoded."""
        return self.reconstruction / batch.document_target_tokens if self.reconstruction else None

    def losses(
        self,
        embeddings: Float[Tensor, "N D"],
        teacher: Float[Tensor, "N D"],
        decoded: tuple[Tensor, Tensor],
        batch: Batch,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return this pack's shares of the loss (with gradient), ``L_align``, ``L_rec`` and the mean cosine.

        Args:
            embeddings: e of the pack's queries, not normalised.
            teacher: t of their answers, float32.
            decoded: weighted and unweighted sums of the target tokens' negative log-likelihoods.
            batch: the batch, for its totals.
        """
        wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        alignment = (wide - teacher).square().sum() / (batch.num_pairs * teacher.shape[1])
        cosine = (unit_vectors(wide.detach()) * unit_vectors(teacher)).sum() / batch.num_pairs
        # Keep the term even at weight 0: the optimiser expects the alignment's parameters to have a (zero) gradient.
        loss = self.alignment * alignment + decoded[0]
        return loss, alignment.detach(), decoded[1] / batch.document_target_tokens, cosine

    def metrics(self, losses: tuple[Tensor, ...]) -> Shares:
        loss, alignment, reconstruction, cosine = losses[:4]
        shares = {
            "loss/total_nats": loss.detach(),
            "loss/alignment_mean_square": alignment,
            "embedding/teacher_cosine": cosine,
        }
        if self.reconstruction:
            shares["loss/reconstruction_nats"] = reconstruction
        return shares


class SelfSupervisedObjective(SeparableObjective):
    """Align a query's special tokens with the teacher's embedding of its answer, and reconstruct the answer.

    Only queries are encoded; hard negatives are ignored.

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
        self.decode_prefix_ids = decode_prefix_ids
        self.supervisor = SelfSupervisor(causal_lm, special, end_token_id, decode_prefix_ids)
        self._loss = _SelfSupervision(section)

    def prepare(self, pack: Pack) -> Pack:
        # Without a decode pass, training does not read answers; evaluation still needs them for retrieval.
        queries_only = self.training and not self._loss.reconstruction
        return pack.select(pack.roles <= (QUERY if queries_only else POSITIVE))

    def forward(self, pack: PackTensors, batch: Batch) -> tuple[Tensor, ...]:
        embeddings, *decoded = self.supervisor(pack, self._loss.token_weight(batch))
        teacher = _teacher(pack)
        losses = self._loss.losses(embeddings, teacher, (decoded[0], decoded[1]), batch)
        queries = torch.from_numpy(pack.pack.roles == QUERY).to(embeddings.device)
        return *losses, queries, embeddings.detach(), teacher

    def embeddings(self, output: tuple[Tensor, ...]) -> Float[Tensor, "S D"]:
        """Return each query's own unit vector, and the teacher's for each positive.

        Positives are not encoded. The teacher's vector is the one that the query should retrieve.
        """
        queries, embeddings, teacher = output[4:]
        own = unit_vectors(embeddings)
        vectors = own.new_empty(len(queries), own.shape[1])
        vectors[queries], vectors[~queries] = own, unit_vectors(teacher).to(own.dtype)
        return vectors

    def metrics(self, output: tuple[Tensor, ...], batch: Batch) -> Shares:
        return self._loss.metrics(output)


class JointSelfSupervisedObjective(JointObjective):
    """Self-supervision plus a contrastive term, for which positives and hard negatives are encoded too.

    Args:
        causal_lm, special, section, end_token_id, decode_prefix_ids: as in :class:`SelfSupervisedObjective`;
            ``section.contrastive`` must be set.

    Raises:
        ValueError: the section has no contrastive term.
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
        if section.contrastive is None:
            raise ValueError("no contrastive term; use SelfSupervisedObjective")
        self.decode_prefix_ids = decode_prefix_ids
        self.supervisor = SelfSupervisor(causal_lm, special, end_token_id, decode_prefix_ids)
        self._loss = _SelfSupervision(section)
        self._term = ContrastiveTerm(section.contrastive, special.dimension)
        self._weight = section.contrastive.weight

    def forward(self, pack: PackTensors, batch: Batch, embeddings_only: bool = False) -> Tensor | tuple[Tensor, ...]:
        weight = None if embeddings_only else self._loss.token_weight(batch)
        embeddings, *decoded = self.supervisor(pack, weight, encode_all=True)
        if embeddings_only:
            return unit_vectors(embeddings)
        queries = torch.from_numpy(pack.pack.roles == QUERY).to(embeddings.device)
        losses = self._loss.losses(embeddings[queries], _teacher(pack), (decoded[0], decoded[1]), batch)
        return unit_vectors(embeddings), *losses

    def metrics(self, output: tuple[Tensor, ...], batch: Batch) -> Shares:
        return self._loss.metrics(output[1:])

    def loss(self, embeddings: Tensor, batch: Batch, rank: int, world_size: int) -> tuple[Tensor, Shares]:
        return self._term.joint_loss(self._weight, embeddings, batch, rank, world_size)


def _teacher(pack: PackTensors) -> Tensor:
    if pack.teacher is None:
        raise ValueError("no teacher in this pack")
    return pack.teacher
