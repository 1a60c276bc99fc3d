"""DeepSpeed's compiled operators, loaded so that a killed process leaves nothing behind that harms the next one.

While it loads or compiles an operator, torch holds a file ``lock`` in the operator's folder. A process that is killed
meanwhile leaves it there, and every later process waits for it without end. So our processes load one after another
under a lock that the kernel frees with its holder (``flock``); a ``lock`` that is there nonetheless, and that no
compilation on this host touches, was left behind and is removed.

Its all-reduce through shared memory makes a file of 66 MiB per rank in /dev/shm, by address and port, and never removes
it: memory that is lost with every run. Once all ranks have mapped it, the name is not needed any more.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from torch.utils.cpp_extension import get_default_build_root

from anchor.locks import wait_for

log = logging.getLogger(__name__)

_COMPILERS = {"ninja", "c++", "g++", "cc1plus", "nvcc"}
_SETTLED_SECONDS = 5.0


def extensions_folder() -> Path:
    """Where torch compiles to: ``TORCH_EXTENSIONS_DIR``, or its default with Python and CUDA version."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    cuda = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
    python = sys.version_info
    return Path(get_default_build_root()) / f"py{python.major}{python.minor}{sys.abiflags}_{cuda}"


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Load operators meanwhile; processes of this user on this file system wait for one another."""
    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "anchor.flock"
    with file.open("w") as mine:
        wait_for(mine, file, "another process loads or compiles operators; waiting for it")
        for left in folder.glob("*/lock"):
            _remove_if_left_behind(left)
        yield


def _remove_if_left_behind(lock: Path) -> None:
    """Wait while something compiles in the folder; then the lock is nobody's."""
    # Our own clock decides: the file's time may be of another one, which is ahead.
    settled = time.monotonic() + _SETTLED_SECONDS
    with suppress(FileNotFoundError):  # whoever held it has removed it
        while (_is_young(lock) and time.monotonic() < settled) or _compiling(lock.parent):
            time.sleep(0.5)
            lock.stat()
        lock.unlink()
        log.warning("%s: left by a killed process; removed", lock)


def _is_young(lock: Path) -> bool:
    return abs(time.time() - lock.stat().st_mtime) < _SETTLED_SECONDS


def unlink_shared_buffer(rank: int) -> None:
    """Take the name of this rank's all-reduce buffer away; the mappings stay until their processes end."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)  # noqa: S108


def _compiling(folder: Path) -> bool:
    """Whether a compiler works in the folder."""
    for process in psutil.process_iter(["name", "cwd"]):
        if process.info["name"] in _COMPILERS and process.info["cwd"] == str(folder.resolve()):
            return True
    return False
