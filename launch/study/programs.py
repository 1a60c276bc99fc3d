"""The project's own command lines, as a reader would type them, run one after the other with a log each."""

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
    """``anchor.train`` on one process or, by DeepSpeed's launcher, on several of this machine."""
    start = ["python", "-m"] if ranks == 1 else ["deepspeed", "--num_accelerators", str(ranks), "--module"]
    return [*start, "anchor.train", str(recipe), *overrides]


def shown(command: Sequence[str]) -> str:
    """The command as one line for a shell."""
    return shlex.join(command)


def run(command: Sequence[str], log_file: Path, lock: int) -> None:
    """Run a command from the project's root; what it prints goes to the end of ``log_file``.

    Args:
        command, log_file: what and where.
        lock: from :func:`locked`. The command holds it as well: should this process be killed, the next one waits until
            the command has ended.

    Raises:
        TrainingError: it failed or was stopped; the message holds its last line.
    """
    log.info("%s", shown(command))
    log_file.parent.mkdir(parents=True, exist_ok=True)
    # The interpreter at hand, which need not be the first `python` of PATH.
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
    """Nobody else does what is done inside, on this file system; waits for whoever does.

    Yields:
        The lock's descriptor, for :func:`run`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        wait_for(file, folder / ".lock", "another study, or what it started, is at it; waiting")
        yield file.fileno()
