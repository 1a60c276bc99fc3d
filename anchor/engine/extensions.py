"""Load DeepSpeed's compiled operators so that a killed process cannot harm later ones.

While torch loads or compiles an operator, it holds a file ``lock`` in the operator's folder. A process killed at that
point leaves the file behind, and every later process waits for it forever. So our processes load operators one at a
time under ``flock``, which the kernel releases when the holder dies. A ``lock`` that still exists, and whose folder no
compiler on this host works in, is stale and is removed.

DeepSpeed's all-reduce through shared memory creates a file of 66 MiB per rank in /dev/shm, named by address and port,
and never removes it. Every run would leak that memory. Once all ranks have mapped the file, its name is no longer
needed.
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
    """Return torch's build folder: ``TORCH_EXTENSIONS_DIR``, or its default with Python and CUDA version."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    cuda = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
    python = sys.version_info
    return Path(get_default_build_root()) / f"py{python.major}{python.minor}{sys.abiflags}_{cuda}"


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold a lock while loading operators; processes of this user on this file system take turns."""
    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "anchor.flock"
    with file.open("w") as mine:
        wait_for(mine, file, "another process loads or compiles operators; waiting for it")
        for left in folder.glob("*/lock"):
            _remove_if_left_behind(left)
        yield


def _remove_if_left_behind(lock: Path) -> None:
    """Wait while something compiles in the folder, then remove the stale lock."""
    # Our own clock decides: the file's time may come from another clock that is ahead.
    settled = time.monotonic() + _SETTLED_SECONDS
    with suppress(FileNotFoundError):  # its holder has removed it
        while (_is_young(lock) and time.monotonic() < settled) or _compiling(lock.parent):
            time.sleep(0.5)
            lock.stat()
        lock.unlink()
        log.warning("%s: left by a killed process; removed", lock)


def _is_young(lock: Path) -> bool:
    return abs(time.time() - lock.stat().st_mtime) < _SETTLED_SECONDS


def unlink_shared_buffer(rank: int) -> None:
    """Remove the name of this rank's all-reduce buffer; the mappings stay until their processes end."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)  # noqa: S108


def _compiling(folder: Path) -> bool:
    """Return whether a compiler is running in the folder."""
    for process in psutil.process_iter(["name", "cwd"]):
        if process.info["name"] in _COMPILERS and process.info["cwd"] == str(folder.resolve()):
            return True
    return False
