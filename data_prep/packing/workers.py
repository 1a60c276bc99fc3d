"""Ordered map of a function over tasks, in this process or in workers that run a few tasks ahead."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

from anchor.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_PER_WORKER = 2


@contextmanager
def open_workers(
    number: int, function: Callable[[Task], Result]
) -> Iterator[Callable[[Iterable[Task]], Iterator[Result]]]:
    """Yield a function that maps ``function`` over tasks, in order.

    It runs in this process if ``number`` is 1, else in that many worker processes. Each worker receives ``function``
    once, with everything it holds. Tasks and results are sent one by one.

    Raises:
        DataError: if a process was killed.
    """
    if number == 1:
        yield lambda tasks: map(function, tasks)
        return
    # Spawn fresh interpreters: a fork would copy the tokenizer's threads in an unknown state.
    pool = ProcessPoolExecutor(number, get_context("spawn"), _start, (function,))

    def work(tasks: Iterable[Task]) -> Iterator[Result]:
        pending: deque[Future[Result]] = deque()
        for task in tasks:
            pending.append(pool.submit(_run, task))
            if len(pending) > number * _TASKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield work
    except BrokenProcessPool as error:
        raise DataError(
            f"--workers {number}: a process was killed, perhaps for want of memory; lower --workers and run again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_function: list[Callable[[Any], Any]] = []
"""Function that this worker process runs."""


def _start(function: Callable[[Any], Any]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the worker processes already run in parallel
    _function.append(function)


def _run(task: Any) -> Any:
    return _function[0](task)
