"""Read tokenizer files with one-line errors, fingerprint them, and build post-processors with a template."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from anchor.config.model_path import resolve_model_path
from anchor.errors import ModelError, ShardError, first_line

_LFS_POINTER = b"version https://git-lfs"
_LFS_SUFFIXES = (".json", ".safetensors", ".model", ".gguf")
_RARE = "\u241f"
"""A character that few vocabularies have. Encoding it fails if the vocabulary lacks its unknown token."""
# Invalid files make transformers fail in many ways: a missing key, a wrong type, endless nesting.
_FAILURES = (
    *(OSError, ValueError, ImportError, LookupError, TypeError, AttributeError, RecursionError),
    StrictDataclassError,
)


def load_tokenizer(path: str) -> Any:
    """Load a fast transformers tokenizer from a folder, hub name or GGUF file (the last needs torch).

    Raises:
        ModelError: the model does not exist, or has no fast tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer  # takes a second to import; pure functions here do not need it

    location = resolve_model_path(path, files=("config.json", "tokenizer.json"))
    with _one_line(path):
        refuse_lfs_pointers(Path(location.name))
        tokenizer = AutoTokenizer.from_pretrained(location.name, trust_remote_code=False, **location.kwargs())
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{path}: the tokenizer is not a fast one (tokenizer.json); convert it first")
    with _one_line(path):
        tokenizer.backend_tokenizer.encode(_RARE)
    return tokenizer


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a ``tokenizer.json``.

    Raises:
        ModelError: the file is missing, a Git LFS pointer, or not readable by this version of the library.
    """
    with _one_line(str(file)):
        refuse_lfs_pointers(file.parent)
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.encode(_RARE)
    return tokenizer


@contextmanager
def _one_line(path: str) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        raise ModelError(f"{path}: no tokenizer could be loaded: {first_line(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises no narrower class
            raise
        raise ModelError(f"{path}: no tokenizer could be loaded: {first_line(error)}") from error


def refuse_lfs_pointers(folder: Path) -> None:
    """Refuse a model folder that was cloned without Git LFS; do nothing for a hub name, which has no local files.

    Raises:
        ModelError: a file of the folder is a Git LFS pointer.
    """
    for file in sorted(file for suffix in _LFS_SUFFIXES for file in folder.glob(f"*{suffix}")):
        if not file.is_file():
            continue
        with file.open("rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ModelError(f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def tokenizer_fingerprint(folder: Path) -> str:
    """Return the sha256 (hex) of a folder's tokenizer.json. An equal fingerprint means equal ids."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def shards_tokenizer(shards: Path, sha256: str) -> Tokenizer:
    """Read the tokenizer of a folder of shards and check it against the fingerprint in the index.

    Raises:
        ShardError: the tokenizer is missing or altered.
    """
    folder = shards / "tokenizer"
    if not (folder / "tokenizer.json").is_file() or tokenizer_fingerprint(folder) != sha256:
        raise ShardError(f"{folder}: missing or not the tokenizer that the shards were made with; pack again")
    return read_tokenizer(folder / "tokenizer.json")


def template_processor(backend: Tokenizer, prefix_ids: Sequence[int], suffix_ids: Sequence[int]) -> TemplateProcessing:
    """Build a post-processor that puts prefix and suffix around a text, with one piece per token, named after it.

    Readers outside Python (JavaScript, gguf) look a piece up by its name and do not support a piece of several tokens.
    """
    named = {i: str(backend.id_to_token(i)) for i in (*prefix_ids, *suffix_ids)}

    def pieces(ids: Sequence[int], type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": named[i], "type_id": type_id}} for i in ids]

    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for name, type_id in (("A", 0), ("B", 1)))
    stored = {
        "type": "TemplateProcessing",
        "single": [*pieces(prefix_ids, 0), first, *pieces(suffix_ids, 0)],
        "pair": [*pieces(prefix_ids, 0), first, second, *pieces(suffix_ids, 1)],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in named.items()},
    }
    processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    # The constructor parses a piece in a mini-language that cannot express ":" and "$" as tokens.
    processor.__setstate__(json.dumps(stored).encode())
    return processor


def name_pieces(folder: Path) -> None:
    """Rewrite a post-processor with pieces of several tokens, which earlier versions saved, to one piece per token.

    The ids stay the same; see :func:`template_processor`.

    Args:
        folder: folder with ``tokenizer.json``.
    """
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    processor = content.get("post_processor") or {}
    stored = processor.get("special_tokens") or {}
    if processor.get("type") != "TemplateProcessing" or all(one["tokens"] == [name] for name, one in stored.items()):
        return
    tokens = {name: id_ for one in stored.values() for name, id_ in zip(one["tokens"], one["ids"], strict=True)}
    for key in ("single", "pair"):
        processor[key] = [named for piece in processor[key] for named in _named(piece, stored)]
    processor["special_tokens"] = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in tokens.items()}
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _named(piece: dict[str, Any], stored: dict[str, Any]) -> list[dict[str, Any]]:
    special = piece.get("SpecialToken")
    if special is None:
        return [piece]
    return [{"SpecialToken": {**special, "id": name}} for name in stored[special["id"]]["tokens"]]
