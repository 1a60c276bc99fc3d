"""The dimensions of a model and the size of every parameter, as a dry run needs them.

No weights are loaded. The module is built from the configuration (for a GGUF file, from its metadata) on the meta
device, where parameters have shapes but use no memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from anchor.config.schema import BackboneSection
from anchor.models.backbone import choose_trained, read_config

ADAPTERS = "LoRA adapters"
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


def meta_model(section: BackboneSection) -> PreTrainedModel:
    """Build the recipe's causal LM on the meta device, adapters included.

    Raises:
        ModelError: the model is missing, unreadable, or of an unsupported architecture.
        ConfigError: a LoRA target matches no layer or is the output layer.
    """
    config = read_config(section.path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()  # loading weights would do this
        choose_trained(model, section)
    return model


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
