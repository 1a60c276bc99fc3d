"""One optimiser step: forward and backward of this rank's packs of a batch, then the update.

1. Every pack is seeded by (seed, step, pack), so dropout depends neither on the rank nor on what ran before.
2. Losses are shares. Their sum over packs and ranks is the loss of the step, and the same holds for every metric.
3. Loss and gradient are checked on all ranks before the optimiser updates anything.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from anchor import dist
from anchor.data.batches import rank_packs, to_tensors
from anchor.data.records import QUERY
from anchor.data.shards import Batch
from anchor.engine.deepspeed import Engine
from anchor.engine.grad_cache import pooled_backward
from anchor.errors import TrainingError
from anchor.objectives.base import Objective, Output, Shares, add_shares


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of one step.

    Attributes:
        metrics: values over all ranks, by name.
        num_tokens: real tokens of the batch that the objective read, over all ranks.
        stop: True if any rank was asked to stop; all ranks learn of it here.
    """

    metrics: dict[str, float]
    num_tokens: int
    stop: bool


class NotFiniteError(TrainingError):
    """Error for a loss or gradient that is not finite; no checkpoint holds the step.

    Attributes:
        report: step, source, pair ids and metrics of the batch.
    """

    def __init__(
        self, what: str, step: int, batch: Batch, metrics: dict[str, float], outcome: str = "nothing was updated"
    ) -> None:
        pairs = np.concatenate([pack.pair_ids[pack.roles == QUERY] for pack in batch.packs]).tolist()
        self.report = {"step": step, "what": what, "source": batch.source, "pairs": pairs, "metrics": metrics}
        some = ", ".join(map(str, pairs[:8])) + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")
        super().__init__(
            f"step {step}: source {batch.source}, pairs {some}: the {what} is not finite ({metrics}); {outcome}; "
            "lower optim.lr, raise optim.warmup_steps, or look at these pairs"
        )


def objective_of(engine: Engine) -> Objective:
    """Return the objective that an engine holds."""
    objective = engine.objective
    if not isinstance(objective, Objective):
        raise TypeError(f"{type(objective).__name__} is no objective")
    return objective


def train_step(
    engine: Engine,
    batch: Batch,
    *,
    step: int,
    seed: int,
    lr: float,
    stop_requested: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Train on one batch.

    Args:
        engine: holds the objective.
        batch: the whole batch; the engine's rank takes its packs.
        step: number of the step, from 0.
        seed: the recipe's seed.
        lr: learning rate of the update.
        stop_requested: returns whether this rank was asked to stop after the step; called after its backward.

    Raises:
        NotFiniteError: the loss or gradient is not finite. Parameters and optimiser are unchanged, unless only the
            gradient's norm overflows: it is known after the update.
    """
    objective, ranks = objective_of(engine), engine.ranks
    prepared = [objective.prepare(pack) for pack in batch.packs]
    mine = rank_packs(len(prepared), ranks.rank, ranks.world_size)
    packs = [to_tensors(prepared[i], ranks.device) for i in mine]

    def forward(i: int, *, embeddings_only: bool = False) -> Output:
        torch.manual_seed(_pack_seed(seed, step, mine[i]))
        return engine.forward(packs[i], batch, embeddings_only)

    if objective.pooled_loss is not None:
        shares = pooled_backward(engine, objective.pooled_loss, len(packs), batch, forward)
    else:
        shares = _local_backward(engine, len(packs), forward)

    metrics = reduced(shares | {_STOP: torch.tensor(float(stop_requested()), device=ranks.device)})
    stop = metrics.pop(_STOP) > 0
    if not all(math.isfinite(value) for value in metrics.values()):
        raise NotFiniteError("loss", step, batch, metrics)
    if engine.gradient_overflows():
        raise NotFiniteError("gradient", step, batch, metrics)
    metrics["optim/grad_norm"] = engine.step(lr)
    if not 0 <= metrics["optim/grad_norm"] < math.inf:
        # The elements are finite but their squares overflow. DeepSpeed computes the norm only inside its update,
        # and returns -1.
        raise NotFiniteError("norm of the gradient", step, batch, metrics, "this update is in no checkpoint")
    if objective.centres is not None:
        objective.centres.update(batch)
    metrics["optim/lr"] = lr
    return StepResult(metrics, sum(pack.num_tokens for pack in prepared), stop)


_STOP = "stop"
"""Name under which a request to stop travels with the metrics, so that it needs no extra collective."""


def _local_backward(engine: Engine, num_packs: int, forward: Callable[[int], Output]) -> Shares:
    total: Shares = {}
    for i in range(num_packs):
        output = forward(i)
        if output.loss is None:
            raise TypeError("an objective without a pooled loss returned no local loss")
        engine.backward(output.loss, last=i == num_packs - 1)
        total = add_shares(total, output.metrics)
    return total


def _pack_seed(seed: int, step: int, pack: int) -> int:
    return int(np.random.SeedSequence([seed, step, pack]).generate_state(1, np.uint64)[0] >> 1)


def reduced(shares: Shares) -> dict[str, float]:
    """Return the sums of all ranks' shares; every rank calls it with the same names."""
    names = sorted(shares)
    values = dist.all_reduce_sum(torch.stack([shares[name].detach().double() for name in names]))
    return dict(zip(names, values.tolist(), strict=True))
