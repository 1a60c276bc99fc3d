"""Progress of long work, with rate and remaining time: a bar on a terminal, occasional plain lines in a log file."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

Item = TypeVar("Item")

LOG_EVERY_SECONDS = 30.0


def tracked(
    items: Iterable[Item],
    description: str,
    total: int | float | None,
    *,
    unit: str = "",
    amount: Callable[[Item], float] | None = None,
) -> Iterator[Item]:
    """Yield the items and show the progress on stderr.

    Args:
        items: items to process.
        description: name of the work.
        total: sum of the amounts; None if unknown.
        unit: unit of the amounts, with a leading space.
        amount: returns the amount of an item; None counts every item as 1.
    """
    console = Console(stderr=True)
    amount = amount or (lambda _: 1)
    if not console.is_terminal:
        yield from _logged(items, description, total, unit, amount)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, state="")
        done, start = 0.0, time.monotonic()
        for item in items:
            yield item
            more = amount(item)
            done += more
            bar.update(task, advance=more, state=_state(done, total, unit, time.monotonic() - start))


def _logged(
    items: Iterable[Item], description: str, total: int | float | None, unit: str, amount: Callable[[Item], float]
) -> Iterator[Item]:
    start = last = time.monotonic()
    done = 0.0
    for item in items:
        yield item
        done += amount(item)
        now = time.monotonic()
        if now - last >= LOG_EVERY_SECONDS:
            last = now
            left = _remaining(done, total, now - start)
            log.info("%s: %s%s", description, _state(done, total, unit, now - start), left)


def _state(done: float, total: int | float | None, unit: str, seconds: float) -> str:
    of = f" of {total:,.0f}" if total is not None else ""
    rate = done / seconds if seconds > 0.0 else 0.0
    return f"{done:,.0f}{of}{unit}, {rate:,.{0 if rate >= 10 else 1}f}{unit}/s"


def _remaining(done: float, total: int | float | None, seconds: float) -> str:
    if total is None or done <= 0.0:
        return ""
    return f", {timedelta(seconds=round(seconds * max(total - done, 0.0) / done))} left"
