"""The tokens that may stand before the prefix vectors of a decode row.

A language model makes the vector at position 0 its attention sink, whatever stands there. With tokens before it, the
anchor vector (or the soft prompts) can carry what it has to say.
"""

import json
from pathlib import Path

from anchor.config.objectives import DecodePrefix
from anchor.data.index import Index
from anchor.data.tokenizer_files import read_tokenizer
from anchor.errors import ShardError


def template_prefix_ids(shards: Path) -> list[int]:
    """Return the ids of the template's prefix, with which every segment of the shards begins.

    They come from the tokenizer's post-processor: a LlamaTokenizer, loaded again, may cut the prefix's text otherwise
    than the one that the shards were packed with.
    """
    stored = read_tokenizer(shards / "tokenizer" / "tokenizer.json").encode("a")
    return stored.ids[: stored.special_tokens_mask.index(0)]


def decode_prefix_ids(kind: DecodePrefix, index: Index, shards: Path) -> tuple[int, ...]:
    """Return the ids of a decode prefix.

    Args:
        kind: ``none``; ``bos``: the tokenizer's BOS token, or, where it has none, the first token of the template's
            prefix, or, where that is empty, the token that ends decoded texts; ``template``: the template's prefix.
        index: of the shards.
        shards: their folder.

    Raises:
        ShardError: ``template``, but the template has no prefix.
    """
    if kind == "none":
        return ()
    prefix = template_prefix_ids(shards)
    if kind == "template":
        if not prefix:
            raise ShardError(
                f"{shards}: objective.decode_prefix is template, but these shards' template has no prefix; use bos or "
                "none"
            )
        return tuple(prefix)
    bos = _bos_id(shards / "tokenizer")
    if bos is None:
        ends = index.anchor_token_id if index.end_token_id is None else index.end_token_id
        bos = prefix[0] if prefix else ends
    return (bos,)


def _bos_id(folder: Path) -> int | None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    name = config.get("bos_token")
    name = name.get("content") if isinstance(name, dict) else name
    return read_tokenizer(folder / "tokenizer.json").token_to_id(name) if name else None
