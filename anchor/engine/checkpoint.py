"""Checkpoints: DeepSpeed's sharded state and what a run is, written beside and renamed, ``latest`` moved last.

``checkpoints/step-00000100/`` holds ``engine/`` (every rank's share) and ``state.json`` (step, ranks, recipe, data
index hash). A folder without ``state.json`` was interrupted and is never picked up. A step number is all that the
batch order and dropout need, so no generator state is stored.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from anchor import dist
from anchor.config.load import validate
from anchor.config.schema import TrainRecipe
from anchor.engine.deepspeed import Engine
from anchor.errors import TrainingError

log = logging.getLogger(__name__)

_TAG = "engine"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after so many steps."""
    return f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.json"))


def save_checkpoint(engine: Engine, folder: Path, state: dict[str, Any], *, keep: int, exclude_frozen: bool) -> Path:
    """Write the checkpoint after ``state["step"]`` steps; every rank calls it.

    Args:
        engine: whose parameters and optimiser state are written.
        folder: the run's ``checkpoints``.
        state: ``step`` and what identifies the run, see :func:`check_same_run`.
        keep: how many of the newest checkpoints stay.
        exclude_frozen: leave out parameters that are not trained.

    Returns:
        The checkpoint's folder.
    """
    final = folder / checkpoint_name(state["step"])
    beside = folder / f".writing-{final.name}"
    if dist.is_first_rank():
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    engine.save(beside, _TAG, exclude_frozen=exclude_frozen)
    dist.barrier()
    if dist.is_first_rank():
        (beside / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        for old in complete_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    log.info("checkpoint %s", final)
    return final


def load_checkpoint(engine: Engine, checkpoint: Path, *, exclude_frozen: bool) -> int:
    """Load a checkpoint that :func:`check_same_run` let pass; every rank calls it.

    Returns:
        The number of steps taken.
    """
    engine.load(checkpoint, _TAG, exclude_frozen=exclude_frozen)
    return _state(checkpoint)["step"]


def check_same_run(checkpoint: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint that was not written by this run.

    Args:
        checkpoint: a complete checkpoint.
        state: the present run's resolved ``recipe``, ``data_index_sha256`` and ``num_ranks``.

    Raises:
        TrainingError: another recipe (the differing keys are listed), other shards or another number of ranks.
        ConfigError: the stored recipe has a key that this version does not know.
    """
    stored = _state(checkpoint)
    # Through the schema: a knob that did not exist then had what is its default now.
    recipe = validate(stored["recipe"], TrainRecipe, str(checkpoint / "state.json")).model_dump(mode="json")
    before, now = _flat(recipe), _flat(state["recipe"])
    differing = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise TrainingError(f"{checkpoint}: written by another recipe: {'; '.join(differing)}; choose a new output_dir")
    if stored["data_index_sha256"] != state["data_index_sha256"]:
        raise TrainingError(f"{checkpoint}: the shards have changed since; choose a new output_dir")
    if stored["num_ranks"] != state["num_ranks"]:
        raise TrainingError(
            f"{checkpoint}: written by {stored['num_ranks']} ranks, this run has {state['num_ranks']}; "
            "resume on the same number"
        )


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def _flat(node: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {name: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}
