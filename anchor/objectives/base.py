"""The contract between an objective and the engine's step.

There are three kinds of loss:

* **separable**: a sum over packs, with weights that depend only on the batch's totals;
* **pooled**: a function of the embeddings of all packs on all ranks;
* **joint**: the sum of a separable and a pooled loss over the same encode pass.

The engine accumulates a separable loss pack by pack. For the others it collects the embeddings first. Losses and
metrics are **shares**: summed over all packs and ranks, they give the value of the step. No value is a mean of means.
"""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from anchor.data.batches import PackTensors
from anchor.data.shards import Batch, Pack
from anchor.models.centres import Centres

Shares = dict[str, Tensor]
"""Metric name (``group/what_unit``) -> this pack's or rank's share of the value, a float32 scalar without gradient."""


class Objective(nn.Module, ABC):
    """The module that the engine wraps. Only its ``forward`` may use parameters.

    Attributes:
        centres: frame means, updated after the optimiser step and stored in checkpoints and exports; None if unused.
    """

    centres: Centres | None = None

    def prepare(self, pack: Pack) -> Pack:
        """Return the part of a pack that this objective reads."""
        return pack

    @abstractmethod
    def embeddings(self, output: Any) -> Float[Tensor, "S D"]:
        """Return the unit vectors (float32) of a pack's segments from the output of ``forward``."""


class SeparableObjective(Objective):
    """A loss that is a sum over packs."""

    @abstractmethod
    def forward(self, pack: PackTensors, batch: Batch) -> tuple[Tensor, ...]:
        """Compute a pack's share of the loss (first, with gradient) and the inputs of :meth:`metrics`.

        Args:
            pack: one pack of this rank.
            batch: the batch it belongs to, for the totals.
        """

    @abstractmethod
    def metrics(self, output: tuple[Tensor, ...], batch: Batch) -> Shares:
        """Return this pack's shares of the metrics from the output of :meth:`forward`."""


class PooledObjective(Objective):
    """A loss over the embeddings of the whole batch."""

    @abstractmethod
    def forward(self, pack: PackTensors, batch: Batch) -> Tensor:
        """Return the unit vectors ``S D`` (float32) of one pack's segments."""

    def embeddings(self, output: Any) -> Float[Tensor, "S D"]:
        return output

    @abstractmethod
    def loss(self, embeddings: Tensor, batch: Batch, rank: int, world_size: int) -> tuple[Tensor, Shares]:
        """Return this rank's share of the loss and of the metrics. Every rank must call this, because it communicates.

        Args:
            embeddings: ``S D``, unit vectors of this rank's segments, pack after pack.
            batch: the whole batch, with all ranks' packs.
            rank, world_size: select this rank's packs.
        """


class JointObjective(PooledObjective):
    """A loss over the embeddings of the whole batch plus a sum over packs, from the same encode pass."""

    @abstractmethod
    def forward(self, pack: PackTensors, batch: Batch, embeddings_only: bool = False) -> Tensor | tuple[Tensor, ...]:
        """Compute a pack's unit vectors, its share of the separable loss, and the inputs of :meth:`metrics`.

        Args:
            pack: one pack of this rank.
            batch: the batch it belongs to, for the totals.
            embeddings_only: compute and return only the unit vectors.

        Returns:
            Unit vectors ``S D``, the share of the separable loss (with gradient), then the inputs of :meth:`metrics`.
        """

    def embeddings(self, output: Any) -> Float[Tensor, "S D"]:
        return output[0]

    @abstractmethod
    def metrics(self, output: tuple[Tensor, ...], batch: Batch) -> Shares:
        """Return this pack's shares of the separable loss's metrics from the output of :meth:`forward`."""


def add_shares(total: Shares, more: Shares) -> Shares:
    """Add shares by name; a missing name counts as zero."""
    return total | {name: total[name] + value if name in total else value for name, value in more.items()}
