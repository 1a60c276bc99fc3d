"""Output folders that appear complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from anchor.errors import DataError
from anchor.locks import take

_LOCK = ".lock"


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder to write into, which is renamed to ``output`` at the end and removed after an error.

    The folder lies beside ``output``, with the suffix ``.unfinished``. The writer locks it until the process ends. A
    later run empties what a killed run left and writes again.

    Raises:
        DataError: if ``output`` exists, or the folder beside it is being written or was not made by this function.
    """
    whole = output.resolve()  # `.` and `..` have no name
    beside = whole.parent / (whole.name + ".unfinished")
    for path, shown in ((whole, output), (beside, beside)):
        if path.exists() and not (path == beside and (beside / _LOCK).is_file()):
            raise DataError(f"{shown}: already exists and is not written over; delete it or choose another --output")
    beside.mkdir(parents=True, exist_ok=True)
    with (beside / _LOCK).open("a") as lock:
        _take(lock, beside)
        try:
            yield beside
            os.replace(beside, whole)
            (whole / _LOCK).unlink()
        finally:
            shutil.rmtree(beside, ignore_errors=True)  # exists only after an error


def _take(lock: IO[str], beside: Path) -> None:
    """Lock the folder and empty it."""
    if not take(lock, beside / _LOCK):
        raise DataError(f"{beside}: another process is writing it; wait for it or choose another --output")
    for path in beside.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
