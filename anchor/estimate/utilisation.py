"""Model FLOP/s utilisation (MFU) of a step.

It is the FLOPs that the mathematics needs, over what the devices could do in the step's time (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B). Work that is computed twice (checkpointing, gradient cache) counts once.
"""

from typing import Any

import torch

from anchor import dist
from anchor.config.pack_recipe import PackRecipe
from anchor.config.train_recipe import TrainRecipe
from anchor.data.index import Index
from anchor.data.shards import Batch
from anchor.estimate.gpus import peak_of_device
from anchor.estimate.model_shape import shape_of
from anchor.estimate.setting import setting_of
from anchor.estimate.step_shape import sampled_step
from anchor.estimate.work import work
from anchor.models.embedder import Embedder
from anchor.objectives.base import Objective


class Utilisation:
    """Counter of a batch's FLOPs against the peak of all ranks' devices.

    Args:
        objective: the objective being trained.
        recipe: its recipe; ``telemetry.peak_tflops`` takes precedence over the device's datasheet.
        index: index of the shards.
        zero: the ``zero_optimization`` section of the DeepSpeed file.
        ranks: this process among all ranks.
    """

    def __init__(
        self, objective: Objective, recipe: TrainRecipe, index: Index, zero: dict[str, Any], ranks: dist.Ranks
    ) -> None:
        given = recipe.telemetry.peak_tflops
        cuda = ranks.device.type == "cuda"
        peak = given * 1e12 if given is not None else peak_of_device(torch.cuda.get_device_name()) if cuda else None
        self._peak = None if peak is None else peak * ranks.world_size
        self._objective = objective
        self._packing = PackRecipe.model_validate(index.recipe)
        self._setting = setting_of(recipe, zero, num_ranks=ranks.world_size)
        self._shape = shape_of(next(m.causal_lm for m in objective.modules() if isinstance(m, Embedder)))

    def fraction(self, batch: Batch, seconds: float) -> float | None:
        """Return the fraction of the peak that a step over ``batch`` reached, or None if the peak is unknown."""
        if self._peak is None:
            return None
        step, _ = sampled_step(self._objective, self._packing, [batch])
        return work(self._shape, self._setting, step).model / (seconds * self._peak)
