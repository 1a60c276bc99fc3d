"""``python -m eval convert``: convert a model from LLM2Vec-Gen's published layout to this project's export layout.

1. :mod:`eval.conversion.original` reads rows, projections and adapter. The base model must be available and match them.
2. The tokenizer appends the special tokens to every text, like the authors' code. Leading and trailing white space is
   kept, as in the authors' ``encode``. Here, names of special tokens inside a text are ordinary text.
3. The folder is written to a temporary folder and renamed. Its vectors and decoded texts equal those of the original.
   Only a folder that this command made is ever replaced.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from anchor.data.positions import check_positions
from anchor.data.templates import Template
from anchor.data.tokenization import prepare_tokenizer
from anchor.data.tokenizer_files import load_tokenizer
from anchor.errors import ConfigError, ModelError
from anchor.json_files import read_model_json
from anchor.model_folder.consumer_files import write_json_files, write_special_tokens_files
from anchor.model_folder.description import Description, base_fingerprint
from anchor.model_folder.special_tokens import ADAPTER_NAME, find_base
from anchor.model_folder.special_tokens_export import card
from anchor.models.attention import implementation
from anchor.models.backbone import load_causal_lm, read_config
from eval.conversion.original import Original, read_original

log = logging.getLogger(__name__)

PROMPTS = {
    "query": "Generate a passage that best answers this question: ",
    "document": "Summarize the following passage: ",
}
"""The paper's two prompts."""

_ANSWER_END = "<|end_of_text|>"
"""Text that the authors' training appends to every answer: one token for Llama, six for Qwen."""
_STOPS = (_ANSWER_END, "<|endoftext|>")
"""Tokens that end the authors' generation, besides the tokenizer's own end-of-text token: 128001, 151643."""


def convert(
    folder: Path, output: Path, *, base: str | None = None, max_tokens: int = 512, overwrite: bool = False
) -> None:
    """Convert a folder.

    Args:
        folder: model folder in the published layout.
        output: the new folder.
        base: path of the base model; None uses the one in ``run_config.yml``.
        max_tokens: longest text that the new folder embeds, special tokens included.
        overwrite: replace an output that this function made.

    Raises:
        ModelError: the folder is unreadable or unsupported, or its base is missing or the wrong one.
        ConfigError: the output exists, or overlaps the folder or the base; or ``max_tokens`` leaves no room for text.
    """
    original = read_original(folder)
    path = find_base(folder, base or original.base)
    _check_output(output, folder, path, overwrite=overwrite)
    tokenizer, template, stops = _tokenizer(folder, original)
    taken = tokenizer.backend_tokenizer.num_special_tokens_to_add(False)
    if max_tokens <= taken:
        raise ConfigError(f"--max-tokens ({max_tokens}) leaves no room for text: the template takes {taken} tokens")
    causal_lm = load_causal_lm(path, torch.bfloat16, implementation("segments", "cpu", torch.bfloat16))
    _check_base(folder, original, causal_lm, path)
    check_positions(causal_lm.config.to_dict(), path, max_tokens, "--max-tokens")
    dimension = len(original.projections["alignment.bias"])
    said = Description(path, base_fingerprint(causal_lm), len(original.names), original.token_ids[0], dimension)
    about: dict[str, Any] = {
        "objective": "self_supervised",
        "template": template.to_json(),
        "anchor_token_id": original.token_ids[-1],
        "prompts": PROMPTS,
        "max_tokens": max_tokens,
        **said.to_json(),
        "end_token_id": stops[0],
        "stop_token_ids": stops,
        "teacher": None,
        "converted": {"from": str(folder.resolve()), "layout": "LLM2Vec-Gen", "run_config": original.run},
    }
    origin = f"converted from `{folder.name}`"
    readme = card("LLM2Vec-Gen, converted", said, origin, PROMPTS, max_tokens, adapter=bool(original.lora))
    with _written_beside(output) as beside:
        tokenizer.save_pretrained(beside)
        weights = {"rows": original.rows, **original.projections}
        write_special_tokens_files(beside, weights, read_config(path), PROMPTS, max_tokens)
        if original.lora:
            _write_adapter(beside / ADAPTER_NAME, original, causal_lm.base_model_prefix, path)
        (beside / "README.md").write_text(readme, encoding="utf-8")
        write_json_files(beside, {"anchor.json": about})
    log.info("%s: %d special tokens over %s, vectors of %d", output, said.count, path, dimension)


def _check_output(output: Path, folder: Path, base: str, *, overwrite: bool) -> None:
    """Refuse an output whose replacement would lose files that this command did not make."""
    place = output.resolve()
    for what, path in (("model", folder), ("base", Path(base))):
        other = path.resolve()
        if path.exists() and (place.is_relative_to(other) or other.is_relative_to(place)):
            raise ConfigError(f"{output}: is, holds or lies in the {what} {path}; choose another --output")
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise ConfigError(f"{output}: not a folder; choose another --output")
    if not overwrite:
        raise ConfigError(f"{output}: exists; choose another --output or add --overwrite")
    about = output / "anchor.json"
    if not about.is_file() or "converted" not in read_model_json(about):
        raise ConfigError(f"{output}: not made by `eval convert`, so it is not overwritten; choose another --output")


@contextmanager
def _written_beside(output: Path) -> Iterator[Path]:
    """Yield a new folder that replaces the output when the ``with`` block succeeds; delete the old one then."""
    place = output.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        holder = TemporaryDirectory(prefix=f"{place.name}.", dir=place.parent)
    except OSError as error:
        raise ConfigError(f"{output}: no folder can be made: {error.strerror}; choose another --output") from error
    with holder as name:
        new = Path(name) / "new"
        new.mkdir()
        yield new
        if place.exists():
            place.rename(Path(name) / "old")
        new.rename(place)


def _check_base(folder: Path, original: Original, causal_lm: PreTrainedModel, path: str) -> None:
    """Refuse a base whose shape or input embeddings differ from the published folder's."""
    for key in ("model_type", "hidden_size", "num_hidden_layers"):
        found, expected = getattr(causal_lm.config, key), original.config.get(key)
        if found != expected:
            raise ModelError(f"{path}: not the base of {folder}: {key} is {found}, expected {expected}")
    own, first = cast(Tensor, causal_lm.get_input_embeddings().weight), original.token_ids[0]
    if len(own) < first:
        raise ModelError(f"{path}: not the base of {folder}: {len(own)} tokens, expected at least {first}")
    stored = original.embeddings
    if stored is not None and not torch.equal(stored[:first].to(own.dtype), own[:first]):
        raise ModelError(f"{path}: not the base of {folder}: the input embeddings in encoder/ are others")


def _tokenizer(folder: Path, original: Original) -> tuple[Any, Template, list[int]]:
    """Return a tokenizer that applies the template itself, the template, and the tokens that end an answer."""
    tokenizer: Any = load_tokenizer(str(folder))
    ids = tokenizer.convert_tokens_to_ids(original.names)
    if ids != original.token_ids:
        raise ModelError(
            f"{folder}: the tokenizer's ids of {original.names[0]} … {original.names[-1]} are {ids}, those of the "
            f"trained rows {original.token_ids}"
        )
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    if tokenizer.eos_token is None:
        raise ModelError(f"{folder}: the tokenizer has no end-of-text token, so nothing would end a decoded text")
    known = {token.content: number for number, token in added.items()}
    end = _ANSWER_END if _ANSWER_END in known else tokenizer.eos_token
    names = dict.fromkeys((end, tokenizer.eos_token, *(name for name in _STOPS if name in known)))
    bare, whole = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    if whole[len(whole) - len(bare) :] != bare:
        raise ModelError(f"{folder}: the tokenizer puts tokens behind a text, where the special tokens belong")
    prefix = "".join(tokenizer.convert_ids_to_tokens(whole[: len(whole) - len(bare)]))
    template = Template(prefix, "".join(original.names), "{instruction}: {text}", len(original.names), end)
    if not all(one in added for one in ids):
        raise ModelError(
            f"{folder}: {original.names[0]} … {original.names[-1]} are not all added tokens of the tokenizer"
        )
    # The tokenizer already has its special tokens; a template with zero of them adds none.
    prepare_tokenizer(tokenizer, replace(template, special_tokens=0), str(folder))
    return tokenizer, template, tokenizer.convert_tokens_to_ids(list(names))


def _write_adapter(folder: Path, original: Original, prefix: str, base: str) -> None:
    """Write the LoRA adapter, without the trained rows, for the causal LM whose backbone is named ``prefix``."""
    folder.mkdir()
    tensors = {f"base_model.model.{prefix}.{name}": one.contiguous() for name, one in original.lora.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    changes = {
        "trainable_token_indices": None,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
    }
    write_json_files(folder, {"adapter_config.json": {**original.adapter, **changes}})
