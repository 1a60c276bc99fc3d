"""Invariants: every shipped ds_configs file is read; what belongs into the recipe, and "auto", is refused there; so is
bfloat16 where ZeRO cannot check its gradients."""

import json
from pathlib import Path

import pytest

from anchor.config.load import load_recipe
from anchor.config.train_recipe import TrainRecipe
from anchor.engine.deepspeed import complete_ds_config, read_ds_config
from anchor.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_hold_zero_and_communication_only(path):
    assert read_ds_config(path)["zero_optimization"]["stage"] in (2, 3)
    assert len(SHIPPED) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {}, "bf16": {"enabled": True}}, "'bf16' comes from engine.dtype; remove it here"),
        ({"train_batch_size": 8}, "'train_batch_size' comes from batch.pairs of the pack recipe; remove it here"),
        (
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            "'zero_optimization.reduce_bucket_size' is \"auto\", which nothing fills in here; give a value",
        ),
        ({}, "no 'zero_optimization' section"),
    ],
)
def test_what_does_not_belong_there_is_refused(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        read_ds_config(path)
    assert str(error.value) == f"{path}: {message}"


def test_malformed_and_missing_files_are_named(tmp_path):
    path = tmp_path / "ds.json"
    with pytest.raises(ConfigError, match="no such DeepSpeed configuration; see ds_configs/"):
        read_ds_config(path)
    path.write_text('{"zero_optimization": {},\n}')
    with pytest.raises(ConfigError, match=r"ds.json:2: malformed JSON"):
        read_ds_config(path)


@pytest.mark.parametrize("stage", [0, 1])
def test_bf16_needs_a_stage_that_checks_its_gradients(stage):
    recipe = load_recipe(ROOT / "launch/recipes/smollm2-135m/stage1.yaml", TrainRecipe, ["engine.dtype=bf16"])
    with pytest.raises(ConfigError) as error:
        complete_ds_config({"zero_optimization": {"stage": stage}}, recipe, 1)
    assert str(error.value) == (
        f"ds_configs/zero3.json: zero_optimization.stage is {stage}, at which DeepSpeed cannot both sum gradients of "
        "bf16 parameters in float32 and check them before the update; use stage 2 or 3, or engine.dtype: fp32"
    )
    assert complete_ds_config({"zero_optimization": {"stage": stage + 2}}, recipe, 1)["bf16"] == {"enabled": True}
    exact = load_recipe(ROOT / "launch/recipes/smollm2-135m/stage1.yaml", TrainRecipe, ["engine.dtype=fp32"])
    assert complete_ds_config({"zero_optimization": {"stage": stage}}, exact, 1)["bf16"] == {"enabled": False}
