"""The contract between an objective and the engine's step.

A loss is **separable** (a sum over packs, with weights that the batch's totals fix in advance), **pooled** (it needs
the embeddings of all packs of all ranks) or **joint** (the sum of one of each over the same encode pass). The engine
accumulates the first pack by pack; for the others it collects the embeddings first. Losses and metrics are
**shares**: their sum over all packs and ranks is the value of the step. So nothing is ever a mean of means.
"""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from anchor.data.batches import PackTensors
from anchor.data.shards import Batch, Pack
from anchor.models.centres import Centres

Shares = dict[str, Tensor]
"""Metric name (``group/what_unit``) -> float32 scalar without gradient, this pack's or rank's share of the value."""


class Objective(nn.Module, ABC):
    """The module that the engine wraps; everything that touches parameters happens in its ``forward``.

    Attributes:
        centres: means that the step updates after the parameters have moved, and that checkpoints and exports hold.
    """

    centres: Centres | None = None

    def prepare(self, pack: Pack) -> Pack:
        """The part of a pack that this objective reads."""
        return pack

    @abstractmethod
    def embeddings(self, output: Any) -> Float[Tensor, "S D"]:
        """Unit vectors (float32) of a pack's segments from the result of ``forward``."""


class SeparableObjective(Objective):
    """A loss that is a sum over packs."""

    @abstractmethod
    def forward(self, pack: PackTensors, batch: Batch) -> tuple[Tensor, ...]:
        """One pack: its share of the loss first (with gradient), then what :meth:`metrics` takes.

        Args:
            pack: one pack of this rank.
            batch: the batch it belongs to, for the totals.
        """

    @abstractmethod
    def metrics(self, output: tuple[Tensor, ...], batch: Batch) -> Shares:
        """This pack's shares of the metrics from the result of :meth:`forward`."""


class PooledObjective(Objective):
    """A loss over the embeddings of the whole batch."""

    @abstractmethod
    def forward(self, pack: PackTensors, batch: Batch) -> Tensor:
        """Unit vectors ``S D`` (float32) of one pack's segments."""

    def embeddings(self, output: Any) -> Float[Tensor, "S D"]:
        return output

    @abstractmethod
    def loss(self, embeddings: Tensor, batch: Batch, rank: int, world_size: int) -> tuple[Tensor, Shares]:
        """This rank's share of the loss and of the metrics; every rank calls it, it communicates.

        Args:
            embeddings: ``S D``, unit vectors of this rank's segments, pack after pack.
            batch: the whole batch, all ranks' packs.
            rank, world_size: which packs are this rank's.
        """


class JointObjective(PooledObjective):
    """A loss over the embeddings of the whole batch plus one that is a sum over packs, from the same encode pass."""

    @abstractmethod
    def forward(self, pack: PackTensors, batch: Batch, embeddings_only: bool = False) -> Tensor | tuple[Tensor, ...]:
        """One pack: unit vectors ``S D``, the share of the separable loss (with gradient), what :meth:`metrics` takes.

        Args:
            pack: one pack of this rank.
            batch: the batch it belongs to, for the totals.
            embeddings_only: return the unit vectors alone and compute nothing else.
        """

    def embeddings(self, output: Any) -> Float[Tensor, "S D"]:
        return output[0]

    @abstractmethod
    def metrics(self, output: tuple[Tensor, ...], batch: Batch) -> Shares:
        """This pack's shares of the separable loss's metrics from the result of :meth:`forward`."""


def add_shares(total: Shares, more: Shares) -> Shares:
    """Sum by name; a name that one of them lacks counts as nothing."""
    return total | {name: total[name] + value if name in total else value for name, value in more.items()}
