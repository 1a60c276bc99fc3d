"""Prefix and suffix of a model's chat template, rendered around a user's turn.

A chat template is a program by the model's authors. It may leave out, repeat or alter the text, fail, or never end. No
template that does so is used.
"""

import threading
from typing import Any

from jinja2 import TemplateError

from anchor.errors import ConfigError, first_line

_PROBES = (
    "\u241fText <b>&amp; \"1\" 'Two'\n- Three.\u241f",
    "\u241f" + "another, longer Text: \u00c9t\u00e9 \u6f22\u5b57 " * 200 + "\u241f",
)
"""Texts that reveal how a template alters the user's text: changed case, escapes, cuts, joined lines."""
_SECONDS = 10.0
# A faulty template raises jinja's errors or those of the expressions in it.
_FAILURES = (
    *(TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError),
    *(MemoryError, ImportError),
)


def chat_frame(tokenizer: Any, **variables: Any) -> tuple[str, str] | None:
    """Return the text that a tokenizer's chat template puts before and after a user's text.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        variables: template variables, such as ``add_generation_prompt``.

    Returns:
        Prefix and suffix, with special tokens by name. None if the template leaves out or changes the user's text.

    Raises:
        ConfigError: the template fails, does not end, repeats the text, or frames two texts differently.
    """
    frames = []
    for probe in _PROBES:
        rendered = _rendered(tokenizer, [{"role": "user", "content": probe}], variables)
        if rendered.count(probe) > 1:
            raise ConfigError(
                f"{tokenizer.name_or_path}: the chat template repeats the user's text; use a preset or custom template"
            )
        before, found, behind = rendered.partition(probe)
        if not found:
            return None
        frames.append((before, behind))
    if frames[0] != frames[1]:
        raise ConfigError(
            f"{tokenizer.name_or_path}: the chat template puts other words around one text than around another, such "
            "as an altered copy of it; use a preset or custom template"
        )
    return frames[0]


def ends_a_turn(tokenizer: Any, token: str) -> bool:
    """Return True if a token is the end-of-text token, or ends an assistant's turn in the chat template.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        token: name of the token.
    """
    if token == tokenizer.eos_token:
        return True
    answer = "An answer."
    turns = [("user", "A question."), ("assistant", answer), ("user", "Another question.")]
    try:
        rendered = _rendered(tokenizer, [{"role": role, "content": text} for role, text in turns], {})
    except ConfigError:  # the template supports only one turn
        return False
    return rendered.partition(answer)[2].lstrip().startswith(token)


def _rendered(tokenizer: Any, turns: list[dict[str, str]], variables: dict[str, Any]) -> str:
    outcome: list[Any] = []

    def render() -> None:
        try:
            outcome.append(tokenizer.apply_chat_template(turns, tokenize=False, **variables))
        except _FAILURES as error:
            outcome.append(error)

    # A loop inside jinja cannot be interrupted, so render in a thread. A daemon does not keep the program alive.
    thread = threading.Thread(target=render, daemon=True, name="chat template")
    thread.start()
    thread.join(_SECONDS)
    if thread.is_alive():
        problem = f"it has not ended after {_SECONDS:.0f} s"
    elif not outcome:
        raise RuntimeError("rendering a chat template failed, see above")
    elif isinstance(outcome[0], Exception):
        problem = first_line(outcome[0])
    else:
        return str(outcome[0])
    raise ConfigError(
        f"{tokenizer.name_or_path}: the chat template fails: {problem}; mend it, or use a preset or custom template"
    )
