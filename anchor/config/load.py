"""Load a YAML recipe into its validated schema, strictly and without torch.

1. Parse YAML with two fixes: refuse duplicate keys, and read ``2e-5`` as a number.
2. Apply ``section.key=value`` overrides from the command line.
3. Validate against the pydantic schema. Report one error, on one line; an unknown key comes with a "did you mean".
"""

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from anchor.errors import ConfigError, did_you_mean, shortened

Schema = TypeVar("Schema", bound=BaseModel)

_MAX_CHARACTERS = 1 << 18
"""Longest YAML text. PyYAML takes seconds to parse this much, and minutes for a megabyte of commas."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate and non-text keys and reads ``2e-5`` as a float."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                problem = f"a key must be text, got {shortened(key)}; put it in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' is given twice, in lines {seen[key]} and {line}; keep one"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML strictly.

    Raises:
        ConfigError: the text is too long, nested too deep or malformed, or it has an impossible date, a duplicate key
            or a key that is not text. The message is one line that begins with ``where``.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(f"{where}: has {len(text):,} characters, expected at most {_MAX_CHARACTERS:,}; is it YAML?")
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader subclass
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{where}{line}: {' '.join(str(problem).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: is nested too deep; is it YAML?") from error
    except ValueError as error:  # looks like a date or a number to YAML, but is invalid
        raise ConfigError(f"{where}: {error}; put text in quotes") from error


def load_recipe(path: str | Path, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """Read a recipe file, apply overrides and validate it.

    Args:
        path: YAML file.
        schema: the pydantic model of the whole recipe.
        overrides: ``section.key=value``. The value is parsed as YAML, and a missing section is created.

    Raises:
        ConfigError: missing file, malformed YAML or override, unknown or duplicate key, wrong type, missing value.
    """
    file = Path(path)
    if not str(path) or not file.is_file():
        raise ConfigError(f"{path}: no such recipe file; give the path of a .yaml file")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, got {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return validate(raw, schema, str(path))


def validate(raw: dict[str, Any], schema: type[Schema], where: str) -> Schema:
    """Validate a parsed mapping, and report one problem as a one-line :class:`ConfigError`."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_one_line(error, schema)}") from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"override '{override}': expected section.key=value")
    *sections, key = name.strip().split(".")
    node: Any = raw
    for index, section in enumerate(sections):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override '{override}': '{'.'.join(sections[: index + 1])}' is not a section")
    node[key] = parse_yaml(value, f"override '{override}'")


def _one_line(error: ValidationError, schema: type[BaseModel]) -> str:
    problems = error.errors()
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    problem = (unknown or problems)[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    # pydantic's location includes the tag of a tagged union, which is not a key of the file.
    path, model = _walk(schema, problem["loc"])
    name = ".".join(path)
    kind = problem["type"]
    if kind == "extra_forbidden":
        known = model.model_fields if model is not None else {}
        return f"unknown key {name}{did_you_mean(path[-1], known)}"
    if kind == "missing":
        return f"missing value {name}; the recipe must state it{more}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return f"{name}: {_plain(problem['msg'])}{more}"
    if kind == "value_error":
        return f"{name + ': ' if name else ''}{_plain(problem['msg'])}{more}"
    return f"{name}: got {shortened(problem['input'])}, {_plain(problem['msg'])}{more}"


def _plain(message: str) -> str:
    text = message.removeprefix("Value error, ").strip()
    return text[0].lower() + text[1:] if text else text


def _walk(schema: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel] | None]:
    """Return the key path of a pydantic location, without union tags, and the model that holds its last key."""
    path: list[str] = []
    holder: type[BaseModel] | None = schema
    candidates: list[type[BaseModel]] = [schema]
    for element in loc:
        if isinstance(element, int):
            path.append(str(element))
            continue
        if len(candidates) > 1:  # inside a tagged union, this element is the tag
            chosen = [m for m in candidates if element in _tags(m)]
            if chosen:
                candidates = chosen
                continue
        holder = candidates[0] if candidates else None
        path.append(element)
        field = holder.model_fields.get(element) if holder is not None else None
        candidates = _models_in(field.annotation) if field is not None else []
    return path, holder


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return getattr(field.annotation, "__args__", ()) if field is not None else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in getattr(annotation, "__args__", ()) for model in _models_in(arg)]
