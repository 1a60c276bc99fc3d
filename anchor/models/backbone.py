"""Load a causal LM for full training, LoRA training or frozen use, with or without ZeRO-3.

1. Rank 0 converts a GGUF file to a folder, once.
2. While a ZeRO-3 configuration object is alive, ``from_pretrained`` loads the weights already partitioned.
3. For LoRA, inject adapters into the linear layers and freeze everything else.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from anchor import dist
from anchor.config.model_path import resolve_model_path
from anchor.config.train_recipe import BackboneSection, FrozenTraining, LoraTraining
from anchor.data.tokenizer_files import refuse_lfs_pointers
from anchor.errors import UNSAFE_PICKLE, ConfigError, ModelError, did_you_mean, first_line, weights_line
from anchor.json_files import read_model_json
from anchor.models.adapters import checkpoint_contexts
from anchor.models.attention import implementation

log = logging.getLogger(__name__)

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of the architectures that the packed attention kernels support."""

OUTPUT_LAYER = "lm_head"
"""Name of the output layer in all supported architectures."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_backbone(
    section: BackboneSection,
    dtype: torch.dtype,
    device_type: str,
    *,
    work_dir: Path,
    ds_config: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load the recipe's causal LM, ready for the engine. Every rank must call this.

    Args:
        section: the recipe's ``backbone``.
        dtype: compute dtype.
        device_type: ``cuda`` or ``cpu``; decides which attention kernels can run.
        work_dir: the folder in which a GGUF file is converted.
        ds_config: DeepSpeed configuration; with ZeRO-3, weights are loaded already partitioned.

    Raises:
        ModelError: the model is missing, its architecture is unsupported, or the attention kernel cannot run here.
        ConfigError: a LoRA target matches no layer or is the output layer, or a causal recipe names a bidirectional
            model.
    """
    path = section.path
    if path.endswith(".gguf"):
        path = str(_convert_once(path, work_dir / "base"))
    attention = implementation(section.attention, device_type, dtype)
    zero3 = HfDeepSpeedConfig(ds_config) if ds_config is not None else None  # must stay alive while weights load
    try:
        model = load_causal_lm(path, dtype, attention)
    finally:
        del zero3  # a traceback would keep it alive, and later models in this process would load partitioned
    _set_direction(model, section)
    choose_trained(model, section)
    if section.gradient_checkpointing:
        options = {"use_reentrant": False, "context_fn": checkpoint_contexts(model)}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if not isinstance(section.trained, FrozenTraining):
            # With frozen input embeddings, the first checkpointed layer would otherwise get no input that requires a
            # gradient. In a frozen model only the special tokens' rows need one, and they already require it.
            model.enable_input_require_grads()
    return model


def _set_direction(model: PreTrainedModel, section: BackboneSection) -> None:
    """Make attention bidirectional if the recipe says so; the exported config.json keeps the setting."""
    if section.direction == "bidirectional":
        vars(model.config)["is_causal"] = False
    elif not getattr(model.config, "is_causal", True) or getattr(model.config, "use_bidirectional_attention", False):
        raise ConfigError(
            f"backbone.direction is causal, but {section.path} was trained bidirectional (is_causal or "
            "use_bidirectional_attention in its config.json); set backbone.direction: bidirectional"
        )


def load_causal_lm(path: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Load a causal LM by ``from_pretrained``, but refuse missing weights instead of filling them with random numbers.

    An output layer that is neither stored nor tied becomes None; sentence-transformers saves models without one. See
    :func:`anchor.models.head.output_layer`.

    Raises:
        ModelError: the model is missing, unreadable, incomplete, or of an unsupported architecture.
    """
    location, config = resolve_model_path(path), read_config(path)
    # Dequantise a GGUF file to plain weights instead of running kernels on packed ones.
    packed = {} if location.gguf_file is None else {"quantization_config": GgufConfig(dequantize=True)}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location.name,
            **location.kwargs(),
            **packed,
            config=config,
            trust_remote_code=False,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the loop below refuses them by name
        )
    except UNSAFE_PICKLE as error:
        raise ModelError(f"{path}: the model could not be loaded: {weights_line(error)}") from error
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{path}: the model could not be loaded: {_in_one_line(error)}") from error
    model, found = loaded
    for name, stored, expected in sorted(found["mismatched_keys"]):
        shapes = " by config.json, found ".join(" x ".join(map(str, shape)) for shape in (expected, stored))
        raise ModelError(f"{path}: {name}: expected {shapes}; give the config.json of these weights")
    missing = set(found["missing_keys"])
    if f"{OUTPUT_LAYER}.weight" in missing:
        model.set_output_embeddings(None)
    _refuse_missing(path, sorted(missing - {f"{OUTPUT_LAYER}.weight"}))
    return model


def _in_one_line(error: Exception) -> str:
    """Return the error's first line, plus the second if the first ends in a colon."""
    lines = str(error).strip().splitlines()[:2]
    return " ".join(map(str.strip, lines)) if lines and lines[0].endswith(":") else first_line(error)


def _refuse_missing(path: str, names: list[str]) -> None:
    if names:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ModelError(f"{path}: {len(names)} weights are missing: {some}; copy or export the model again")


def read_config(path: str) -> PretrainedConfig:
    """Read a model's configuration without its weights; for a GGUF file, read its metadata.

    Raises:
        ModelError: the model is missing, unreadable, or of an unsupported architecture.
    """
    location = resolve_model_path(path)
    refuse_lfs_pointers(Path(location.name))
    _refuse_special_tokens_alone(Path(location.name))
    try:
        config = AutoConfig.from_pretrained(location.name, trust_remote_code=False, **location.kwargs())
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError),
        StrictDataclassError,
    ) as error:
        raise ModelError(f"{path}: no model configuration could be read: {_in_one_line(error)}") from error
    if config.model_type not in SUPPORTED:
        raise ModelError(f"{path}: model_type is '{config.model_type}', supported are {', '.join(SUPPORTED)}")
    _refuse_impossible_sizes(path, config)
    return config


def _refuse_impossible_sizes(path: str, config: PretrainedConfig) -> None:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(config, name, 1) for name in (*names, "vocab_size")}
    for name, size in sizes.items():
        if size < 1:
            raise ModelError(f"{path}: config.json: {name} is {size}, expected at least 1")
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise ModelError(
            f"{path}: config.json: num_attention_heads ({sizes['num_attention_heads']}) is no multiple of "
            f"num_key_value_heads ({sizes['num_key_value_heads']})"
        )


def _refuse_special_tokens_alone(folder: Path) -> None:
    about = folder / "anchor.json"
    base = read_model_json(about).get("base") if about.is_file() else None
    if base is not None:
        name = base.get("path") if isinstance(base, dict) else base
        raise ModelError(
            f"{folder}: holds special tokens for {name}, not a model of its own; give that model, or embed "
            "with this folder through `python -m eval`"
        )


def _convert_once(path: str, folder: Path) -> Path:
    """Dequantise a GGUF file into a folder of fp32 safetensors, unless the folder was made from the same file."""
    read_config(path)  # on every rank, so that an unreadable file stops all of them
    if dist.is_first_rank():
        with Path(path).expanduser().open("rb") as file:
            source = {"gguf_xxh3": hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()}
        made_of = folder / "source.json"
        if not made_of.is_file() or read_model_json(made_of) != source:
            log.info("converting %s to %s", path, folder)
            model = load_causal_lm(path, torch.float32, "sdpa")
            # transformers still treats a dequantised model as quantised and would refuse to save it.
            vars(model)["hf_quantizer"] = None
            vars(model.config).pop("quantization_config", None)
            beside = folder.with_name(folder.name + ".tmp")
            shutil.rmtree(beside, ignore_errors=True)
            model.save_pretrained(beside)
            (beside / made_of.name).write_text(json.dumps(source) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
    dist.barrier()
    return folder


def choose_trained(model: PreTrainedModel, backbone: BackboneSection) -> None:
    """Freeze the parameters that are not trained and, for LoRA, inject the adapters. Works on the meta device too.

    Raises:
        ConfigError: a LoRA target matches no layer or is the output layer.
    """
    section = backbone.trained
    if isinstance(section, FrozenTraining):
        model.requires_grad_(False)
    if not isinstance(section, LoraTraining):
        return
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in section.targets:
        if target == OUTPUT_LAYER:
            raise ConfigError(
                f"backbone.trained.targets: '{target}' is the output layer, whose adapter would not be trained, as "
                "the losses read its own weight alone; leave it out"
            )
        if target not in linear:
            hint = did_you_mean(target, linear)
            raise ConfigError(f"backbone.trained.targets: no linear layer is called '{target}'{hint}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inject_adapter_in_model(lora_config(section), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def lora_config(section: LoraTraining) -> LoraConfig:
    """Convert the recipe's LoRA section to peft's config."""
    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=list(section.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )


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
