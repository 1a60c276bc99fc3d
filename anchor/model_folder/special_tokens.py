"""Load a folder that holds only special tokens: its base, its adapter if it has one, and the special tokens."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from anchor.config.model_path import resolve_model_path
from anchor.errors import ModelError
from anchor.json_files import read_model_json
from anchor.model_folder.description import check_base, read_description
from anchor.models.adapters import load_adapter
from anchor.models.backbone import load_causal_lm
from anchor.models.special_tokens import WEIGHTS_NAME, SpecialTokens, SpecialTokensEmbedder

ADAPTER_NAME = "adapter"


def load_special_tokens(folder: Path) -> SpecialTokens:
    """Load the special tokens of an exported folder, in float32.

    Raises:
        ModelError: a file is missing or unreadable, or a tensor's shape contradicts ``anchor.json`` or
            ``config.json``.
    """
    said, hidden_size = read_description(folder), read_model_json(folder / "config.json").get("hidden_size")
    if not isinstance(hidden_size, int):
        raise ModelError(f"{folder / 'config.json'}: hidden_size is {hidden_size!r}, expected a number; export again")
    special = SpecialTokens(said.count, hidden_size, said.dimension, said.first_id)
    file = folder / WEIGHTS_NAME
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: missing or unreadable ({type(error).__name__}); export again") from error
    for name, tensor in special.state_dict().items():
        found, expected = shape_text(stored.get(name)), shape_text(tensor)
        if found != expected:
            raise ModelError(
                f"{file}: {name} is {found}, expected {expected} by anchor.json and config.json; export again"
            )
    special.load_state_dict({name: stored[name].float() for name in special.state_dict()})
    return special


def shape_text(tensor: object) -> str:
    """Format a tensor's shape as ``"3 x 32"``; for any other value, return ``"missing"`` (None) or its type."""
    if isinstance(tensor, Tensor):
        return " x ".join(map(str, tensor.shape)) or "one number"
    return "missing" if tensor is None else type(tensor).__name__


def load_special_tokens_embedder(
    folder: Path, dtype: torch.dtype, attention: str, base: str | None = None
) -> SpecialTokensEmbedder:
    """Load the embedder of an exported folder, ready to serve.

    The base and the adapter are in ``dtype``. The rows and projections are float32.

    Args:
        folder: the model folder.
        dtype: dtype of the base and the adapter.
        attention: transformers' name of the packed kernel.
        base: folder, GGUF file or hub name of the base; None takes it from ``anchor.json``.

    Raises:
        ModelError: the folder is unreadable, or the base is missing or not the one used in training.
    """
    special = load_special_tokens(folder)
    path = find_base(folder, base or read_description(folder).base)
    causal_lm = load_causal_lm(path, dtype, attention)
    check_base(causal_lm, path, folder)
    if (folder / ADAPTER_NAME).is_dir():
        load_adapter(causal_lm, folder / ADAPTER_NAME)
    return SpecialTokensEmbedder(causal_lm, special)


def find_base(folder: Path, path: str) -> str:
    """Locate a folder's base model; return an absolute path, or a hub name unchanged.

    Args:
        folder: the folder that needs the base, for the error message.
        path: folder, GGUF file or hub name.

    Raises:
        ModelError: there is no model at the path.
    """
    try:
        resolve_model_path(path)
    except ModelError as error:
        raise ModelError(f"{folder}: needs its base model, but {error}; say where it lies by --base PATH") from error
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path
