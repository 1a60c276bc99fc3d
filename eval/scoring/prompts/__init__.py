"""Instructions per mteb task, from prompt files that ship with the project.

A prompt file has these keys:

* ``tasks``: instruction -> task names, as published;
* ``same_as``: task -> a task in ``tasks`` whose instruction it shares;
* ``ours``: instruction -> task names, not published;
* ``query``: instruction for queries of tasks that the file does not list, or null;
* ``document``: instruction for documents, or null;
* ``instruction_format``: format that joins an instruction and its text; null uses the model folder's template.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor.config.load import parse_yaml
from anchor.errors import ConfigError, did_you_mean

_FOLDER = Path(__file__).parent
_KEYS = {"tasks", "same_as", "ours", "query", "document", "instruction_format"}


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Instructions per task.

    Attributes:
        name: name of the file.
        tasks: task name -> instruction for queries and for symmetric texts.
        query: instruction for queries of other retrieval tasks; None uses the instruction of mteb's task.
        document: instruction for documents, or None.
        instruction_format: format string that ends in ``{text}``; None uses the model folder's format.
    """

    name: str
    tasks: dict[str, str]
    query: str | None
    document: str | None
    instruction_format: str | None


def shipped_names() -> list[str]:
    """Return the names of the prompt files that ship with the project."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_prompts(name: str) -> PromptSet:
    """Load a prompt file by its shipped name or its path.

    Raises:
        ConfigError: missing file, unknown key, value of the wrong type, or duplicate key or task.
    """
    path = Path(name) if name.endswith(".yaml") else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"--prompts: no file '{name}'{did_you_mean(name, [*shipped_names(), 'folder'])}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"{path}: not UTF-8: byte {error.start + 1} is 0x{byte:02x}; save it as UTF-8") from error
    content: Any = parse_yaml(text, str(path))
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict) or set(content) - _KEYS:
        raise ConfigError(f"{path}: expected the keys {', '.join(sorted(_KEYS))}; 'tasks' is required")
    _check(content, path)
    tasks: dict[str, str] = {}
    for task, instruction in _pairs(content, path):
        if task in tasks:
            raise ConfigError(f"{path}: the task {task} is given twice")
        tasks[task] = instruction
    rest = (content.get(key) for key in ("query", "document", "instruction_format"))
    return PromptSet(path.stem, tasks, *rest)


def _check(content: dict[str, Any], path: Path) -> None:
    """Refuse values of the wrong type; the module docstring lists the types."""
    for key in ("tasks", "ours", "same_as"):
        of_key = content.get(key) or {}
        if not isinstance(of_key, dict):
            raise ConfigError(f"{path}: {key}: got {of_key!r}; expected a mapping")
        for name, value in of_key.items():
            expected = "the name of a task" if key == "same_as" else "a list of names of tasks"
            names = [value] if key == "same_as" else value
            if not isinstance(names, list) or not all(isinstance(one, str) for one in [name, *names]):
                raise ConfigError(f"{path}: {key}.{name}: got {value!r}; expected {expected}")
    for key in ("query", "document", "instruction_format"):
        if not isinstance(content.get(key), str | None):
            raise ConfigError(f"{path}: {key}: got {content[key]!r}; expected a text or null")
    joined = content.get("instruction_format")
    if joined is not None and not joined.endswith("{text}"):
        raise ConfigError(f"{path}: instruction_format is {joined!r}; it must end in '{{text}}'")


def _pairs(content: dict[str, Any], path: Path) -> Iterator[tuple[str, str]]:
    published = {task: text for text, names in content["tasks"].items() for task in names}
    yield from ((task, text) for text, names in content["tasks"].items() for task in names)
    for task, other in (content.get("same_as") or {}).items():
        if other not in published:
            raise ConfigError(f"{path}: same_as.{task}: no task '{other}'{did_you_mean(other, published)}")
        yield task, published[other]
    yield from ((task, text) for text, names in (content.get("ours") or {}).items() for task in names)
