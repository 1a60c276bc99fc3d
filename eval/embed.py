"""``python -m eval embed``: texts of a JSON-lines or plain text file -> ``embeddings.npy`` and ``ids.txt``."""

import json
import logging
from pathlib import Path

import numpy as np

from anchor.errors import ConfigError, DataError, did_you_mean
from eval.encoder import Encoder

log = logging.getLogger(__name__)


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    """Ids and texts of a ``.jsonl`` file (fields ``text`` and, if present, ``id``) or a ``.txt`` file of lines.

    Raises:
        ConfigError: missing file or another kind of file.
        DataError: malformed line, missing field, an id given twice, no text at all.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected .jsonl with a field 'text', or .txt with one text per line")
    if path.suffix not in (".jsonl", ".txt"):
        raise ConfigError(f"{path}: expected a file ending in .jsonl or .txt")
    ids, texts = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}:{number}"
        row = {"text": line}
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: malformed JSON: {error.msg} at character {error.pos + 1}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f"{where}: no field 'text' with a text{did_you_mean('text', row)}")
        ids.append(str(row.get("id", number - 1)))
        texts.append(row["text"])
    if not texts:
        raise DataError(f"{path}: holds no text")
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise DataError(f"{path}: the id '{twice}' is given twice")
    return ids, texts


def embed(encoder: Encoder, source: Path, output: Path, prompt_name: str | None) -> None:
    """Embed a file into a new folder: ``embeddings.npy`` (float32), ``ids.txt`` and ``manifest.json``.

    Raises:
        AnchorError: bad input, unknown prompt, or an output folder that is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output}: not empty; choose another --output")
    ids, texts = read_texts(source)
    prompt = encoder.prompt(prompt_name) if prompt_name is not None else ""
    vectors = encoder.encode(texts, prompt)
    output.mkdir(parents=True, exist_ok=True)
    np.save(output / "embeddings.npy", vectors)
    (output / "ids.txt").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")
    manifest = {
        "model": str(encoder.folder),
        "revision": encoder.revision(),
        "prompt": prompt,
        "texts": len(texts),
        "dimension": encoder.dimension,
        "dtype": "float32",
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    log.info("%d texts of %s in %s", len(texts), source, output / "embeddings.npy")
