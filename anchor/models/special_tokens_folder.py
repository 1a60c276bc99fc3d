"""Load a folder that holds only special tokens: its base, its adapter if it has one, and the special tokens."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from anchor.config.model_path import resolve_model_path
from anchor.errors import UNSAFE_PICKLE, ModelError, weights_line
from anchor.models.backbone import load_causal_lm
from anchor.models.special_tokens import SpecialTokensEmbedder, check_base, load_special_tokens, read_description

ADAPTER_NAME = "adapter"


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
        _add_adapter(causal_lm, folder / ADAPTER_NAME)
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


def _add_adapter(causal_lm: PreTrainedModel, folder: Path) -> None:
    """Add the adapter's layers to the model without merging: in bfloat16, merging would round the adapter away.

    Raises:
        ModelError: the adapter is unreadable or does not fit the model.
    """
    try:
        PeftModel.from_pretrained(causal_lm, str(folder), autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError, KeyError, *UNSAFE_PICKLE) as error:
        raise ModelError(f"{folder}: the adapter could not be loaded: {weights_line(error)}") from error
    causal_lm.requires_grad_(False)
