"""Invariants: a template is data; presets, the model's own chat template and a custom one give prefix and suffix."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace

from anchor.config.pack_recipe import ChatTemplate, CustomTemplate, PresetTemplate, SpecialTokensTemplate
from anchor.data.templates import PRESETS, Template, resolve_template
from anchor.data.tokenizer_files import load_tokenizer
from anchor.errors import ConfigError


def backend(pre_tokenizer: Any = None) -> Tokenizer:
    """Return a tokenizer with one token per word; Metaspace adds a space before each text, as in SentencePiece."""
    tokens = Tokenizer(WordLevel({"<unk>": 0, "▁a": 1, "a": 2}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizer
    return tokens


def tokenizer(**changes: object) -> SimpleNamespace:
    own = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": None, "name_or_path": "m"}
    return SimpleNamespace(**{**own, "backend_tokenizer": backend(Metaspace())} | changes)


@pytest.mark.parametrize(
    ("name", "prefix", "suffix"),
    [
        ("chatml", "<|im_start|>user\n", "<|im_end|>"),
        ("llama3", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        ("mistral", "<s>[INST] ", " [/INST]</s>"),
        ("plain", "<s>", "</s>"),
    ],
)
def test_presets(name: str, prefix: str, suffix: str) -> None:
    assert name in PRESETS
    template = resolve_template(PresetTemplate(kind="preset", name=name), tokenizer())
    assert template == Template(prefix, suffix, "{instruction}: {text}")
    assert template.to_json() == {"prefix": prefix, "suffix": suffix, "instruction_format": "{instruction}: {text}"}


def test_plain_leaves_out_a_missing_beginning_of_text() -> None:
    template = resolve_template(PresetTemplate(kind="preset", name="plain"), tokenizer(bos_token=None))
    assert (template.prefix, template.suffix) == ("", "</s>")


def test_the_mistral_preset_has_no_spaces_for_tokenizers_that_add_none() -> None:
    """Regression: Mistral's tekken tokenizers turned the spaces into tokens."""
    section = PresetTemplate(kind="preset", name="mistral")
    template = resolve_template(section, tokenizer(backend_tokenizer=backend()))
    assert (template.prefix, template.suffix) == ("<s>[INST]", "[/INST]</s>")


def test_the_models_chat_template_is_rendered_around_a_user_turn(tiny_tokenizer_dir: Path) -> None:
    template = resolve_template(ChatTemplate(kind="chat"), load_tokenizer(str(tiny_tokenizer_dir)))
    # The newline behind the turn goes: the last token must be the anchor token.
    assert template == Template("<|im_start|>user\n", "<|im_end|>", "{instruction}: {text}")


def test_a_custom_template_is_taken_as_it_is() -> None:
    section = CustomTemplate(kind="custom", prefix="a ", suffix=" b", instruction_format="I {instruction} T {text}")
    assert resolve_template(section, tokenizer()) == Template("a ", " b", "I {instruction} T {text}")


@pytest.mark.parametrize(("named", "end"), [(None, "</s>"), ("<|im_end|>", "<|im_end|>")])
def test_special_tokens_stand_behind_the_suffix(named: str | None, end: str) -> None:
    section = SpecialTokensTemplate(kind="special_tokens", tokens=3, prefix="<s>", suffix="!", end=named)
    template = resolve_template(section, tokenizer())
    expected = Template("<s>", "!<|anchor_0|><|anchor_1|><|anchor_2|>", "{instruction}: {text}", 3, end)
    assert template == expected
    assert Template(**template.to_json()) == expected
    assert set(template.to_json()) == {"prefix", "suffix", "instruction_format", "special_tokens", "end"}


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [(None, ("body {instruction}", 0)), ("Find {text} it", ("Find {text} it: body {instruction}", 16))],
)
def test_an_instruction_joins_without_reading_braces_in_texts(
    instruction: str | None, expected: tuple[str, int]
) -> None:
    template = Template("", "</s>", "{instruction}: {text}")
    text, start = template.instructed("body {instruction}", instruction)
    assert (text, start) == expected
    assert text[start:] == "body {instruction}"


@pytest.mark.parametrize(
    ("section", "changes", "expected"),
    [
        (PresetTemplate(kind="preset", name="chatmll"), {}, "r: unknown preset 'chatmll'; did you mean 'chatml'?"),
        (
            PresetTemplate(kind="preset", name="plain"),
            {"eos_token": None},
            "r: the tokenizer has no end-of-text token; use a template of kind custom",
        ),
        (
            SpecialTokensTemplate(kind="special_tokens", tokens=2),
            {"eos_token": None},
            "r: the tokenizer has no end-of-text token; name the token that ends texts in end",
        ),
        (
            ChatTemplate(kind="chat"),
            {},
            "r: the tokenizer has no chat template; use a template of kind preset or custom",
        ),
        (
            ChatTemplate(kind="chat"),
            {"chat_template": "x", "apply_chat_template": lambda *_, **__: "always the same"},
            "r: the chat template leaves out or changes the user's text; use a preset or custom one",
        ),
    ],
)
def test_unusable_templates_are_refused(
    section: PresetTemplate | ChatTemplate, changes: dict[str, object], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_template(section, tokenizer(**changes), "r")
    assert str(caught.value) == expected


def test_a_chat_template_that_fails_is_one_line() -> None:
    def fails(*_: object, **__: object) -> str:
        raise TemplateError("only system turns\nare allowed")

    broken = tokenizer(chat_template="x", apply_chat_template=fails)
    with pytest.raises(ConfigError) as caught:
        resolve_template(ChatTemplate(kind="chat"), broken, "r")
    assert str(caught.value) == (
        "m: the chat template fails: only system turns; mend it, or use a preset or custom template"
    )
