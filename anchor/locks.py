"""File locks that the system releases when their process ends, even by a crash."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from anchor.errors import DataError

log = logging.getLogger(__name__)

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


def take(lock: IO[str], file: Path) -> bool:
    """Lock an open file; return True if this process now holds the lock and the path still names this file.

    On a file system without locks, warn and return True. The user must then keep other processes from writing there.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: the file system has no locks; let no other process write here", file)
        return True
    try:
        # The previous holder may have renamed or removed the file in the meantime.
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:
        return False


def wait_for(lock: IO[str], file: Path, waiting: str) -> None:
    """Lock an open file. If another process holds the lock, log ``waiting`` and wait for it."""
    if take(lock, file):
        return
    log.info("%s: %s", file, waiting)
    fcntl.flock(lock, fcntl.LOCK_EX)


@contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Hold the lock of a path for the length of the context, then remove the file.

    Raises:
        DataError: another process holds the lock; ``busy`` is the message.
    """
    with file.open("a") as lock:
        if not take(lock, file):
            raise DataError(busy)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
