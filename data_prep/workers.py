"""One function over many tasks, in order: in this process, or in others that work a few tasks ahead."""

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
    """What maps ``function`` over tasks: this process when ``number`` is 1, else so many others.

    ``function`` is sent to each process once, with all that it holds; tasks and results are sent one by one.

    Raises:
        DataError: a process was killed.
    """
    if number == 1:
        yield lambda tasks: map(function, tasks)
        return
    # A fresh interpreter each: a fork would copy threads of the tokenizer in whatever state they are.
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
"""What a worker process does."""


def _start(function: Callable[[Any], Any]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _function.append(function)


def _run(task: Any) -> Any:
    return _function[0](task)
