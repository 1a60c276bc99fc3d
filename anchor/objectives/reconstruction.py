"""Stage I: bidirectional reconstruction (Su et al. 2025, arXiv:2509.03020, algorithm 1).

``L = alpha * sum_documents / N_document + (1 - alpha) * sum_queries / N_query``

The sums are over the negative log-likelihoods of the target tokens: the body (with its instruction if the recipe says
so), then the anchor token. N counts the target tokens of the whole batch, so the mean is exact over ranks and packs
without communication. A direction with weight zero is not computed.

An optional term adds ``weight * InfoNCE`` of the same anchor states (:mod:`anchor.objectives.info_nce`).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from anchor.config.objectives import ReconstructionSection
from anchor.data.batches import PackTensors
from anchor.data.packing import wrong_partners_of
from anchor.data.records import POSITIVE, QUERY
from anchor.data.shards import Batch, Pack
from anchor.models.embedder import unit_vectors
from anchor.models.reconstructor import DecodeOptions, Reconstructor, TargetWeights
from anchor.objectives.base import JointObjective, SeparableObjective, Shares
from anchor.objectives.contrastive import ContrastiveTerm


class _Reconstruction:
    """Weights and metrics of the loss for a batch. It has no parameters."""

    def __init__(self, section: ReconstructionSection, reconstructor: Reconstructor) -> None:
        self.alpha, self.target, self.reconstructor = section.alpha, section.target, reconstructor

    def target_tokens(self, batch: Batch) -> tuple[int, int]:
        """Return the number of target tokens in the batch's queries and in its positives, the divisors of the sums."""
        if self.target == "body":
            return batch.query_target_tokens, batch.document_target_tokens
        return self._counted(batch, lambda pack: np.ones(len(pack.roles), dtype=bool))

    def comparable_tokens(self, batch: Batch) -> tuple[int, int]:
        """Return the same counts for only those pairs that have a wrong partner in their pack."""
        return self._counted(batch, lambda pack: wrong_partners_of(pack.roles, pack.text_ids) >= 0)

    def _counted(self, batch: Batch, chosen: Callable[[Pack], np.ndarray]) -> tuple[int, int]:
        counts = [0, 0]
        for pack in batch.packs:
            tokens = (pack.body_ends - self.reconstructor.target_starts(pack) + 1) * chosen(pack)
            for role in (QUERY, POSITIVE):
                counts[role] += int(tokens[pack.roles == role].sum(dtype=np.int64))
        return counts[QUERY], counts[POSITIVE]

    def weights(self, batch: Batch) -> TargetWeights:
        query_tokens, document_tokens = self.target_tokens(batch)
        return TargetWeights(
            query=(1.0 - self.alpha) / query_tokens if self.alpha < 1 else None,
            document=self.alpha / document_tokens if self.alpha > 0 else None,
        )

    def metrics(self, output: tuple[Tensor, ...], batch: Batch) -> Shares:
        loss, nll, _, dependence = output
        shares = {"loss/total_nats": loss.detach()}
        tokens, comparable = self.target_tokens(batch), (0, 0)
        if not self.reconstructor.training:
            comparable = self.comparable_tokens(batch)
        for role, direction, weight in (
            (QUERY, "document_to_query", 1 - self.alpha),
            (POSITIVE, "query_to_document", self.alpha),
        ):
            if weight:
                shares[f"loss/{direction}_nats"] = nll[role] / tokens[role]
            if weight and comparable[role]:
                shares[f"dependence/{direction}_nats"] = dependence[0, role] / comparable[role]
                shares[f"dependence/{direction}_without_inputs_nats"] = dependence[1, role] / comparable[role]
        return shares


class ReconstructionObjective(SeparableObjective):
    """Reconstruct queries from their documents' anchors and documents from their queries'; ignore hard negatives.

    Args:
        causal_lm: the model, both encoder and decoder.
        section: the recipe's ``objective``.
        prefix_tokens: length of the template's prefix in the shards; targets include the instruction. If None, targets
            are the bare texts.
        decode_prefix_ids: tokens before the anchor vector in every decode row.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        section: ReconstructionSection,
        prefix_tokens: int | None = None,
        decode_prefix_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.decode_prefix_ids = decode_prefix_ids
        options = DecodeOptions(decode_prefix_ids, section.input_dropout, section.anchor_vector == "centred")
        self.reconstructor = Reconstructor(causal_lm, prefix_tokens, options)
        self.centres = self.reconstructor.centres
        self._loss = _Reconstruction(section, self.reconstructor)

    def prepare(self, pack: Pack) -> Pack:
        return pack.select(pack.roles <= POSITIVE)

    def forward(self, pack: PackTensors, batch: Batch) -> tuple[Tensor, ...]:
        return self.reconstructor(pack, self._loss.weights(batch))

    def embeddings(self, output: tuple[Tensor, ...]) -> Float[Tensor, "S D"]:
        return unit_vectors(output[2])

    def metrics(self, output: tuple[Tensor, ...], batch: Batch) -> Shares:
        return self._loss.metrics(output, batch)


class JointReconstructionObjective(JointObjective):
    """Reconstruction plus a contrastive term over the same encode pass. Only the contrastive term uses hard negatives.

    Args:
        causal_lm, section, prefix_tokens, decode_prefix_ids: as in :class:`ReconstructionObjective`;
            ``section.contrastive`` must be set.

    Raises:
        ValueError: the section has no contrastive term.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        section: ReconstructionSection,
        prefix_tokens: int | None = None,
        decode_prefix_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        if section.contrastive is None:
            raise ValueError("no contrastive term; use ReconstructionObjective")
        self.decode_prefix_ids = decode_prefix_ids
        options = DecodeOptions(decode_prefix_ids, section.input_dropout, section.anchor_vector == "centred")
        self.reconstructor = Reconstructor(causal_lm, prefix_tokens, options)
        self.centres = self.reconstructor.centres
        self._loss = _Reconstruction(section, self.reconstructor)
        self._term = ContrastiveTerm(section.contrastive, causal_lm.config.hidden_size)
        self._weight = section.contrastive.weight

    def forward(self, pack: PackTensors, batch: Batch, embeddings_only: bool = False) -> Tensor | tuple[Tensor, ...]:
        if embeddings_only:
            return self.reconstructor.embedder(pack)
        output = self.reconstructor(pack, self._loss.weights(batch))
        return unit_vectors(output[2]), *output

    def metrics(self, output: tuple[Tensor, ...], batch: Batch) -> Shares:
        return self._loss.metrics(output[1:], batch)

    def loss(self, embeddings: Tensor, batch: Batch, rank: int, world_size: int) -> tuple[Tensor, Shares]:
        return self._term.joint_loss(self._weight, embeddings, batch, rank, world_size)
