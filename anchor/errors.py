"""User errors, as opposed to bugs.

User errors derive from :class:`AnchorError`. The message is one line that says where, what, got, expected and what to
do. Entry points wrap their work in :func:`exit_on_user_error`, which prints the message and exits with code 2. Bugs
raise built-in exceptions and keep their traceback.
"""

import difflib
import errno
import os
import pickle
import re
import select
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

EXIT_USER_ERROR = 2
_EXIT_PIPE = 141
"""Exit code that a shell reports for a program killed by SIGPIPE."""

_HALF_MESSAGE = 1000
"""Characters kept from each end of a long message."""

_DISK_ADVICE = {
    errno.EACCES: "check who may write there, or choose another place",
    errno.EPERM: "check who may write there, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOTDIR: "a part of this path is a file; choose another place",
    errno.EEXIST: "something of this name is in the way; move it, or choose another place",
    errno.EISDIR: "a folder is where a file should be; move it, or choose another place",
    errno.ELOOP: "its symbolic links lead in a circle; choose another place",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EFBIG: "raise the limit of file sizes (`ulimit -f`) or choose another disk, and start again",
    errno.EIO: "check the disk, and start again on one that works",
    errno.ESTALE: "the network file system has lost it; start again when it is back",
    errno.ENOSPC: "free some disk and start again",
    errno.EDQUOT: "free some of your quota and start again",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`) and start again",
    errno.ENFILE: "too many files are open on this machine; start again when there are fewer",
}
"""Advice per errno for a file that cannot be read or written. Other operating system errors count as bugs."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


class AnchorError(Exception):
    """Root of all errors that a user can fix."""


class ConfigError(AnchorError):
    """A recipe, a ds_configs file or a command line is wrong."""


class DataError(AnchorError):
    """Input data is unusable: malformed row, missing field, empty text, no pair left."""


class ShardError(AnchorError):
    """Packed shards are unfinished, altered or do not fit the run."""


class ModelError(AnchorError):
    """A model folder is missing, incomplete or of an unsupported kind."""


class TrainingError(AnchorError):
    """Training must stop: non-finite loss, or a checkpoint from another run."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or else list the known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are {', '.join(names)}" if names else ""


def shortened(value: object) -> str:
    """Return a value's ``repr`` for a message, with the middle cut out if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]} … {text[-80:]}"


def first_line(error: Exception) -> str:
    """Return the first line of a library error's message, or its class name if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def disk_refusal(error: Exception) -> str | None:
    """Return one line that explains a file error of the operating system; None for any other error.

    Some libraries hide the operating system's error. ``shutil.copytree`` lists messages, safetensors and torch raise
    their own classes, and numpy reports how much it wrote.
    """
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        _, where, why = error.args[0][0]
        number = next((one for one in _DISK_ADVICE if os.strerror(one) in str(why)), None)
    elif isinstance(error, OSError) and error.errno is not None:
        where, number = error.filename, error.errno
    elif isinstance(error, OSError) and _SHORT_WRITE.search(str(error)):
        where, number = None, errno.ENOSPC
    else:
        where, number = None, next((one for one in _FULL if os.strerror(one) in str(error)), None)
    if number not in _DISK_ADVICE:
        return None
    where = "a file being written" if where is None else where
    return f"{where}: {os.strerror(number)}; {_DISK_ADVICE[number]}"


UNSAFE_PICKLE = (pickle.UnpicklingError, EOFError)
"""Errors of ``torch.load`` for a damaged pickle, and for a pickle that would run code."""


def weights_line(error: Exception) -> str:
    """Return one line that says why weights cannot be loaded. torch's text would explain how to load unsafe pickles."""
    if isinstance(error, UNSAFE_PICKLE):
        return "its weights are a pickle (.bin) that is damaged or asks for more than tensors; save them as safetensors"
    return first_line(error)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print an :class:`AnchorError` or a file error as one line on stderr, and exit with code 2.

    If the reader of stdout has gone (``| head``), exit silently: that is not an error of the program.
    """
    try:
        yield
        sys.stdout.flush()
    except AnchorError as error:
        _exit(str(error))
    except BrokenPipeError:
        if not _is_abandoned(sys.stdout):
            raise
        # The interpreter flushes stdout again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_EXIT_PIPE)
    except Exception as error:
        refusal = disk_refusal(error)
        if refusal is None:
            raise
        _exit(refusal)


def _is_abandoned(stream: TextIO) -> bool:
    """Return True if a stream is a pipe whose reader has closed it."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _exit(message: str) -> NoReturn:
    sys.stderr.write(f"error: {_printable(message)}\n")
    sys.exit(EXIT_USER_ERROR)


def _printable(message: str) -> str:
    """Return a message as one line of bounded length, with line ends and control characters escaped."""
    if len(message) > 2 * _HALF_MESSAGE:
        message = f"{message[:_HALF_MESSAGE]} … {message[-_HALF_MESSAGE:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
