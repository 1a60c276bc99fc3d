"""Logging for entry points: one line per event, rank in brackets, nothing configured on import."""

import logging
import os
import sys
import warnings


class _RankFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = os.environ.get("RANK", "0")
        return True


def setup(level: int = logging.INFO) -> None:
    """Send log lines to stderr; ranks other than 0 speak from WARNING up.

    Only entry points call this. Third-party loggers are kept at WARNING.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries would fill a log file
    # DeepSpeed calls collectives by names that torch has renamed; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RankFilter())
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s [%(rank)s] %(name)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    ours = level if os.environ.get("RANK", "0") == "0" else max(level, logging.WARNING)
    for name in ("anchor", "data_prep", "eval"):
        logging.getLogger(name).setLevel(ours)
