"""Special tokens of a run: checked against shards and backbone, and created before the engine wraps them."""

import json
import logging
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from anchor.config import schema
from anchor.config.schema import PackRecipe, TrainRecipe
from anchor.data.shards import Index
from anchor.data.templates import special_token_names
from anchor.engine.deepspeed import whole
from anchor.errors import ConfigError, ShardError
from anchor.models.shape import SPECIAL_TOKENS, ModelShape, ParameterSize
from anchor.models.special_tokens import SpecialTokens
from anchor.objectives.base import Objective
from anchor.objectives.self_supervised import JointSelfSupervisedObjective, SelfSupervisedObjective

log = logging.getLogger(__name__)


def first_special_id(index: Index) -> int:
    """Return the id of the first special token of shards that have some; the last one is the anchor token."""
    return index.anchor_token_id - index.template["special_tokens"] + 1


def check_template(recipe: TrainRecipe, index: Index, where: str) -> None:
    """Refuse shards whose template or teacher does not suit the recipe's objective.

    Args:
        recipe: the training recipe.
        index: index of its shards.
        where: the recipe's path, for messages.

    Raises:
        ShardError: special tokens or a teacher are missing, the objective would not train the shards' special tokens,
            or the shards' tokenizer has others.
    """
    kind, shards, count = recipe.objective.kind, recipe.data.shards, index.template.get("special_tokens", 0)
    if not isinstance(recipe.objective, schema.SelfSupervisedObjective):
        if count:
            raise ShardError(
                f"{where}: objective.kind is {kind}, but {shards} was packed with {count} special tokens, which only "
                "self_supervised trains; pack with a template of another kind"
            )
        return
    if not count:
        raise ShardError(
            f"{where}: objective.kind is self_supervised, but {shards} was packed without special tokens; pack with "
            "template.kind: special_tokens"
        )
    _check_names(recipe, index, count)
    if index.teacher is None:
        raise ShardError(
            f"{where}: objective.kind is self_supervised, but {shards} has no teacher's embeddings; run "
            f"`python -m data_prep teach {shards} --output NEW` and set data.shards to NEW"
        )


def _check_names(recipe: TrainRecipe, index: Index, count: int) -> None:
    file = recipe.data.shards / "tokenizer/tokenizer.json"
    added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    first = first_special_id(index)
    found = [ids.get(name) for name in special_token_names(count)]
    if found != list(range(first, first + count)) or special_token_names(count + 1)[-1] in ids:
        raise ShardError(
            f"{file}: its special tokens are not the {count} from id {first} on that index.json says; pack again"
        )


def make_self_supervised(
    causal_lm: PreTrainedModel,
    section: schema.SelfSupervisedObjective,
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


def special_tokens_shape(
    shape: ModelShape, recipe: TrainRecipe, packing: PackRecipe, teacher: dict[str, Any] | None
) -> ModelShape:
    """Return a backbone's shape with the special tokens and projections that the objective adds, if any.

    Args:
        shape: shape of the backbone.
        recipe: the training recipe.
        packing: how its shards are or will be packed.
        teacher: the shards' teacher; None before they are packed, when the backbone's hidden size is assumed for it.

    Raises:
        ConfigError: the pack recipe's template has no special tokens.
    """
    if not isinstance(recipe.objective, schema.SelfSupervisedObjective):
        return shape
    if not isinstance(packing.template, schema.SpecialTokensTemplate):
        raise ConfigError("--pack: objective.kind is self_supervised, but template.kind is not special_tokens")
    if teacher is None:
        log.info("the teacher is not known yet: estimated with %d dimensions, the model's own", shape.hidden_size)
    with torch.device("meta"):
        dimension = shape.hidden_size if teacher is None else teacher["dimension"]
        special = SpecialTokens(packing.template.tokens, shape.hidden_size, dimension, 0)
    added = tuple(ParameterSize(SPECIAL_TOKENS, p.numel(), True) for p in special.parameters())
    return replace(shape, parameters=(*shape.parameters, *added), embedding_size=dimension)
