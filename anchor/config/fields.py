"""Building blocks of recipe sections: a frozen model that forbids unknown keys, and constrained field types."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base class of recipe sections. The string below a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _a_truth_value_is_no_number(cls, values: Any) -> Any:
        # YAML reads yes and on as true, and pydantic would coerce true to 1.
        for name, value in values.items() if isinstance(values, Mapping) else ():
            field = cls.model_fields.get(name) if isinstance(value, bool) else None
            if field is not None and bool not in (field.annotation, *get_args(field.annotation)):
                raise ValueError(f"{name} is a truth value, as yes, no, on and off are; give a number, or quote a word")
        return values


def _with_variables(path: str) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise ValueError(f"{path}: the variable {name} is unset or empty; set it, or write the path out")
        return os.environ[name]

    return _VARIABLE.sub(value, path)


def _named(path: object) -> object:
    if path == "" or "\0" in str(path):
        raise ValueError("a path must not be empty or hold a NUL character")
    return path


def _expanded(path: Path) -> Path:
    expanded = Path(_with_variables(str(path)))
    try:
        return expanded.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: no such user's home") from error


def _expanded_text(path: str) -> str:
    return str(_expanded(Path(path))) if path.startswith("~") else _with_variables(path)


_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
UserPath = Annotated[Path, BeforeValidator(_named), AfterValidator(_expanded)]
"""A path. A leading ``~`` expands to the user's home, ``$NAME`` and ``${NAME}`` to environment variables."""
ModelPathText = Annotated[str, AfterValidator(_with_variables)]
"""A folder, file or hub name. Variables expand as in ``UserPath``; ``~`` expands when the model is read."""
DatasetPathText = Annotated[str, AfterValidator(_expanded_text)]
"""A folder or hub name. ``~`` and variables expand as in ``UserPath``."""

MAX_COUNT = (1 << 31) - 1
"""Upper limit for counts of steps, tokens or seconds. No run reaches it, and larger values overflow mid-run."""
PositiveInt = Annotated[int, Field(gt=0, le=MAX_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FileStem = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""A name that is safe to use in a file name."""
Weight = Annotated[float, Field(gt=0.0, le=1e3)]
