"""Instructions per mteb task, as files that ship with the project.

A file holds ``tasks`` (instruction -> names of tasks, as published), ``same_as`` (task -> task of the file whose
instruction it takes), ``ours`` (instruction -> tasks, not published), ``query`` (instruction of queries of tasks that
the file does not know, or null), ``document`` (instruction of documents, or null) and ``instruction_format`` (how an
instruction joins its text; null: as the model folder's template says).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from anchor.errors import ConfigError, did_you_mean, first_line

_FOLDER = Path(__file__).parent
_KEYS = {"tasks", "same_as", "ours", "query", "document", "instruction_format"}


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Instructions per task.

    Attributes:
        name: of the file.
        tasks: task name -> instruction of queries and of symmetric texts.
        query: instruction of queries of other retrieval tasks, or None for that of mteb's own task.
        document: instruction of documents, or None.
        instruction_format: format string that ends in ``{text}``, or None for that of the model folder.
    """

    name: str
    tasks: dict[str, str]
    query: str | None
    document: str | None
    instruction_format: str | None


def shipped_names() -> list[str]:
    """Names of the files that ship."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_prompts(name: str) -> PromptSet:
    """A file by its shipped name or its path.

    Raises:
        ConfigError: no such file, another key, or a task given twice.
    """
    path = Path(name) if name.endswith(".yaml") else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"--prompts: no file '{name}'{did_you_mean(name, [*shipped_names(), 'folder'])}")
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not readable as YAML: {first_line(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict) or set(content) - _KEYS:
        raise ConfigError(f"{path}: expected the keys {', '.join(sorted(_KEYS))}; 'tasks' is required")
    tasks: dict[str, str] = {}
    for task, instruction in _pairs(content, path):
        if task in tasks:
            raise ConfigError(f"{path}: the task {task} is given twice")
        tasks[task] = instruction
    rest = (content.get(key) for key in ("query", "document", "instruction_format"))
    return PromptSet(path.stem, tasks, *rest)


def _pairs(content: dict[str, Any], path: Path) -> Iterator[tuple[str, str]]:
    published = {task: text for text, names in content["tasks"].items() for task in names}
    yield from ((task, text) for text, names in content["tasks"].items() for task in names)
    for task, other in (content.get("same_as") or {}).items():
        if other not in published:
            raise ConfigError(f"{path}: same_as.{task}: no task '{other}'{did_you_mean(other, published)}")
        yield task, published[other]
    yield from ((task, text) for text, names in (content.get("ours") or {}).items() for task in names)
