"""Check a recipe against its shards, and record where a run comes from."""

import hashlib
import importlib.metadata
import json
import logging
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anchor import dist
from anchor.config import schema
from anchor.config.schema import TrainRecipe
from anchor.data.batches import check_ranks
from anchor.data.decode_prefix import decode_prefix_ids, template_prefix_ids
from anchor.data.shards import ShardReader, index_hash, read_index
from anchor.data.tokenizer_files import shards_tokenizer
from anchor.engine.deepspeed import read_ds_config
from anchor.engine.held_out import HeldOut
from anchor.engine.special_tokens import check_template, make_self_supervised
from anchor.objectives.base import Objective
from anchor.objectives.contrastive import ContrastiveObjective
from anchor.objectives.language_model import LanguageModelObjective
from anchor.objectives.reconstruction import JointReconstructionObjective, ReconstructionObjective

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "pyarrow")


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


def make_objective(causal_lm: Any, recipe: TrainRecipe) -> Objective:
    """Build the module that the recipe's objective section names."""
    section, shards = recipe.objective, recipe.data.shards
    if isinstance(section, schema.ReconstructionObjective):
        instructed = section.target == "instruction_and_body"
        prefix_tokens = len(template_prefix_ids(shards)) if instructed else None
        kind = ReconstructionObjective if section.contrastive is None else JointReconstructionObjective
        return kind(causal_lm, section, prefix_tokens, decode_prefix_of(recipe))
    if isinstance(section, schema.LanguageModelObjective):
        return LanguageModelObjective(causal_lm)
    if isinstance(section, schema.SelfSupervisedObjective):
        return make_self_supervised(causal_lm, section, read_index(shards), recipe.seed, decode_prefix_of(recipe))
    return ContrastiveObjective(causal_lm, section)


def decode_prefix_of(recipe: TrainRecipe) -> tuple[int, ...]:
    """Return the token ids before the prefix vectors of the recipe's decode rows; empty if nothing is decoded.

    Raises:
        ShardError: the recipe asks for the template's prefix, and the template has none.
    """
    section, shards = recipe.objective, recipe.data.shards
    if not isinstance(section, schema.ReconstructionObjective | schema.SelfSupervisedObjective):
        return ()
    return (
        decode_prefix_ids(section.decode_prefix, read_index(shards), shards) if section.decode_prefix != "none" else ()
    )


def provenance(plan: Plan, ranks: dist.Ranks) -> dict[str, Any]:
    """Return the record for ``run.yaml`` and ``anchor.json``: recipe, data, ranks, device, commit, package versions."""
    recipe = plan.recipe.model_dump(mode="json")
    return {
        "recipe": recipe,
        "recipe_sha256": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        "data_index_sha256": index_hash(plan.recipe.data.shards),
        "num_ranks": ranks.world_size,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        "commit": provenance_commit(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def provenance_commit() -> str | None:
    """Return the commit of this checkout, marked if files other than results are altered; None without git."""
    if shutil.which("git") is None:
        return None
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=False, cwd=here)
    if not done.stdout.strip():
        return None
    # A study rewrites its own tables between its runs, so results do not count.
    compare = ["git", "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)bench/results"]
    altered = subprocess.run(compare, capture_output=True, check=False, cwd=here).returncode != 0
    return done.stdout.strip() + "-dirty" * altered
