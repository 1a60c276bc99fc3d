"""Read a model folder in LLM2Vec-Gen's published layout without running any code from it.

Besides a tokenizer with P added tokens, the folder holds ``encoder/`` (a PEFT adapter with the trained rows and perhaps
LoRA), ``reconstruction_mlp`` and ``alignment_mlp`` (each a linear layer and its sizes, written by ``torch.save``),
``encoder_decoder_config.json`` and ``run_config.yml``. Pickles are read with ``torch.load(weights_only=True)``. YAML
tags of Python objects are read as plain values.
"""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from anchor.errors import ModelError, first_line
from anchor.json_files import read_model_json
from anchor.model_folder.special_tokens import shape_text

_FILES = (
    *("tokenizer.json", "run_config.yml", "encoder_decoder_config.json", "reconstruction_mlp", "alignment_mlp"),
    *("encoder/config.json", "encoder/adapter_config.json", "encoder/adapter_model.safetensors"),
)
_KEY_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Original:
    """Content of a folder in the published layout.

    Attributes:
        names: names of the P special tokens, in order.
        token_ids: their token ids.
        rows: trained rows, ``P H``, float32.
        embeddings: the base's input embeddings, ``V H``, if the adapter's file repeats them, else None.
        projections: ``reconstruction`` and ``alignment`` with ``.weight`` and ``.bias``, float32.
        lora: LoRA tensors, named as in a bare backbone (``layers.0...``); empty without LoRA.
        adapter: content of ``adapter_config.json``.
        config: the encoder's ``config.json``: the base's, with more tokens.
        base: name or path of the base model, according to the folder.
        run: content of ``run_config.yml``.
    """

    names: list[str]
    token_ids: list[int]
    rows: Float[Tensor, "P H"]
    embeddings: Float[Tensor, "V H"] | None
    projections: dict[str, Tensor]
    lora: dict[str, Tensor]
    adapter: dict[str, Any]
    config: dict[str, Any]
    base: str
    run: dict[str, Any]


def read_original(folder: Path) -> Original:
    """Read and check a folder.

    Raises:
        ModelError: a file is missing or unreadable, sizes disagree, or the variant is not supported.
    """
    for name in _FILES:
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no {name}; expected a model folder as LLM2Vec-Gen's authors publish it")
    run, adapter = _read_yaml(folder / "run_config.yml"), read_model_json(folder / "encoder/adapter_config.json")
    names = run.get("special_tokens")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{folder / 'run_config.yml'}: special_tokens is {names!r}, expected a list of names")
    _check_layout(folder, len(names))
    token_ids = _token_ids(folder / "encoder/adapter_config.json", adapter, len(names))
    rows, embeddings, lora = _read_adapter(folder / "encoder/adapter_model.safetensors", adapter["peft_type"])
    config = read_model_json(folder / "encoder/config.json")
    hidden_size = config.get("hidden_size")
    if tuple(rows.shape) != (len(names), hidden_size):
        raise ModelError(
            f"{folder / 'encoder/adapter_model.safetensors'}: trained rows are {shape_text(rows)}, expected "
            f"{len(names)} x {hidden_size} by run_config.yml and encoder/config.json"
        )
    reconstruction = _read_projection(folder / "reconstruction_mlp", rows.shape[1])
    alignment = _read_projection(folder / "alignment_mlp", len(reconstruction["bias"]))
    if len(reconstruction["bias"]) != rows.shape[1]:
        raise ModelError(
            f"{folder / 'reconstruction_mlp'}: gives vectors of {len(reconstruction['bias'])}, the model takes "
            f"{rows.shape[1]}"
        )
    both = {"reconstruction": reconstruction, "alignment": alignment}
    base = run.get("model_name_or_path") or adapter.get("base_model_name_or_path")
    return Original(
        names=names,
        token_ids=token_ids,
        rows=rows,
        embeddings=embeddings,
        projections={f"{name}.{part}": tensor for name, parts in both.items() for part, tensor in parts.items()},
        lora=lora,
        adapter=adapter,
        config=config,
        base=str(base),
        run=run,
    )


def _check_layout(folder: Path, count: int) -> None:
    file = folder / "encoder_decoder_config.json"
    config = read_model_json(file)
    if config.get("save_decoder"):
        raise ModelError(f"{file}: save_decoder is true; a folder with a decoder of its own is not supported")
    mode = str(config.get("encoding_mode"))
    found = re.fullmatch(r"last_(\d+)_tokens", mode)
    if found is None or int(found[1]) != count:
        raise ModelError(
            f"{file}: encoding_mode is {mode!r}, expected 'last_{count}_tokens' for the {count} special tokens of "
            "run_config.yml"
        )


def _token_ids(file: Path, adapter: dict[str, Any], count: int) -> list[int]:
    kind = adapter.get("peft_type")
    if kind not in ("TRAINABLE_TOKENS", "LORA"):
        raise ModelError(f"{file}: peft_type is {kind!r}; supported are TRAINABLE_TOKENS and LORA")
    if adapter.get("modules_to_save"):
        raise ModelError(f"{file}: modules_to_save is {adapter['modules_to_save']}, which is not supported")
    if kind == "LORA" and not isinstance(adapter.get("target_modules"), list):
        raise ModelError(f"{file}: target_modules is {adapter.get('target_modules')!r}, expected a list of names")
    ids = adapter.get("token_indices" if kind == "TRAINABLE_TOKENS" else "trainable_token_indices")
    ids = ids.get("embed_tokens") if isinstance(ids, dict) else ids
    if not isinstance(ids, list) or not ids or type(ids[0]) is not int or ids != list(range(ids[0], ids[0] + count)):
        raise ModelError(
            f"{file}: trained tokens are {ids}, expected {count} consecutive ids, as many as special_tokens"
        )
    return ids


def _read_adapter(file: Path, kind: str) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Return the trained rows, the base's input embeddings if stored, and the LoRA tensors."""
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: not readable: {error}") from error
    rows = embeddings = None
    lora: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(".trainable_tokens_delta"):
            rows = tensor.float()
        elif ".embed_tokens." in name and name.endswith(".base_layer.weight"):
            embeddings = tensor
        elif kind == "LORA" and ".lora_" in name and name.startswith(_KEY_PREFIX):
            lora[name.removeprefix(_KEY_PREFIX)] = tensor
        else:
            raise ModelError(f"{file}: holds {name}, which is neither a trained row nor LoRA; not supported")
    if rows is None:
        raise ModelError(f"{file}: holds no trained rows (trainable_tokens_delta)")
    return rows, embeddings, lora


def _read_projection(file: Path, width: int) -> dict[str, Tensor]:
    """Return ``weight`` and ``bias`` of a linear layer with input size ``width``."""
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(f"{file}: not readable without running code: {first_line(error)}") from error
    if not isinstance(stored, dict) or not all(isinstance(stored.get(key), dict) for key in ("state_dict", "config")):
        raise ModelError(f"{file}: expected state_dict and config")
    state, config = stored["state_dict"], stored["config"]
    if config.get("size", 1) != 1:
        raise ModelError(
            f"{file}: size is {config['size']}, a projection for each special token; only one is supported"
        )
    if config.get("pooling_mode", "linear") != "linear":
        raise ModelError(f"{file}: pooling_mode is {config['pooling_mode']!r}, supported is 'linear'")
    tensors = {part: state.get(f"projection.{part}") for part in ("weight", "bias")}
    shapes = [tuple(one.shape) if isinstance(one, Tensor) else None for one in tensors.values()]
    # Exactly a weight of N x width and a bias of N.
    if len(state) != 2 or shapes[0] is None or shapes != [(*shapes[0][:1], width), shapes[0][:1]]:
        raise ModelError(
            f"{file}: holds {', '.join(f'{name} {shape_text(one)}' for name, one in state.items())}; expected "
            f"projection.weight N x {width} and projection.bias N"
        )
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader that ignores unknown tags."""


def _plain(loader: _PlainLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)  # pyright: ignore[reportArgumentType]


_PlainLoader.add_constructor(None, _plain)  # pyright: ignore[reportArgumentType]


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _PlainLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: not readable as YAML: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected names and values")
    return content
