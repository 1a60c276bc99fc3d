"""Logging for entry points: one line per event, with the rank in brackets. Importing configures nothing."""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOBase
from pathlib import Path
from types import TracebackType
from typing import cast


class _RankFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = os.environ.get("RANK", "0")
        return True


class _Stderr(logging.StreamHandler):
    """Handler that looks up ``sys.stderr`` for each line, because a progress bar may have replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _formatter() -> logging.Formatter:
    return logging.Formatter("%(asctime)s %(levelname)s [%(rank)s] %(name)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


def setup(level: int = logging.INFO) -> None:
    """Send log lines to stderr; ranks other than 0 log only WARNING and above.

    Only entry points call this. Third-party loggers stay at WARNING.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of other libraries would fill a log file
    # DeepSpeed uses collective names that torch has deprecated; users cannot change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    handler = _Stderr()
    handler.addFilter(_RankFilter())
    handler.setFormatter(_formatter())
    handler.setLevel(level if os.environ.get("RANK", "0") == "0" else max(level, logging.WARNING))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("anchor", "data_prep", "eval", "launch"):
        logging.getLogger(name).setLevel(level)


class _RankFile(logging.FileHandler):
    """Log file of a rank. If it cannot be written (full disk), warn once and let the run continue."""

    _refused = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        if not self._refused:
            self._refused = True
            sys.stderr.write(f"warning: {self.baseFilename}: cannot be written ({sys.exception()})\n")


def _file_handler(path: Path) -> logging.FileHandler:
    handler = _RankFile(path, encoding="utf-8")
    handler.addFilter(_RankFilter())
    handler.setFormatter(_formatter())
    return handler


def rank_file(folder: Path) -> Path:
    """Return the path of this rank's log file in ``folder``, and create the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"rank-{int(os.environ.get('RANK', '0')):05d}.log"


@contextmanager
def kept_in(path: Path) -> Iterator[TextIOBase]:
    """Also append this rank's log lines to a file, within the context; yield the file's stream."""
    handler = _file_handler(path)
    logging.getLogger().addHandler(handler)
    try:
        yield cast(TextIOBase, handler.stream)
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def crash_reporter(path: Path | None) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """Return a ``sys.excepthook`` that logs the traceback with rank and host, on the console and in the rank's log.

    The hook then exits with code 1 and skips exit handlers. Those of a process group whose peers have died can hang
    forever.
    """

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            os.write(2, b"interrupted\n")
            os._exit(130)
        # torch's init_process_group wraps this hook and replaces standard error by a buffer that it prints afterwards.
        # This hook exits the process, so the buffer would never be printed.
        sys.stderr = sys.__stderr__ or sys.stderr
        try:
            if path is not None:
                with suppress(OSError):
                    logging.getLogger().addHandler(_file_handler(path))
            rank, others = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1") != "1"
            hint = "; if a collective failed, another rank was first: its log says why" if others else ""
            logging.getLogger("anchor").critical(
                "rank %s on %s failed%s", rank, socket.gethostname(), hint, exc_info=(kind, error, trace)
            )
            logging.shutdown()
        finally:
            os._exit(1)

    return report
