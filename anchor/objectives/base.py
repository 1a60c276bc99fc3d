"""The contract between an objective and the engine's step.

A loss has up to two parts:

* a **local** loss: a sum over packs, with weights that depend only on the batch's totals;
* a **pooled** loss: a function of the embeddings of all packs on all ranks.

The engine accumulates the local loss pack by pack. With a pooled loss it collects the embeddings of all packs first.
Losses and metrics are **shares**: summed over all packs and ranks, they give the value of the step. No value is a mean
of means.

An objective of kind ``k`` is the section of that kind in `anchor/config/objectives.py`, and a module
``anchor.objectives.k`` with a function ``build``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from anchor.data.batches import PackTensors
from anchor.data.shards import Batch, Pack
from anchor.models.centres import Centres

Shares = dict[str, Tensor]
"""Metric name (``group/what_unit``) -> this pack's or rank's share of the value, a float32 scalar without gradient."""

Whole = Callable[[Tensor], AbstractContextManager[object]]
"""Context in which a parameter partitioned by ZeRO-3 is whole and can be read by every rank."""


class Output(NamedTuple):
    """Result of one pack's forward pass.

    Attributes:
        embeddings: unit vectors ``S D`` (float32) of the segments; None in training if no pooled loss reads them.
        loss: the pack's share of the local loss, with gradient; None without a local loss.
        metrics: the pack's shares of the local loss's metrics.
    """

    embeddings: Tensor | None
    loss: Tensor | None
    metrics: Shares


class PooledLoss(ABC):
    """A loss over the embeddings of the whole batch."""

    @abstractmethod
    def __call__(
        self, embeddings: Float[Tensor, "S D"], batch: Batch, rank: int, world_size: int
    ) -> tuple[Float[Tensor, ""], Shares]:
        """Return this rank's share of the loss and of the metrics. Every rank must call this, because it communicates.

        Args:
            embeddings: unit vectors of this rank's segments, pack after pack.
            batch: the whole batch, with all ranks' packs.
            rank, world_size: select this rank's packs.
        """

    @abstractmethod
    def gathered_segments(self, num_pairs: int, num_segments: float) -> float:
        """Return how many of a batch's embeddings are gathered from all ranks."""


@dataclass(frozen=True, slots=True)
class PackShape:
    """Work that an objective does for one pack.

    Attributes:
        encoded: tokens of each segment that is encoded.
        decoded: tokens of each row of the decode pass; empty without one.
        head_rows: number of rows that the head computes.
    """

    encoded: Int[np.ndarray, " E"]
    decoded: Int[np.ndarray, " R"]
    head_rows: int


class Objective(nn.Module, ABC):
    """The module that the engine wraps. Only its ``forward`` may use parameters.

    Attributes:
        pooled_loss: the pooled loss; None if the loss is a sum over packs.
        centres: frame means, updated after the optimiser step and stored in checkpoints and exports; None if unused.
    """

    pooled_loss: PooledLoss | None = None
    centres: Centres | None = None

    def prepare(self, pack: Pack) -> Pack:
        """Return the part of a pack that this objective reads."""
        return pack

    @abstractmethod
    def forward(self, pack: PackTensors, batch: Batch, embeddings_only: bool = False) -> Output:
        """Compute a pack's embeddings and its share of the local loss.

        Args:
            pack: one pack of this rank.
            batch: the batch it belongs to, for the totals.
            embeddings_only: compute the embeddings alone.
        """

    def step_shape(self, pack: Pack) -> PackShape:
        """Return the work of a prepared pack; by default every segment is encoded and nothing is decoded."""
        return PackShape(pack.segment_lengths.astype(np.int64), np.zeros(0, dtype=np.int64), 0)

    @property
    def reads_embeddings(self) -> bool:
        """Return whether anything reads the embeddings: a pooled loss, or an evaluation."""
        return self.pooled_loss is not None or not self.training


def add_shares(total: Shares, more: Shares) -> Shares:
    """Add shares by name; a missing name counts as zero."""
    return total | {name: total[name] + value if name in total else value for name, value in more.items()}
