"""Check that a checkpoint belongs to a run.

The data must be the same, and so must the recipe, except for keys that cannot change the result. The number of ranks
may differ: a step is the same batch on any number of ranks that divides ``pack_multiple``. ``optim.total_steps`` may
differ if ``optim.decay_steps`` states the learning rate's horizon, so that a finished run can be extended.
"""

from pathlib import Path
from typing import Any

from anchor.config.load import validate
from anchor.config.train_recipe import TrainRecipe
from anchor.engine.checkpoint import read_state
from anchor.errors import TrainingError

_MAY_DIFFER = (
    "output_dir",  # a run may be moved
    "data.shards",  # and so may its shards: their hash is compared
    "engine.log_every_steps",
    "engine.checkpoint_every_steps",
    "engine.keep_checkpoints",
    "engine.keep_every_steps",
    "engine.timeout_seconds",
    "evaluation",
    "telemetry",
)
"""Keys and sections of the recipe that do not change what is trained."""


def check_same_run(checkpoint: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint that another run wrote.

    Args:
        checkpoint: a complete checkpoint.
        state: the present run's resolved ``recipe``, ``zero_stage`` and ``data_index_sha256``.

    Raises:
        TrainingError: the recipe (the message lists the differing keys), the ZeRO stage or the shards differ.
        ConfigError: the stored recipe has a key that this version does not know.
    """
    stored = read_state(checkpoint)
    further = {"optim.total_steps"} if _goes_further(_flat(state["recipe"]), stored["step"]) else set()
    changes = what_differs(stored["recipe"], state["recipe"], checkpoint / "state.json")
    differing = [text for key, text in changes.items() if key not in further]
    if differing:
        raise TrainingError(f"{checkpoint}: written by another recipe: {'; '.join(differing)}; choose a new output_dir")
    if stored["zero_stage"] != state["zero_stage"]:
        raise TrainingError(
            f"{checkpoint}: written under ZeRO-{stored['zero_stage']}, {state['recipe']['engine']['deepspeed']} says "
            f"ZeRO-{state['zero_stage']}; go on under ZeRO-{stored['zero_stage']}"
        )
    if stored["data_index_sha256"] != state["data_index_sha256"]:
        raise TrainingError(f"{checkpoint}: the shards have changed since; choose a new output_dir")


def what_differs(stored: dict[str, Any], present: dict[str, Any], where: Path) -> dict[str, str]:
    """Return the keys that differ between two resolved recipes and can change training, with both values in words.

    Raises:
        ConfigError: the stored recipe, from the file ``where``, has a key that this version does not know.
    """
    # Validate first: a setting that did not exist then had the value that is its default now.
    before, now = _flat(validate(stored, TrainRecipe, str(where)).model_dump(mode="json")), _flat(present)
    return {
        key: f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not _may_differ(key)
    }


def _may_differ(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in _MAY_DIFFER)


def _goes_further(now: dict[str, Any], step: int) -> bool:
    """Return whether the number of steps may differ: the schedule ignores it, and the checkpoint is not beyond it."""
    return now["optim.decay_steps"] is not None and now["optim.total_steps"] >= step


def _flat(node: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {name: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}
