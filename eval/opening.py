"""Which encoder serves a model folder."""

from pathlib import Path

from anchor.config.model_path import resolve_model_path
from anchor.errors import ConfigError, ModelError
from eval.encoder import Encoder
from eval.plain import PlainEncoder


def open_encoder(
    folder: Path, *, dtype: str, attention: str | None = None, pack_tokens: int = 8192
) -> Encoder | PlainEncoder:
    """The encoder for a folder: exported by this project, or any that sentence-transformers reads.

    Raises:
        ModelError: missing folder, or neither ``anchor.json`` nor ``modules.json`` in it.
    """
    resolve_model_path(str(folder))
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
