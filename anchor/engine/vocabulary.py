"""Whether a backbone has the tokens of the shards, before ids without a meaning are trained on."""

from pathlib import Path

from tokenizers import Tokenizer

from anchor.data.shards import Index
from anchor.engine.special_tokens import first_special_id
from anchor.errors import ModelError

_REMEDY = "pack with this model's tokenizer"


def check_vocabulary(vocabulary: int, path: str, index: Index, shards: Path) -> None:
    """Refuse a backbone whose tokens are not those of the shards, special tokens left out.

    Tokens that were added to a tokenizer's own are not compared: what a model never saw may lie beyond its embeddings.
    Of a hub name and of a GGUF file the tokenizer is not read, only the number of tokens compared.

    Args:
        vocabulary: tokens that the backbone has embeddings of (``vocab_size``).
        path: where it comes from, a folder with its tokenizer or not.
        index: of the shards.
        shards: their folder.

    Raises:
        ModelError: a token of the shards has no embedding, or the folder's tokenizer gives its id to another.
    """
    if "special_tokens" in index.template:
        first, end = first_special_id(index), index.end_token_id
        if first > vocabulary or end is None or end >= vocabulary:
            raise ModelError(
                f"{path}: {vocabulary} tokens, the shards have {first} before the special tokens and end texts with "
                f"{end}; {_REMEDY}"
            )
    elif index.anchor_token_id >= vocabulary:
        raise ModelError(f"{path}: {vocabulary} tokens, the shards' anchor token is {index.anchor_token_id}; {_REMEDY}")
    file = shards / "tokenizer/tokenizer.json"
    tokens = _own_tokens(file)
    highest = max(tokens.values(), default=0)
    if highest >= vocabulary:
        raise ModelError(f"{path}: {vocabulary} tokens, {file} has ids up to {highest}; {_REMEDY}")
    beside = Path(path).expanduser() / "tokenizer.json"
    if beside.is_file() and (theirs := _own_tokens(beside)) != tokens:
        token, _ = min(tokens.items() ^ theirs.items(), key=lambda item: item[::-1])
        raise ModelError(
            f"{path}: its tokenizer is not the one of {shards}: {token!r} is {theirs.get(token)} there and "
            f"{tokens.get(token)} in the shards; {_REMEDY}"
        )


def _own_tokens(file: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=False)
