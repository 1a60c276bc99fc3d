"""Progress of long work: a bar on a terminal, one plain line now and then in a log file."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

Item = TypeVar("Item")

LOG_EVERY_SECONDS = 30.0


def tracked(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    """The items, with their count shown on stderr while they pass.

    Args:
        items: what is worked on.
        description: what is being done.
        total: number of items, or None when it is not known beforehand.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _logged(items, description, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield from bar.track(items, total=total, description=description)


def _logged(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    last = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last >= LOG_EVERY_SECONDS:
            last = time.monotonic()
            log.info("%s: %d%s", description, number, f" of {total}" if total is not None else "")
