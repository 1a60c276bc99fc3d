"""Stage I: bidirectional reconstruction (Su et al. 2025, arXiv:2509.03020, algorithm 1).

``L = alpha * sum_documents / N_document + (1 - alpha) * sum_queries / N_query``: sums are negative log-likelihoods
of target tokens (body, then the anchor token), N counts the target tokens of the whole batch. Both counts are in
the batch's metadata, so the mean is exact over ranks and packs without communication.
"""

from torch import Tensor
from transformers import PreTrainedModel

from anchor.config import schema
from anchor.data.batches import PackTensors
from anchor.data.records import POSITIVE
from anchor.data.shards import Batch, Pack
from anchor.models.reconstructor import Reconstructor, TargetWeights
from anchor.objectives.base import SeparableObjective, Shares


class ReconstructionObjective(SeparableObjective):
    """The document's anchor reconstructs the query and the other way round; hard negatives are left out.

    Args:
        causal_lm: the model, encoder and decoder at once.
        section: the recipe's ``objective``.
    """

    def __init__(self, causal_lm: PreTrainedModel, section: schema.ReconstructionObjective) -> None:
        super().__init__()
        self.reconstructor = Reconstructor(causal_lm)
        self.alpha = section.alpha

    def prepare(self, pack: Pack) -> Pack:
        return pack.select(pack.roles <= POSITIVE)

    def forward(self, pack: PackTensors, batch: Batch) -> tuple[Tensor, ...]:
        weights = TargetWeights(
            query=(1.0 - self.alpha) / batch.query_target_tokens, document=self.alpha / batch.document_target_tokens
        )
        return self.reconstructor(pack, weights)

    def metrics(self, output: tuple[Tensor, ...], batch: Batch) -> Shares:
        loss, query_nll, document_nll = output
        return {
            "loss/total_nats": loss.detach(),
            "loss/document_to_query_nats": query_nll / batch.query_target_tokens,
            "loss/query_to_document_nats": document_nll / batch.document_target_tokens,
        }
