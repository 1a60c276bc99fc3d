"""Invariants: a chat template gives a frame only if it repeats every text once and as it is; whatever else it does is
one line, also if it never ends; an odd end of a user's turn is named."""

import logging
from pathlib import Path
from typing import Any

import pytest

from anchor.config.pack_recipe import ChatTemplate
from anchor.data import chat_templates
from anchor.data.chat_templates import chat_frame, ends_a_turn
from anchor.data.templates import resolve_template
from anchor.data.tokenizer_files import load_tokenizer
from anchor.errors import ConfigError

OPEN = "{% for m in messages %}<|im_start|>"
CLOSE = "<|im_end|>{% endfor %}"
CONTENT = "{{ m['content'] }}"


@pytest.fixture
def tokenizer(tiny_tokenizer_dir: Path) -> Any:
    return load_tokenizer(str(tiny_tokenizer_dir))


def test_a_template_that_only_trims_its_text_gives_a_frame(tokenizer: Any) -> None:
    """Llama 3's and Gemma's templates trim the text."""
    tokenizer.chat_template = OPEN + "{{ m['content'] | trim }}" + CLOSE
    assert chat_frame(tokenizer) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (f"Rewrite: {CONTENT}\nRewritten: {CONTENT}", "repeats the user's text; use"),
        (f"{CONTENT}{{{{ m['content'] | upper }}}}", "puts other words around one text than around another, such"),
        (f"{{{{ m['content'] | length }}}} {CONTENT}", "puts other words around one text than around another, such"),
        ("{{ m['content'] | upper }}", None),
        ("{{ m['content'] | escape }}", None),
        ("{{ m['content'] | tojson }}", None),
        ("{{ m['content'][:100] }}", None),
        ("{{ m['content'].replace('\\n', ' ') }}", None),
        ("nothing of it", None),
    ],
)
def test_a_template_that_repeats_or_alters_the_text_is_refused(tokenizer: Any, body: str, problem: str | None) -> None:
    """Regression: all shards had this project's placeholder literally in their suffix."""
    tokenizer.chat_template = OPEN + body + CLOSE
    with pytest.raises(ConfigError) as caught:
        resolve_template(ChatTemplate(kind="chat"), tokenizer, "r")
    expected = "r: the chat template leaves out or changes the user's text; use a preset or custom one"
    if problem is None:
        assert str(caught.value) == expected
    else:
        assert str(caught.value).startswith(f"{tokenizer.name_or_path}: the chat template {problem}")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ '<|im_start|>' + messages[0]['content'] + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0]['content'].nothing() }}", "'str object' has no attribute 'nothing'"),
        ("{% for x in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ messages", "unexpected end of template"),
        ([{"name": "chatml", "template": "x"}, {"name": "tool_use", "template": "x"}], "This model has multiple chat"),
    ],
)
def test_a_template_that_fails_is_one_line(tokenizer: Any, template: Any, problem: str) -> None:
    tokenizer.chat_template = template if isinstance(template, str) else {t["name"]: t["template"] for t in template}
    with pytest.raises(ConfigError) as caught:
        chat_frame(tokenizer)
    assert str(caught.value).startswith(f"{tokenizer.name_or_path}: the chat template fails: {problem}")
    assert str(caught.value).endswith("; mend it, or use a preset or custom template")
    assert "\n" not in str(caught.value)


def test_a_template_that_does_not_end_is_given_up(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "_SECONDS", 0.2)
    loop = "{% for x in range(20000) %}{% for y in range(500) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loop + OPEN + CONTENT + CLOSE
    with pytest.raises(ConfigError, match="the chat template fails: it has not ended after 0 s; mend it"):
        chat_frame(tokenizer)


MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}<|endoftext|>"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
HARMONY = OPEN + CONTENT + "{{ '<|im_end|>' if loop.last and m['role'] != 'user' else '<|endoftext|>' }}{% endfor %}"


def test_an_anchor_that_ends_neither_texts_nor_turns_is_named(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        resolve_template(ChatTemplate(kind="chat"), tokenizer, "r")
        tokenizer.chat_template = HARMONY  # as in gpt-oss, a turn and a text end in different tokens
        assert resolve_template(ChatTemplate(kind="chat"), tokenizer, "r").suffix == "<|endoftext|>"
        assert caplog.messages == []
        tokenizer.chat_template = MISTRAL  # ends a user's turn as Mistral's `[/INST]` does
        resolve_template(ChatTemplate(kind="chat"), tokenizer, "r")
    (message,) = caplog.messages
    assert message.startswith(
        "r: the chat template ends a user's turn in '<|endoftext|>', which is neither the end-of-text token "
        "(<|im_end|>) nor the end of an answer; it becomes the anchor token."
    )
    tokenizer.chat_template = "{{ raise_exception('one turn only') }}"
    assert not ends_a_turn(tokenizer, "<|endoftext|>")
