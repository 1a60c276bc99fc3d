"""Check shards against the recipe's objective, and a backbone against the shards: template, tokens and positions."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from anchor.config.objectives import SelfSupervisedSection
from anchor.config.train_recipe import TrainRecipe
from anchor.data.index import Index
from anchor.data.positions import check_positions
from anchor.data.templates import special_token_names
from anchor.data.tokenizer_files import read_tokenizer
from anchor.errors import ModelError, ShardError
from anchor.json_files import read_model_json

_REMEDY = "pack with this model's tokenizer"


def check_template(recipe: TrainRecipe, index: Index, where: str) -> None:
    """Refuse shards whose template or teacher does not suit the recipe's objective.

    Args:
        recipe: the training recipe.
        index: index of its shards.
        where: the recipe's path, for messages.

    Raises:
        ShardError: special tokens or a teacher are missing, the objective would not train the shards' special tokens,
            or the shards' tokenizer has others.
    """
    kind, shards, count = recipe.objective.kind, recipe.data.shards, index.template.get("special_tokens", 0)
    if not isinstance(recipe.objective, SelfSupervisedSection):
        if count:
            raise ShardError(
                f"{where}: objective.kind is {kind}, but {shards} was packed with {count} special tokens, which only "
                "self_supervised trains; pack with a template of another kind"
            )
        return
    if not count:
        raise ShardError(
            f"{where}: objective.kind is self_supervised, but {shards} was packed without special tokens; pack with "
            "template.kind: special_tokens"
        )
    _check_names(recipe, index, count)
    if index.teacher is None:
        raise ShardError(
            f"{where}: objective.kind is self_supervised, but {shards} has no teacher's embeddings; run "
            f"`python -m data_prep teach {shards} --output NEW` and set data.shards to NEW"
        )


def _check_names(recipe: TrainRecipe, index: Index, count: int) -> None:
    file = recipe.data.shards / "tokenizer/tokenizer.json"
    added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    first = index.first_special_id
    found = [ids.get(name) for name in special_token_names(count)]
    if found != list(range(first, first + count)) or special_token_names(count + 1)[-1] in ids:
        raise ShardError(
            f"{file}: its special tokens are not the {count} from id {first} on that index.json says; pack again"
        )


def check_backbone(config: Any, path: str, index: Index, shards: Path) -> None:
    """Refuse a backbone that the shards were not packed for, before its weights are read.

    Args:
        config: the backbone's configuration, as transformers holds it.
        path: where the backbone comes from.
        index: index of the shards.
        shards: their folder.

    Raises:
        ModelError: see :func:`check_vocabulary` and :func:`check_exported_template`.
        DataError: the shards' texts are longer than the backbone's positions.
    """
    check_vocabulary(config.vocab_size, path, index, shards)
    check_positions(config.to_dict(), path, index.recipe["text"]["max_tokens"], f"{shards}: text.max_tokens")
    check_exported_template(path, index, shards)


def check_exported_template(path: str, index: Index, shards: Path) -> None:
    """Refuse an exported folder whose template differs from the shards'.

    Shards with special tokens to train have their own template, whatever the backbone was trained with, and are not
    checked.

    Args:
        path: path of the backbone; only a folder with ``anchor.json`` states its template.
        index: index of the shards.
        shards: their folder.

    Raises:
        ModelError: the templates differ.
    """
    file = Path(path).expanduser() / "anchor.json"
    if "special_tokens" in index.template or not file.is_file():
        return
    theirs = read_model_json(file).get("template")
    if not isinstance(theirs, dict):
        return
    for key in sorted({*theirs, *index.template}):
        if theirs.get(key) != index.template.get(key):
            raise ModelError(
                f"{path}: has another template than {shards}: {key} is {theirs.get(key)!r} in its anchor.json and "
                f"{index.template.get(key)!r} in the shards; pack with template.kind: custom and the values of "
                "anchor.json"
            )


def check_vocabulary(vocabulary: int, path: str, index: Index, shards: Path) -> None:
    """Refuse a backbone whose tokens differ from the shards', special tokens left out.

    Only added tokens that segments may hold are compared. Others, such as a padding token that a user has added, may
    lie beyond the model's embeddings. For a hub name or a GGUF file the tokenizer is not read, and only the number of
    tokens is compared.

    Args:
        vocabulary: number of tokens that the backbone has embeddings for (``vocab_size``).
        path: where the backbone comes from; a folder may hold its tokenizer.
        index: index of the shards.
        shards: their folder.

    Raises:
        ModelError: a token of the shards has no embedding, or the folder's tokenizer gives its id to another token.
    """
    if "special_tokens" in index.template:
        first, end = index.first_special_id, index.end_token_id
        if first > vocabulary or end is None or end >= vocabulary:
            raise ModelError(
                f"{path}: {vocabulary} tokens, the shards have {first} before the special tokens and end texts with "
                f"{end}; {_REMEDY}"
            )
    elif index.anchor_token_id >= vocabulary:
        raise ModelError(f"{path}: {vocabulary} tokens, the shards' anchor token is {index.anchor_token_id}; {_REMEDY}")
    file = shards / "tokenizer/tokenizer.json"
    tokenizer = read_tokenizer(file)
    tokens = tokenizer.get_vocab(with_added_tokens=False)
    highest = max(tokens.values(), default=0)
    if highest >= vocabulary:
        raise ModelError(f"{path}: {vocabulary} tokens, {file} has ids up to {highest}; {_REMEDY}")
    beside = Path(path).expanduser() / "tokenizer.json"
    if not beside.is_file():
        return
    other = read_tokenizer(beside)
    if (theirs := other.get_vocab(with_added_tokens=False)) != tokens:
        token, _ = min(tokens.items() ^ theirs.items(), key=lambda item: item[::-1])
        raise ModelError(
            f"{path}: its tokenizer is not the one of {shards}: {token!r} is {theirs.get(token)} there and "
            f"{tokens.get(token)} in the shards; {_REMEDY}"
        )
    for token, number in _added_in_use(tokenizer, index).items():
        found, name = other.token_to_id(token), other.id_to_token(number)
        if found not in (None, number) or name not in (None, token):
            there = f"{token!r} is {found}" if found is not None else f"{number} is {name!r}"
            raise ModelError(
                f"{path}: its tokenizer is not the one of {shards}: {there} there, and {token!r} is {number} in the "
                f"shards; {_REMEDY}"
            )


def _added_in_use(tokenizer: Tokenizer, index: Index) -> dict[str, int]:
    """Return the added tokens that segments may hold: those of the template, and those that texts become.

    The trained special tokens are left out: they come after the backbone's own.
    """
    frame = tokenizer.encode("a")
    used = {i for i, of_template in zip(frame.ids, frame.special_tokens_mask, strict=True) if of_template}
    used |= set() if index.end_token_id is None else {index.end_token_id}
    first = index.first_special_id if "special_tokens" in index.template else None
    return {
        token.content: number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if (number in used or not token.special) and (first is None or number < first)
    }
