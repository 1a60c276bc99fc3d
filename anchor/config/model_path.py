"""Model paths: a folder, a `.gguf` file or a hub name. All commands share this rule."""

import os
from dataclasses import dataclass
from pathlib import Path

from anchor.errors import ModelError

_TRUE = ("1", "ON", "YES", "TRUE")
"""Values that huggingface_hub treats as true."""
_WHOLE = ("config.json",)


@dataclass(frozen=True, slots=True)
class ModelPath:
    """Arguments for transformers' ``from_pretrained``.

    Attributes:
        name: folder or hub name.
        gguf_file: file inside the folder, or None.
    """

    name: str
    gguf_file: str | None

    def kwargs(self) -> dict[str, str]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def resolve_model_path(path: str, files: tuple[str, ...] = _WHOLE) -> ModelPath:
    """Resolve a path to a folder, a GGUF file or a hub name.

    A path that exists is local. ``owner/name`` that does not exist is a hub name. With ``HF_HUB_OFFLINE`` set, the
    hub's cache must hold it. Any other path is an error.

    Args:
        path: path from the recipe or the command line.
        files: a folder must hold one of these. A folder with only a tokenizer has no config.json.

    Raises:
        ModelError: the folder or file does not exist, or the folder has none of ``files``. An adapter in place of a
            whole model is refused too: transformers would load its base with the adapter unmerged.
    """
    try:
        local = Path(path).expanduser()
    except RuntimeError as error:
        raise ModelError(f"{path}: no such user's home") from error
    if not path:
        raise ModelError("no model: its path is empty; give a folder, a .gguf file or a hub name")
    if path.endswith(".gguf"):
        if not local.is_file():
            raise ModelError(f"{path}: no such GGUF file")
        return ModelPath(str(local.parent), local.name)
    if local.is_dir():
        if files == _WHOLE and (local / "adapter_config.json").is_file():
            raise ModelError(
                f"{path}: holds an adapter (adapter_config.json), not a whole model; merge it into its base with "
                "peft's merge_and_unload and give the folder that is saved then"
            )
        if not any((local / file).is_file() for file in files):
            raise ModelError(
                f"{path}: not a model folder, it has no {' or '.join(files)}; an exported model is in RUN/export"
            )
        return ModelPath(str(local), None)
    if local.exists():
        raise ModelError(f"{path}: expected a model folder, a .gguf file or a hub name, got a file")
    remedy = "hub names are looked up only when HF_HUB_OFFLINE is not 1"
    if path.count("/") == 1 and path[0] not in "./~":
        from huggingface_hub import try_to_load_from_cache

        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE
        if not offline or any(isinstance(try_to_load_from_cache(path, file), str) for file in files):
            return ModelPath(path, None)
        remedy = f"its cache has none either, and {remedy}"
    raise ModelError(f"{path}: no such model folder ({remedy})")
