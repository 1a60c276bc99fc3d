"""What every section of a recipe is made of: frozen models that forbid unknown keys, and types of numbers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of a recipe; field descriptions are the strings below the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FileStem = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""A name that can stand in a file name."""
Weight = Annotated[float, Field(gt=0.0)]
