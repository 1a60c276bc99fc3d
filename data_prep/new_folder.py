"""Folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anchor.errors import DataError


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` to write into, renamed to it at the end and removed after an error.

    Raises:
        DataError: ``output`` exists, or what a killed run left beside it.
    """
    beside = output.with_name(output.name + ".unfinished")
    for path in (output, beside):
        if path.exists():
            raise DataError(f"{path}: already exists and is not written over; delete it or choose another --output")
    beside.mkdir(parents=True)
    try:
        yield beside
        os.replace(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # there only after an error
