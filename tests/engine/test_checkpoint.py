"""Invariants: a damaged file of any kind is found and the checkpoint before it is used; the newest N and every Mth
stay; the recipe may differ in what does not change the result, and in nothing else."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from distributed import run_distributed
from test_train import train_ranks, write_recipe

from anchor.engine.checkpoint import complete_checkpoints, newest_intact, remove_unfinished, superseded
from anchor.engine.resume import check_same_run
from anchor.errors import TrainingError


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_dir, make_shards):
    """A run of 7 steps on two ranks with a checkpoint after each; it keeps the newest two and every third."""
    shards = make_shards(pairs=16, pack_multiple=2, pack_tokens=1024, num_rows=32)
    changes = {"optim__total_steps": 7, "engine__checkpoint_every_steps": 1, "engine__keep_every_steps": 3}
    recipe = write_recipe(tmp_path_factory.mktemp("trained"), tiny_model_dir, shards, **changes)
    run_distributed(train_ranks, 2, recipe, False)
    return recipe.parent / "run/checkpoints"


@pytest.fixture
def checkpoints(tmp_path, trained):
    return Path(shutil.copytree(trained, tmp_path / "checkpoints"))


def test_the_newest_and_every_mth_are_kept(trained):
    assert [path.name for path in complete_checkpoints(trained)] == [
        *("step-00000003", "step-00000006", "step-00000007"),
    ]
    assert (trained / "latest").read_text() == "step-00000007\n"
    assert sorted(path.name for path in trained.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("steps", "step", "keep", "keep_every", "gone"),
    [
        ([1, 2, 3], 3, 2, None, [1]),
        ([2, 3, 4, 5], 5, 2, 3, [2]),
        ([100, 150, 200], 150, 1, None, [100]),  # that of step 200 is damaged
        ([100, 150, 200], 150, 2, None, []),
    ],
)
def test_a_damaged_checkpoint_of_a_later_step_takes_no_place(steps, step, keep, keep_every, gone):
    found = [Path(f"step-{number:08d}") for number in steps]
    assert superseded(found, step, keep, keep_every) == [Path(f"step-{number:08d}") for number in gone]


FILES = tuple(
    f"engine/zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for rank in (0, 1) for kind in ("model", "optim")
)


def test_a_checkpoint_lists_every_file_of_every_rank(trained):
    listed = json.loads((trained / "step-00000007/state.json").read_text())["files"]
    assert set(listed) >= set(FILES)
    there = {str(p.relative_to(trained / "step-00000007")) for p in (trained / "step-00000007").rglob("*.pt")}
    assert there <= set(listed)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "altered", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(checkpoints, name, damage, caplog):
    file = checkpoints / "step-00000007" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        middle = len(content) // 2
        altered = content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :]
        file.write_bytes({"truncated": content[:middle], "emptied": b"", "altered": altered}[damage])
    with caplog.at_level(logging.ERROR):
        assert newest_intact(checkpoints, 0, 1) == checkpoints / "step-00000006"
    assert f"step-00000007 is damaged ({name}" in caplog.text


@pytest.mark.parametrize(("damage", "named"), [("truncated", True), ("emptied", True), ("missing", False)])
def test_without_its_state_a_checkpoint_is_not_used(checkpoints, damage, named, caplog):
    """A folder without state.json was never finished. One with an unreadable state.json was finished, and is named."""
    file = checkpoints / "step-00000007/state.json"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 200 if damage == "truncated" else 0])
    with caplog.at_level(logging.ERROR):
        assert newest_intact(checkpoints, 0, 1) == checkpoints / "step-00000006"
    assert ("step-00000007 is damaged (state.json cannot be read)" in caplog.text) == named


def test_with_nothing_intact_the_run_does_not_start_anew(checkpoints):
    for file in checkpoints.rglob("*optim_states.pt"):
        file.write_bytes(b"")
    with pytest.raises(TrainingError, match=r"all 3 checkpoints are damaged; restore one, or delete the folder"):
        newest_intact(checkpoints, 0, 1)


def test_what_an_interrupted_writer_left_is_never_picked_up_and_is_cleaned(checkpoints):
    (checkpoints / "step-00000007").rename(checkpoints / ".writing-step-00000007")
    (checkpoints / "step-00000006").rename(checkpoints / ".deleting-step-00000006")
    assert newest_intact(checkpoints, 0, 1) == checkpoints / "step-00000003"
    remove_unfinished(checkpoints)
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000003", "latest"}


def changed(checkpoint: Path, **changes) -> dict:
    state = json.loads((checkpoint / "state.json").read_text())
    for name, value in changes.items():
        node = state
        *path, key = name.split("__")
        for part in path:
            node = node[part]
        node[key] = value
    return state


def test_what_does_not_change_the_result_may_differ(checkpoints):
    checkpoint = checkpoints / "step-00000007"
    check_same_run(
        checkpoint,
        changed(
            checkpoint,
            recipe__output_dir="elsewhere",
            recipe__engine__checkpoint_every_steps=50,
            recipe__telemetry__loggers=["tensorboard"],
            recipe__evaluation={"shards": "held-out", "every_steps": 5, "max_batches": 8},
        ),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe__optim__lr": 1.0}, "written by another recipe: optim.lr was 0.003, is 1.0; choose a new output_dir"),
        ({"data_index_sha256": "other"}, "the shards have changed since; choose a new output_dir"),
        ({"zero_stage": 2}, "written under ZeRO-3, .* says ZeRO-2; go on under ZeRO-3"),
    ],
)
def test_what_changes_the_result_is_refused(checkpoints, change, message):
    checkpoint = checkpoints / "step-00000007"
    with pytest.raises(TrainingError, match=message):
        check_same_run(checkpoint, changed(checkpoint, **change))


def test_the_run_folder_records_each_rank(trained):
    assert yaml.safe_load((trained.parent / "run.yaml").read_text())["num_ranks"] == 2
