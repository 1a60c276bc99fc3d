"""Templates: prefix and suffix of every text, ending in the anchor token, and the instruction format.

A template is data. It comes from a preset, from the model's own chat template or from the recipe. Shards and exported
models store it. The tokenizer's post-processor holds it, so that training and every later consumer produce the same
ids.
"""

import logging
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from anchor.config.pack_recipe import ChatTemplate, CustomTemplate, PresetTemplate, SpecialTokensTemplate
from anchor.data.chat_templates import chat_frame, ends_a_turn
from anchor.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

_SPACE = "\u2581"
"""SentencePiece's character for a space."""


@dataclass(frozen=True, slots=True)
class Template:
    """Prefix and suffix as text with special tokens by name, and the instruction format.

    Attributes:
        prefix: text before every segment.
        suffix: text after every segment; its last token is the anchor token.
        instruction_format: format string that ends in ``{text}``.
        special_tokens: number of trained special tokens at the end of ``suffix``; 0 if the anchor token is the model's
            own.
        end: name of the token that ends a decoded text; only with special tokens.
    """

    prefix: str
    suffix: str
    instruction_format: str
    special_tokens: int = 0
    end: str | None = None

    def instructed(self, text: str, instruction: str | None) -> tuple[str, int]:
        """Return the text with its instruction, and the character index where the bare text begins."""
        if instruction is None:
            return text, 0
        head = self.instruction_head(instruction)
        return head + text, len(head)

    def instruction_head(self, instruction: str) -> str:
        """Return the text that ``instruction`` puts before a text: the prompt of the exported model."""
        head, _, _ = self.instruction_format.rpartition("{text}")
        return head.replace("{instruction}", instruction)

    def to_json(self) -> dict[str, Any]:
        """Return the dict that shards and exported models store; ``Template(**stored)`` reads it."""
        stored = {"prefix": self.prefix, "suffix": self.suffix, "instruction_format": self.instruction_format}
        if not self.special_tokens:
            return stored
        return {**stored, "special_tokens": self.special_tokens, "end": self.end}


def special_token_names(count: int) -> list[str]:
    """Return the names of the trained special tokens, in order."""
    return [f"<|anchor_{number}|>" for number in range(count)]


PRESETS: dict[str, tuple[str, str]] = {
    "chatml": ("<|im_start|>user\n", "<|im_end|>"),
    "llama3": ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistral": ("<s>[INST] ", " [/INST]</s>"),
    "plain": ("{bos}", "{eos}"),
}
"""Prefix and suffix per family; ``{bos}`` and ``{eos}`` are the tokenizer's own. A missing bos is left out."""


def resolve_template(
    section: PresetTemplate | ChatTemplate | CustomTemplate | SpecialTokensTemplate,
    tokenizer: Any,
    where: str = "template",
) -> Template:
    """Build the template that a recipe selects.

    Args:
        section: the recipe's ``template`` section.
        tokenizer: a transformers tokenizer with the chat template, bos and eos.
        where: beginning of error messages.

    Raises:
        ConfigError: the preset is unknown, the tokenizer lacks a chat template or end-of-text token that the section
            needs, or the chat template cannot be used.
    """
    if isinstance(section, CustomTemplate):
        return Template(section.prefix, section.suffix, section.instruction_format)
    if isinstance(section, SpecialTokensTemplate):
        end = section.end or tokenizer.eos_token
        if not end:
            raise ConfigError(f"{where}: the tokenizer has no end-of-text token; name the token that ends texts in end")
        suffix = section.suffix + "".join(special_token_names(section.tokens))
        return Template(section.prefix, suffix, section.instruction_format, section.tokens, end)
    if isinstance(section, PresetTemplate):
        if section.name not in PRESETS:
            raise ConfigError(f"{where}: unknown preset '{section.name}'{did_you_mean(section.name, PRESETS)}")
        prefix, suffix = PRESETS[section.name]
        if section.name == "mistral" and not puts_space_first(tokenizer.backend_tokenizer):
            # Mistral's tekken tokenizers put no space between [INST] and the text; a space would become a token.
            prefix, suffix = prefix.rstrip(), suffix.lstrip()
        if "{eos}" in suffix and not tokenizer.eos_token:
            raise ConfigError(f"{where}: the tokenizer has no end-of-text token; use a template of kind custom")
        prefix = prefix.replace("{bos}", tokenizer.bos_token or "")
        return Template(prefix, suffix.replace("{eos}", tokenizer.eos_token or ""), section.instruction_format)
    if not tokenizer.chat_template:
        raise ConfigError(f"{where}: the tokenizer has no chat template; use a template of kind preset or custom")
    frame = chat_frame(tokenizer)
    if frame is None:
        raise ConfigError(
            f"{where}: the chat template leaves out or changes the user's text; use a preset or custom one"
        )
    suffix = frame[1].rstrip()
    _warn_of_other_ends(tokenizer, suffix, where)
    return Template(frame[0], suffix, section.instruction_format)


def _warn_of_other_ends(tokenizer: Any, suffix: str, where: str) -> None:
    """Warn if the chat template ends a user's turn in something other than an end token, such as ``[/INST]``."""
    ids = template_ids(tokenizer.backend_tokenizer, suffix)
    last = tokenizer.backend_tokenizer.id_to_token(ids[-1]) if ids else None
    if last is not None and not ends_a_turn(tokenizer, last):
        log.warning(
            "%s: the chat template ends a user's turn in %r, which is neither the end-of-text token (%s) nor the end "
            "of an answer; it becomes the anchor token. A preset or custom template can end in %s",
            where,
            last,
            tokenizer.eos_token,
            tokenizer.eos_token,
        )


def puts_space_first(backend: Tokenizer) -> bool:
    """Return True if a tokenizer puts a space before every text, as SentencePiece tokenizers do."""
    alone = backend.encode("a", add_special_tokens=False).tokens
    return bool(alone) and alone[0].startswith(_SPACE)


def template_ids(backend: Tokenizer, text: str) -> list[int]:
    """Return the ids of template text, with special tokens recognised by name."""
    if not text:
        return []
    before = backend.encode_special_tokens
    backend.encode_special_tokens = False
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = before
