"""Which model it is: a hash of its weights, so that a folder is never continued by another one of the same path."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from anchor.errors import ModelError

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def weights_sha256(files: Iterable[Path], where: str) -> str:
    """Of those of the files that hold weights, in the order of their paths.

    Args:
        files: of a model.
        where: the model, for the message.

    Raises:
        ModelError: none of them does.
    """
    weights = sorted(file for file in files if file.suffix in _SUFFIXES and file.is_file())
    if not weights:
        raise ModelError(f"{where}: no weights; expected a file that ends in one of {', '.join(_SUFFIXES)}")
    digest = hashlib.sha256()
    for file in weights:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
