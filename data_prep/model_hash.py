"""Hash of a model's weights, so that a run never resumes with another model at the same path."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from anchor.errors import ModelError

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def weights_sha256(files: Iterable[Path], where: str) -> str:
    """Return the sha256 (hex) of the weight files among some files, in the order of their paths.

    Args:
        files: files of a model.
        where: name of the model, for the message.

    Raises:
        ModelError: if no file holds weights.
    """
    weights = sorted(file for file in files if file.suffix in _SUFFIXES and file.is_file())
    if not weights:
        raise ModelError(f"{where}: no weights; expected a file that ends in one of {', '.join(_SUFFIXES)}")
    digest = hashlib.sha256()
    for file in weights:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
