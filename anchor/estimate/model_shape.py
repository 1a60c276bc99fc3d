"""The dimensions of a model and the size of every parameter, as a dry run needs them.

No weights are loaded. The module is built from the configuration (for a GGUF file, from its metadata) on the meta
device, where parameters have shapes but use no memory.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from anchor.config.objectives import SelfSupervisedSection
from anchor.config.pack_recipe import PackRecipe, SpecialTokensTemplate
from anchor.config.train_recipe import TrainRecipe
from anchor.errors import ConfigError
from anchor.models.special_tokens import SpecialTokens

ADAPTERS = "LoRA adapters"
log = logging.getLogger(__name__)

SPECIAL_TOKENS = "special tokens"


@dataclass(frozen=True, slots=True)
class ParameterSize:
    """One parameter. A tied parameter appears once.

    Attributes:
        group: ``input embeddings``, ``attention``, ``mlp``, ``norms``, ``output head``, ``LoRA adapters`` or ``special
            tokens`` (with their projections).
        size: number of elements.
        trained: whether it receives gradients.
    """

    group: str
    size: int
    trained: bool


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions and parameters of a causal LM with SwiGLU feed-forward layers (Llama, Mistral, Qwen2, Qwen3).

    Attributes:
        model_type: as in ``config.json``.
        num_layers, hidden_size, intermediate_size, vocabulary_size: as in ``config.json``.
        query_size: heads times head dimension.
        key_value_size: key-value heads times head dimension.
        num_heads: query heads.
        tied: whether the head shares the input embeddings' weight.
        parameters: all parameters, including adapters.
        adapter_inputs: input size of each adapted linear layer in one transformer layer.
        embedding_size: dimension of an embedding; the hidden size unless special tokens are aligned with a teacher.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocabulary_size: int
    query_size: int
    key_value_size: int
    num_heads: int
    tied: bool
    parameters: tuple[ParameterSize, ...]
    adapter_inputs: tuple[int, ...]
    embedding_size: int

    def count(self, group: str | None = None, *, trained: bool = False) -> int:
        """Count the elements of a group, or of all parameters; with ``trained``, only trained ones."""
        chosen = (p for p in self.parameters if group in (None, p.group) and (p.trained or not trained))
        return sum(p.size for p in chosen)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups present."""
        return tuple(dict.fromkeys(p.group for p in self.parameters))


def shape_of(causal_lm: PreTrainedModel) -> ModelShape:
    """Return the dimensions and parameters of a model on any device."""
    model: Any = causal_lm
    config, output = model.config, model.get_output_embeddings()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    first = model.base_model.layers[0]
    adapted = [m for m in first.modules() if any(name.startswith("lora_A") for name, _ in m.named_children())]
    return ModelShape(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocabulary_size=config.vocab_size,
        query_size=config.num_attention_heads * head_dim,
        key_value_size=config.num_key_value_heads * head_dim,
        num_heads=config.num_attention_heads,
        tied=output is not None and model.get_input_embeddings().weight is output.weight,
        parameters=tuple(
            # Under ZeRO-3 a parameter is empty; ds_numel holds its full size.
            ParameterSize(_group(name), getattr(parameter, "ds_numel", parameter.numel()), parameter.requires_grad)
            for name, parameter in model.named_parameters()
        ),
        adapter_inputs=tuple(_in_features(layer) for layer in adapted),
        embedding_size=config.hidden_size,
    )


def _in_features(layer: nn.Module) -> int:
    return int(vars(layer)["in_features"])


def _group(name: str) -> str:
    if "lora_" in name:
        return ADAPTERS
    groups = {"embed_tokens": "input embeddings", "lm_head": "output head", "norm": "norms"}
    for part, group in groups.items():
        if part in name:
            return group
    return "attention" if ".self_attn." in name else "mlp"


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
    if not isinstance(recipe.objective, SelfSupervisedSection):
        return shape
    if not isinstance(packing.template, SpecialTokensTemplate):
        raise ConfigError("--pack: objective.kind is self_supervised, but template.kind is not special_tokens")
    if teacher is None:
        log.info("the teacher is not known yet: estimated with %d dimensions, the model's own", shape.hidden_size)
    with torch.device("meta"):
        dimension = shape.hidden_size if teacher is None else teacher["dimension"]
        special = SpecialTokens(packing.template.tokens, shape.hidden_size, dimension, 0)
    added = tuple(ParameterSize(SPECIAL_TOKENS, p.numel(), True) for p in special.parameters())
    return replace(shape, parameters=(*shape.parameters, *added), embedding_size=dimension)
