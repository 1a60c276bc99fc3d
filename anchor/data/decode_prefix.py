"""Optional tokens before the prefix vectors of a decode row.

A language model uses whatever vector is at position 0 as its attention sink. With tokens before them, the anchor vector
or the soft prompts are free to carry information instead.
"""

import json
from pathlib import Path

from anchor.config.objectives import DecodePrefix, ReconstructionSection, SelfSupervisedSection
from anchor.config.train_recipe import TrainRecipe
from anchor.data.index import Index, read_index
from anchor.data.tokenizer_files import read_tokenizer
from anchor.errors import ShardError


def template_prefix_ids(shards: Path) -> list[int]:
    """Return the ids of the template's prefix, which begins every segment of the shards.

    They come from the tokenizer's post-processor. A reloaded LlamaTokenizer may tokenize the prefix's text differently
    from the tokenizer that packed the shards.
    """
    stored = read_tokenizer(shards / "tokenizer" / "tokenizer.json").encode("a")
    return stored.ids[: stored.special_tokens_mask.index(0)]


def decode_prefix_ids(kind: DecodePrefix, index: Index, shards: Path) -> tuple[int, ...]:
    """Return the ids of a decode prefix.

    Args:
        kind: ``none``, ``bos`` or ``template`` (the template's prefix). ``bos`` is the tokenizer's BOS token. Without
            one it is the first token of the template's prefix, or, if that is empty, the token that ends decoded texts.
        index: index of the shards.
        shards: folder of the shards.

    Raises:
        ShardError: ``kind`` is ``template``, but the template has no prefix.
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


def decode_prefix_of(recipe: TrainRecipe) -> tuple[int, ...]:
    """Return the token ids before the prefix vectors of the recipe's decode rows; empty if nothing is decoded.

    Raises:
        ShardError: the recipe asks for the template's prefix, and the template has none.
    """
    section, shards = recipe.objective, recipe.data.shards
    if not isinstance(section, ReconstructionSection | SelfSupervisedSection):
        return ()
    return (
        decode_prefix_ids(section.decode_prefix, read_index(shards), shards) if section.decode_prefix != "none" else ()
    )
