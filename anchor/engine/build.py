"""Load the engine that trains a plan: backbone, objective, DeepSpeed."""

import logging
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from anchor import dist
from anchor.config.objectives import LanguageModelSection, ReconstructionSection, SelfSupervisedSection
from anchor.config.train_recipe import TrainRecipe
from anchor.data.decode_prefix import decode_prefix_of, template_prefix_ids
from anchor.data.index import Index, read_index
from anchor.engine.checks import check_backbone, first_special_id
from anchor.engine.deepspeed import Engine, complete_ds_config, init_communication, whole
from anchor.engine.plan import Plan
from anchor.engine.stop import group_timeout
from anchor.models.backbone import DTYPES, load_backbone, read_config
from anchor.models.special_tokens import SpecialTokens
from anchor.objectives.base import Objective
from anchor.objectives.contrastive import ContrastiveObjective
from anchor.objectives.language_model import LanguageModelObjective
from anchor.objectives.reconstruction import JointReconstructionObjective, ReconstructionObjective
from anchor.objectives.self_supervised import JointSelfSupervisedObjective, SelfSupervisedObjective

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


def make_objective(causal_lm: Any, recipe: TrainRecipe) -> Objective:
    """Build the module that the recipe's objective section names."""
    section, shards = recipe.objective, recipe.data.shards
    if isinstance(section, ReconstructionSection):
        instructed = section.target == "instruction_and_body"
        prefix_tokens = len(template_prefix_ids(shards)) if instructed else None
        kind = ReconstructionObjective if section.contrastive is None else JointReconstructionObjective
        return kind(causal_lm, section, prefix_tokens, decode_prefix_of(recipe))
    if isinstance(section, LanguageModelSection):
        return LanguageModelObjective(causal_lm)
    if isinstance(section, SelfSupervisedSection):
        return make_self_supervised(causal_lm, section, read_index(shards), recipe.seed, decode_prefix_of(recipe))
    return ContrastiveObjective(causal_lm, section)


def make_self_supervised(
    causal_lm: PreTrainedModel,
    section: SelfSupervisedSection,
    index: Index,
    seed: int,
    decode_prefix_ids: tuple[int, ...] = (),
) -> Objective:
    """Build the objective with new special tokens near the mean of the backbone's embeddings; every rank calls it.

    Args:
        causal_lm: the backbone, partitioned or not; on the meta device nothing is computed.
        section: the recipe's ``objective``.
        index: index of shards that passed :func:`check_template`.
        seed: seed of all random draws.
        decode_prefix_ids: tokens before the soft prompts in every decode row.

    Raises:
        ValueError: the shards have no teacher or no end token.
    """
    if index.teacher is None or index.end_token_id is None:
        raise ValueError("shards without a teacher or an end token")
    count, dimension = index.template["special_tokens"], index.teacher["dimension"]
    special = new_special_tokens(causal_lm, count, dimension, first_special_id(index), seed)
    kind = SelfSupervisedObjective if section.contrastive is None else JointSelfSupervisedObjective
    return kind(causal_lm, special, section, index.end_token_id, decode_prefix_ids)


def new_special_tokens(
    causal_lm: PreTrainedModel, count: int, dimension: int, first_id: int, seed: int
) -> SpecialTokens:
    """Create special tokens in the backbone's dtype, see :meth:`SpecialTokens.initialise`."""
    embeddings = cast(nn.Embedding, causal_lm.get_input_embeddings()).weight
    with torch.device("meta" if embeddings.is_meta else "cpu"):
        special = SpecialTokens(count, causal_lm.config.hidden_size, dimension, first_id).to(embeddings.dtype)
    if not embeddings.is_meta:
        with whole(embeddings):
            special.initialise(embeddings, seed)
    return special
