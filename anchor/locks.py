"""Locks that end with their process, however it ends."""

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
    """Lock an open file; whether this process has it now, under its path.

    A file system without locks is warned of: there the user sees to it that no two processes write the same.
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
        # Who had it before may have renamed or removed it in between.
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:
        return False


def wait_for(lock: IO[str], file: Path, waiting: str) -> None:
    """Lock an open file; log ``waiting`` where another process holds it, and wait until that ends."""
    if take(lock, file):
        return
    log.info("%s: %s", file, waiting)
    fcntl.flock(lock, fcntl.LOCK_EX)


@contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Hold the lock of this path; the file is removed at the end.

    Raises:
        DataError: another process holds it: ``busy``.
    """
    with file.open("a") as lock:
        if not take(lock, file):
            raise DataError(busy)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
