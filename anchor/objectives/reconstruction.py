"""Stage I: bidirectional reconstruction (Su et al. 2025, arXiv:2509.03020, algorithm 1).

``L = alpha * sum_documents / N_document + (1 - alpha) * sum_queries / N_query``

The sums are over the negative log-likelihoods of the target tokens: the body (with its instruction if the recipe says
so), then the anchor token. N counts the target tokens of the whole batch, so the mean is exact over ranks and packs
without communication. A direction with weight zero is not computed.

An optional term adds ``weight * InfoNCE`` of the same anchor states (:mod:`anchor.objectives.info_nce`).
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from anchor.config.objectives import ReconstructionSection
from anchor.config.train_recipe import TrainRecipe
from anchor.data.batches import PackTensors
from anchor.data.decode_prefix import decode_prefix_of, template_prefix_ids
from anchor.data.packing import wrong_partners_of
from anchor.data.records import POSITIVE, QUERY
from anchor.data.shards import Batch, Pack
from anchor.models.embedder import unit_vectors
from anchor.models.reconstructor import DecodeOptions, Reconstructor, TargetWeights
from anchor.objectives.base import Objective, Output, PackShape, Shares, Whole
from anchor.objectives.contrastive import ContrastiveTerm


class ReconstructionObjective(Objective):
    """Reconstruct queries from their documents' anchors and documents from their queries'.

    Hard negatives are read only by the contrastive term, if there is one.

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
        options = DecodeOptions(decode_prefix_ids, section.input_dropout, section.anchor_vector == "centred")
        self.reconstructor = Reconstructor(causal_lm, prefix_tokens, options)
        self.centres = self.reconstructor.centres
        self.alpha, self.target = section.alpha, section.target
        if section.contrastive is not None:
            self.pooled_loss = ContrastiveTerm(section.contrastive, causal_lm.config.hidden_size)

    def prepare(self, pack: Pack) -> Pack:
        return pack if self.pooled_loss is not None else pack.select(pack.roles <= POSITIVE)

    def forward(self, pack: PackTensors, batch: Batch, embeddings_only: bool = False) -> Output:
        if embeddings_only:
            return Output(self.reconstructor.embedder(pack), None, {})
        loss, nll, anchors, dependence = self.reconstructor(pack, self.weights(batch))
        embeddings = unit_vectors(anchors) if self.reads_embeddings else None
        return Output(embeddings, loss, self._metrics(loss, nll, dependence, batch))

    def step_shape(self, pack: Pack) -> PackShape:
        rows = np.isin(pack.roles, [role for role, weight in self._directions() if weight])
        bodies = (pack.body_ends - self.reconstructor.target_starts(pack))[rows].astype(np.int64)
        prefix = len(self.reconstructor.options.decode_prefix_ids) + 1
        return PackShape(pack.segment_lengths.astype(np.int64), bodies + prefix, int((bodies + 1).sum()))

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
        """Return the weight of a target token on each side."""
        query_tokens, document_tokens = self.target_tokens(batch)
        return TargetWeights(
            query=(1.0 - self.alpha) / query_tokens if self.alpha < 1 else None,
            document=self.alpha / document_tokens if self.alpha > 0 else None,
        )

    def _directions(self) -> tuple[tuple[int, float], tuple[int, float]]:
        """Return the roles to decode, each with its direction's weight."""
        return (QUERY, 1 - self.alpha), (POSITIVE, self.alpha)

    def _metrics(self, loss: Tensor, nll: Tensor, dependence: Tensor, batch: Batch) -> Shares:
        shares = {"loss/total_nats": loss.detach()}
        tokens, comparable = self.target_tokens(batch), (0, 0)
        if not self.training:
            comparable = self.comparable_tokens(batch)
        for role, weight in self._directions():
            direction = "document_to_query" if role == QUERY else "query_to_document"
            if weight:
                shares[f"loss/{direction}_nats"] = nll[role] / tokens[role]
            if weight and comparable[role]:
                shares[f"dependence/{direction}_nats"] = dependence[0, role] / comparable[role]
                shares[f"dependence/{direction}_without_inputs_nats"] = dependence[1, role] / comparable[role]
        return shares


def build(causal_lm: PreTrainedModel, recipe: TrainRecipe, whole: Whole) -> ReconstructionObjective:
    """Build the recipe's objective around a backbone."""
    section, shards = recipe.objective, recipe.data.shards
    if not isinstance(section, ReconstructionSection):
        raise TypeError(f"not a reconstruction recipe: {section.kind}")
    prefix_tokens = len(template_prefix_ids(shards)) if section.target == "instruction_and_body" else None
    return ReconstructionObjective(causal_lm, section, prefix_tokens, decode_prefix_of(recipe))
