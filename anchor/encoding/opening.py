"""Choose and open the encoder for a model folder."""

from pathlib import Path

from anchor.config.model_path import resolve_model_path
from anchor.encoding.encoder import Encoder, PackedEncoder, read_about
from anchor.encoding.plain import PlainEncoder
from anchor.encoding.soft_prompts import SoftPromptsEncoder
from anchor.errors import ConfigError, ModelError

SELF_SUPERVISED = "self_supervised"


def open_encoder(
    folder: Path, *, dtype: str, attention: str | None = None, pack_tokens: int = 8192, base: str | None = None
) -> PackedEncoder | PlainEncoder:
    """Open the encoder for a folder that this project exported or that sentence-transformers reads.

    Args:
        folder: the model folder.
        dtype: compute dtype, ``bf16`` or ``fp32``.
        attention: attention kernel; None chooses by device and dtype.
        pack_tokens: most tokens of one forward pass.
        base: path of a self-supervised folder's base model; None uses the path in ``anchor.json``.

    Raises:
        ModelError: the folder is missing, or has neither ``anchor.json`` nor ``modules.json``.
        ConfigError: an option does not apply to this kind of folder.
    """
    resolve_model_path(str(folder), ("config.json", "modules.json"))  # a StaticEmbedding has no config.json
    if objective_of(folder) == SELF_SUPERVISED:
        return SoftPromptsEncoder(folder, dtype=dtype, attention=attention, pack_tokens=pack_tokens, base=base)
    if base is not None:
        raise ConfigError(f"{folder}: holds a whole model, not one of objective self_supervised; leave --base out")
    if (folder / "anchor.json").is_file():
        return Encoder(folder, dtype=dtype, attention=attention, pack_tokens=pack_tokens)
    if not (folder / "modules.json").is_file():
        raise ModelError(
            f"{folder}: neither anchor.json nor modules.json; expected a folder exported by anchor.train or one of "
            "sentence-transformers"
        )
    if attention is not None:
        raise ConfigError(f"{folder}: no anchor.json, so sentence-transformers serves it; leave --attention out")
    return PlainEncoder(folder, dtype=dtype, pack_tokens=pack_tokens)


def objective_of(folder: Path) -> str | None:
    """Return the objective that last trained a folder; None without ``anchor.json``.

    Raises:
        ModelError: ``anchor.json`` is unreadable.
    """
    return read_about(folder).get("objective") if (folder / "anchor.json").is_file() else None
