"""Control experiment for Stage I: plain next-token training on the same texts, without reconstruction.

1. Run the backbone once over a pack's queries and positives as packed: template, instruction, text, anchor token. Hard
   negatives are left out.
2. Compute ``L = sum / N`` over the tokens of the bare texts and their anchor tokens. Each is predicted from the earlier
   tokens of its own segment: ``-log p(x_t | x_<t)``. Reconstruction has the same targets, but also sees the other side.
3. N counts the targets of the whole batch, so the mean is exact over ranks and packs without communication.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from anchor.config.train_recipe import TrainRecipe
from anchor.data.batches import PackTensors
from anchor.data.packing import cu_seqlens
from anchor.data.records import POSITIVE, QUERY
from anchor.data.shards import Batch, Pack
from anchor.models.embedder import Embedder, unit_vectors
from anchor.models.head import Head, output_layer
from anchor.objectives.base import Objective, Output, PackShape, Whole


@dataclass(frozen=True, slots=True)
class NextTokens:
    """Targets of a pack, and the hidden states that predict them.

    Attributes:
        rows: int64 ``R``; position in the pack of the token before each target.
        targets: int64 ``R``; token ids.
        of_queries: bool ``R``; True if the target belongs to a query.
    """

    rows: np.ndarray
    targets: np.ndarray
    of_queries: np.ndarray


def next_tokens(pack: Pack) -> NextTokens:
    """Return the targets of a pack: each segment's bare text, then its anchor token.

    If a text begins its segment (no template prefix and no instruction), nothing precedes its first token, so that
    token is not a target.
    """
    lengths = pack.segment_lengths.astype(np.int64)
    starts = cu_seqlens(lengths)[:-1].astype(np.int64)
    first = np.maximum(pack.body_starts, 1).astype(np.int64)
    bodies = np.maximum(pack.body_ends - first, 0)
    within = np.arange(bodies.sum()) - np.repeat(bodies.cumsum() - bodies, bodies)
    of_bodies = np.repeat(starts + first, bodies) + within
    targets = np.concatenate([of_bodies, starts + lengths - 1])
    queries = np.concatenate([np.repeat(pack.roles == QUERY, bodies), pack.roles == QUERY])
    order = np.argsort(targets, kind="stable")
    targets = targets[order]
    return NextTokens(targets - 1, pack.input_ids[targets].astype(np.int64), queries[order])


class LanguageModelObjective(Objective):
    """Next-token cross-entropy over the texts of the pairs.

    Args:
        causal_lm: the model.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.embedder = Embedder(causal_lm)
        self.head = Head(output_layer(causal_lm))

    def prepare(self, pack: Pack) -> Pack:
        return pack.select(pack.roles <= POSITIVE)

    def target_tokens(self, batch: Batch) -> tuple[int, int]:
        """Return the number of targets in the batch's queries and in its positives, the divisors of the sums."""
        counts = [batch.query_target_tokens, batch.document_target_tokens]
        for pack in batch.packs:
            for role in (QUERY, POSITIVE):
                unprompted = (pack.roles == role) & (pack.body_starts == 0) & (pack.body_ends > 0)
                counts[role] -= int(unprompted.sum())
        return counts[QUERY], counts[POSITIVE]

    def forward(self, pack: PackTensors, batch: Batch, embeddings_only: bool = False) -> Output:
        device, plan = pack.input_ids.device, next_tokens(pack.pack)
        # 1. Backbone pass.
        inputs = self.embedder.embed_tokens(pack.input_ids)
        hidden = self.embedder.hidden_states(inputs, pack.position_ids, pack.cu_seqlens, pack.max_length)
        embeddings = unit_vectors(hidden[pack.cu_seqlens[1:].long() - 1]) if self.reads_embeddings else None
        # 2. and 3. Head, on the target rows only.
        num_queries, num_documents = self.target_tokens(batch)
        weight = torch.full((len(plan.rows),), 1.0 / (num_queries + num_documents), device=device)
        loss, nll = self.head(
            hidden[torch.from_numpy(plan.rows).to(device)], torch.from_numpy(plan.targets).to(device), weight
        )
        queries = torch.from_numpy(plan.of_queries).to(device)
        metrics = {
            "loss/total_nats": loss.detach(),
            "loss/query_nats": nll[queries].sum() / num_queries,
            "loss/document_nats": nll[~queries].sum() / num_documents,
        }
        return Output(embeddings, loss, metrics)

    def step_shape(self, pack: Pack) -> PackShape:
        return replace(super().step_shape(pack), head_rows=len(next_tokens(pack).rows))


def build(causal_lm: PreTrainedModel, recipe: TrainRecipe, whole: Whole) -> LanguageModelObjective:
    """Build the objective around a backbone."""
    return LanguageModelObjective(causal_lm)
