"""What a user did wrong, as opposed to a bug.

A user's error derives from :class:`AnchorError`; its message is one line that says where, what, got,
expected and what to do. Entry points wrap their work in :func:`exit_on_user_error`, which prints the
message and exits with code 2. Bugs raise built-in exceptions and keep their traceback.
"""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2


class AnchorError(Exception):
    """Root of all errors that a user can mend."""


class ConfigError(AnchorError):
    """A recipe, a ds_configs file or a command line is wrong."""


class DataError(AnchorError):
    """Input data cannot be used: malformed row, missing field, empty text, no pair left."""


class ShardError(AnchorError):
    """Packed shards are unfinished, altered or do not fit the run."""


class ModelError(AnchorError):
    """A model folder is missing, incomplete or of a kind that is not supported."""


class TrainingError(AnchorError):
    """Training must stop: non-finite loss, checkpoint that does not belong to the run."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or the list of known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are {', '.join(names)}" if names else ""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print an :class:`AnchorError` as one line on stderr and exit with code 2."""
    try:
        yield
    except AnchorError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(EXIT_USER_ERROR)
