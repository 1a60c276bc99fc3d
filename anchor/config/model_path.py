"""Where a model is: a folder, a `.gguf` file or a name on the hub. One rule for every command."""

import os
from dataclasses import dataclass
from pathlib import Path

from anchor.errors import ModelError


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


def resolve_model_path(path: str, files: tuple[str, ...] = ("config.json",)) -> ModelPath:
    """Tell a folder, a GGUF file and a hub name apart.

    A path that exists is local. ``owner/name`` that does not exist is a hub name. Everything else is missing.

    Args:
        path: as the recipe or the command line gives it.
        files: a folder must hold one of these; a tokenizer alone has no config.json.

    Raises:
        ModelError: no such folder or file, or a folder with none of ``files``.
    """
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        if not local.is_file():
            raise ModelError(f"{path}: no such GGUF file")
        return ModelPath(str(local.parent), local.name)
    if local.is_dir():
        if not any((local / file).is_file() for file in files):
            raise ModelError(
                f"{path}: not a model folder, it has no {' or '.join(files)}; an exported model is in RUN/export"
            )
        return ModelPath(str(local), None)
    if local.exists():
        raise ModelError(f"{path}: expected a model folder, a .gguf file or a hub name, got a file")
    if path.count("/") == 1 and path[0] not in "./~" and os.environ.get("HF_HUB_OFFLINE", "0") not in ("1", "true"):
        return ModelPath(path, None)
    raise ModelError(f"{path}: no such model folder (hub names are looked up only when HF_HUB_OFFLINE is not 1)")
