"""Build the engine that trains a plan: backbone, objective, DeepSpeed."""

import logging
from importlib import import_module

import torch
from torch import nn
from transformers import PreTrainedModel

from anchor import dist
from anchor.config.train_recipe import TrainRecipe
from anchor.engine.checks import check_backbone
from anchor.engine.deepspeed import Engine, complete_ds_config, init_communication, whole
from anchor.engine.plan import Plan
from anchor.engine.stop import group_timeout
from anchor.models.backbone import DTYPES, load_backbone, read_config
from anchor.objectives.base import Objective

log = logging.getLogger(__name__)


def load_engine(plan: Plan, ranks: dist.Ranks, *, universal: bool) -> Engine:
    """Load the model under ZeRO, and wrap it in the objective and the engine; every rank calls it.

    Args:
        plan: a checked recipe.
        ranks: this process among all ranks.
        universal: True if a checkpoint of another number of ranks is loaded next.

    Raises:
        ModelError: the model does not exist, or the shards were not packed for it.
        DataError: the shards' texts are longer than the model's positions.
    """
    recipe = plan.recipe
    init_communication()
    torch.manual_seed(recipe.seed)
    ds_config = complete_ds_config(plan.ds_config, recipe, ranks.world_size)
    config = read_config(recipe.backbone.path)
    check_backbone(config, recipe.backbone.path, plan.reader.index, recipe.data.shards)
    causal_lm = load_backbone(
        recipe.backbone,
        DTYPES[recipe.engine.dtype],
        ranks.device.type,
        work_dir=recipe.output_dir,
        ds_config=ds_config,
    )
    objective = make_objective(causal_lm, recipe)
    _log_parameters(objective)
    engine = Engine(objective, ds_config, recipe.optim, ranks, universal=universal)
    dist.set_timeout(group_timeout(recipe.engine.timeout_seconds))
    return engine


def _log_parameters(module: nn.Module) -> None:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    trained = sum(size for size, grad in sizes if grad)
    log.info("parameters: %s trained of %s", f"{trained:,}", f"{sum(size for size, _ in sizes):,}")


def make_objective(causal_lm: PreTrainedModel, recipe: TrainRecipe) -> Objective:
    """Build the module that the recipe's objective section names."""
    return import_module(f"anchor.objectives.{recipe.objective.kind}").build(causal_lm, recipe, whole)
