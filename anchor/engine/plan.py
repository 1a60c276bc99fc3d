"""Check a recipe against its shards."""

import logging
from dataclasses import dataclass
from typing import Any

from anchor.config.train_recipe import TrainRecipe
from anchor.data.batches import check_ranks
from anchor.data.shards import ShardReader
from anchor.data.tokenizer_files import shards_tokenizer
from anchor.engine.checks import check_template
from anchor.engine.deepspeed import read_ds_config
from anchor.engine.held_out import HeldOut

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe checked against its shards.

    Attributes:
        recipe: the recipe.
        reader: the shards.
        ds_config: the DeepSpeed file as read.
        held_out: held-out batches, when the recipe asks for evaluation.
    """

    recipe: TrainRecipe
    reader: ShardReader
    ds_config: dict[str, Any]
    held_out: HeldOut | None


def make_plan(recipe: TrainRecipe, recipe_path: str, world_size: int) -> Plan:
    """Check everything that needs no model, and log the arithmetic of a step.

    Raises:
        AnchorError: the ds_configs file, the shards or the number of ranks do not fit.
    """
    ds_config = read_ds_config(recipe.engine.deepspeed)
    reader = ShardReader(recipe.data.shards)
    index = reader.index
    check_ranks(index.pack_multiple, world_size, recipe.data.shards, recipe_path)
    shards_tokenizer(recipe.data.shards, index.tokenizer_sha256)
    check_template(recipe, index, recipe_path)
    held_out = None
    if recipe.evaluation is not None:
        held_out = HeldOut(recipe.evaluation, index, world_size, recipe_path)
    shape = index.recipe["batch"]
    steps, batches = recipe.optim.total_steps, index.batches_per_epoch
    packs = sum(shard["packs"] for shard in index.shards) / len(reader)
    log.info(
        "%d pairs a step = %.1f packs of at most %d tokens = %d ranks x %.1f; %d batches an epoch in %s; "
        "%d steps = %.2f epochs",
        shape["pairs"],
        packs,
        shape["pack_tokens"],
        world_size,
        packs / world_size,
        batches,
        recipe.data.shards,
        steps,
        steps / batches,
    )
    return Plan(recipe, reader, ds_config, held_out)
