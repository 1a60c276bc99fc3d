"""Run the project's own command lines one after the other, as a reader would type them, with a log each."""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from anchor.errors import TrainingError
from anchor.locks import wait_for

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
_LAST_LINES = 5


def training(recipe: Path, overrides: Sequence[str], ranks: int) -> list[str]:
    """Return the ``anchor.train`` command for one process, or for several local ones by DeepSpeed's launcher."""
    start = ["python", "-m"] if ranks == 1 else ["deepspeed", "--num_accelerators", str(ranks), "--module"]
    return [*start, "anchor.train", str(recipe), *overrides]


def shown(command: Sequence[str]) -> str:
    """Return the command as one line for a shell."""
    return shlex.join(command)


def run(command: Sequence[str], log_file: Path, lock: int) -> None:
    """Run a command in the current folder and append its output to ``log_file``.

    Args:
        command, log_file: the command and its log.
        lock: descriptor from :func:`locked`. The command inherits it, so if this process is killed, the next one waits
            until the command has ended.

    Raises:
        TrainingError: the command failed or was stopped; the message holds its last line of output.
    """
    log.info("%s", shown(command))
    log_file.parent.mkdir(parents=True, exist_ok=True)
    # Use this interpreter, which need not be the first `python` on PATH.
    words = [sys.executable if command[0] == "python" else command[0], *command[1:]]
    with log_file.open("a", encoding="utf-8") as file:
        file.write(f"$ {shown(command)}\n")
        file.flush()
        done = subprocess.run(
            words, stdout=file, stderr=subprocess.STDOUT, cwd=Path.cwd(), check=False, env=_env(), pass_fds=[lock]
        )
    if done.returncode:
        tail = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        last = next((line for line in reversed(tail) if line.strip()), "it printed nothing")
        raise TrainingError(f"{shown(command[:4])} ...: exit code {done.returncode}: {last}; all of it in {log_file}")


def _env() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock inside the context; wait for any other holder on this file system.

    Yields:
        The lock's descriptor, for :func:`run`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".study.lock"  # the training that writes this folder holds `.lock`
    with path.open("w") as file:
        wait_for(file, path, "another study, or what it started, is at it; waiting")
        yield file.fileno()
