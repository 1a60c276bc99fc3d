"""The folder of a run: one writer at a time, resumed from its newest intact checkpoint, visible to every host.

Rank 0 holds a lock in the folder while it trains. The lock ends with the process, however the process ends. A second
training run is refused, whatever its recipe: checkpoints of one and metrics of the other would not belong together.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from anchor import dist
from anchor.config.train_recipe import TrainRecipe
from anchor.engine.checkpoint import checkpoint_step, complete_checkpoints, newest_intact, remove_unfinished
from anchor.engine.resume import check_same_run, what_differs
from anchor.errors import ConfigError, DataError, TrainingError, first_line
from anchor.json_files import read_object
from anchor.locks import locked

log = logging.getLogger(__name__)

_LOCK = ".lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Create the folder and keep other training runs out of it; every rank calls it, rank 0 holds the lock.

    Raises:
        TrainingError: another training run holds the lock.
    """
    with ExitStack() as held:
        refusal = None
        if dist.is_first_rank():
            folder.mkdir(parents=True, exist_ok=True)
            lock = folder / _LOCK
            try:
                held.enter_context(locked(lock, str(lock)))
                lock.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            except DataError:
                owner = lock.read_text(encoding="utf-8", errors="replace") if lock.is_file() else ""
                refusal = (
                    f"{folder}: another training is writing it{owner and f' ({owner[:100]})'}; wait for it or choose "
                    f"another output_dir; if that process is gone with its host, delete {lock}"
                )
        refusal = dist.broadcast_object(refusal)
        if refusal is not None:
            raise TrainingError(refusal)
        yield


def find_checkpoint(folder: Path, ranks: dist.Ranks, state: dict[str, Any], *, resume: bool) -> Path | None:
    """Return the newest intact checkpoint of this run, or None; every rank calls it.

    Raises:
        TrainingError: all checkpoints are damaged, they belong to another run, or ``resume`` is False and there are
            some.
    """
    checkpoints = folder / "checkpoints"
    existing = dist.broadcast_object(complete_checkpoints(checkpoints))
    if existing and not resume:
        raise TrainingError(f"{folder}: holds a run ({existing[-1].name}); choose another output_dir, or let it resume")
    found = newest_intact(checkpoints, ranks.rank, ranks.world_size)
    if found is not None:
        check_same_run(found, state)
    return found


def is_finished(folder: Path, found: Path | None, recipe: TrainRecipe, about: dict[str, Any]) -> bool:
    """Return whether this training is finished and exported.

    That needs an export of the same recipe and data, and a checkpoint of the last step. A run without steps needs no
    checkpoint.
    """
    exported = folder / "export/anchor.json"
    finished = False
    steps = 0 if found is None else checkpoint_step(found)
    if dist.is_first_rank() and steps == recipe.optim.total_steps and exported.is_file():
        try:
            before = read_object(exported)
            if not isinstance(before.get("recipe"), dict):
                raise ValueError("it holds no recipe")
            finished = before.get("data_index_sha256") == about["data_index_sha256"]
            finished = finished and not what_differs(before["recipe"], about["recipe"], exported)
        except (ConfigError, ValueError) as error:
            finished = False
            log.error("%s is damaged (%s): exporting again", exported, first_line(error))
    return dist.broadcast_object(finished)


def prepare_folder(folder: Path, about: dict[str, Any]) -> None:
    """Create the folder, remove what an interrupted writer left, and write ``run.yaml``; rank 0 calls it."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder / "checkpoints")
    (folder / "run.yaml").write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")


def check_shared(folder: Path) -> None:
    """Check that every rank sees the folder that rank 0 made.

    Raises:
        TrainingError: ``output_dir`` is not on storage that all hosts share.
    """
    missing = [rank for rank, seen in enumerate(dist.gather_objects((folder / "run.yaml").is_file())) if not seen]
    if missing:
        some = ", ".join(map(str, missing[:8]))
        raise TrainingError(f"{folder}: ranks {some} do not see it; output_dir must be on storage that all hosts share")
