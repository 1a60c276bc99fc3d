"""Invariants: a finished run whose recipe states the learning rate's horizon goes on to more steps, with the bits of a
run that took them all at once, and exports again; fewer steps than were taken, or an unstated horizon, are refused."""

import json
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file
from test_train import losses, train_ranks, write_recipe

from anchor.config.load import load_recipe
from anchor.config.train_recipe import TrainRecipe
from anchor.engine.checkpoint import complete_checkpoints
from anchor.engine.resume import check_same_run
from anchor.errors import TrainingError

HORIZON = {"optim__decay_steps": 4, "engine__checkpoint_every_steps": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_dir, make_shards):
    """A run of two steps extended by two more, and a run of four at once."""
    shards = make_shards(pairs=8, pack_multiple=2, num_rows=32)
    halves, whole = tmp_path_factory.mktemp("halves"), tmp_path_factory.mktemp("whole")
    for folder, steps in ((halves, 2), (halves, 4), (whole, 4)):
        recipe = write_recipe(folder, tiny_model_dir, shards, optim__total_steps=steps, **HORIZON)
        run_distributed(train_ranks, 1, recipe, True)
        if steps == 2:
            (folder / "run/export/mteb").mkdir()
            (folder / "run/export/mteb/scores.json").write_text("{}")
    return halves / "run", whole / "run"


@pytest.mark.slow
def test_going_further_equals_having_gone_all_the_way(runs):
    halves, whole = runs
    assert losses(halves) == losses(whole)
    assert len(losses(whole)) == 4
    ours, theirs = (load_file(run / "export/model.safetensors") for run in runs)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_scores_of_the_earlier_export_are_kept_beside_the_new_one(runs):
    halves, _ = runs
    assert (halves / "mteb-step-00000002/scores.json").read_text() == "{}"
    assert not (halves / "export/mteb").exists()


@pytest.mark.slow
def test_an_untrained_export_is_made_once_and_no_scores_are_lost(tmp_path, tiny_model_dir, make_shards):
    """Regression: every start exported again, and from the third start on the scores were deleted."""
    shards = make_shards(pairs=8, pack_multiple=2, num_rows=32)
    held_out = {"shards": str(shards), "every_steps": 1, "max_batches": 1}
    untrained = {"optim__total_steps": 0, "optim__warmup_steps": 0, "evaluation": held_out}

    def start(**changes) -> Path:
        recipe = write_recipe(tmp_path, tiny_model_dir, shards, **untrained, **changes)
        run_distributed(train_ranks, 1, recipe, True)
        return tmp_path / "run/export"

    export = start()
    (export / "mteb").mkdir()
    (export / "mteb/scores.json").write_text("first")
    weights = (export / "model.safetensors").stat().st_mtime_ns
    start()
    assert (export / "model.safetensors").stat().st_mtime_ns == weights
    assert (export / "mteb/scores.json").read_text() == "first"
    for scores in ("first", "second"):
        (export / "anchor.json").write_text((export / "anchor.json").read_text().replace('"lr": 0.003', '"lr": 1.0'))
        (export / "mteb").mkdir(exist_ok=True)
        (export / "mteb/scores.json").write_text(scores)
        start()
        assert not (export / "mteb").exists()
    kept = sorted(path.name for path in export.parent.glob("mteb-step-*"))
    assert kept == ["mteb-step-00000000", "mteb-step-00000000-2"]
    assert [(export.parent / name / "scores.json").read_text() for name in kept] == ["first", "second"]
    rows = [json.loads(line) for line in (export.parent / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0]


def stopped_within_a_step(ranks, recipe_path: Path) -> tuple[bool, int]:
    """Ask for a stop in the second step's forward; return whether the run finished, and the number of forwards."""
    from anchor.engine.deepspeed import Engine
    from anchor.engine.loop import train
    from anchor.engine.plan import make_plan
    from anchor.engine.stop import StopRequest

    recipe, stop, forwards = load_recipe(recipe_path, TrainRecipe), StopRequest(), []
    forward = Engine.forward

    def asked(self, *args):
        forwards.append(args)
        stop.requested = len(forwards) > num_packs
        return forward(self, *args)

    plan = make_plan(recipe, str(recipe_path), ranks.world_size)
    num_packs = len(plan.reader.read(0).packs)
    Engine.forward = asked
    try:
        return train(plan, ranks, stop), len(forwards) // num_packs
    finally:
        Engine.forward = forward


def test_a_signal_within_a_step_ends_the_run_after_that_step(tmp_path, tiny_model_dir, make_shards):
    """Regression: the run checked for a stop only before each step, so the signal cost another step."""
    shards = make_shards(pairs=8, pack_multiple=2, num_rows=32)
    recipe = write_recipe(tmp_path, tiny_model_dir, shards, optim__total_steps=4, **HORIZON)
    assert run_distributed(stopped_within_a_step, 1, recipe) == [(False, 2)]
    assert [path.name for path in complete_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000002"]


def state_of(run: Path, **optim) -> dict:
    recipe = load_recipe(run.parent / "recipe.yaml", TrainRecipe).model_dump(mode="json")
    (checkpoint,) = complete_checkpoints(run / "checkpoints")
    from anchor.engine.checkpoint import read_state

    stored = read_state(checkpoint)
    return {
        "recipe": recipe | {"optim": recipe["optim"] | optim},
        "zero_stage": stored["zero_stage"],
        "data_index_sha256": stored["data_index_sha256"],
    }


@pytest.mark.slow
def test_fewer_steps_than_were_taken_are_refused(runs):
    _, whole = runs
    (checkpoint,) = complete_checkpoints(whole / "checkpoints")
    check_same_run(checkpoint, state_of(whole))
    with pytest.raises(TrainingError, match=r"optim\.total_steps was 4, is 3; choose a new output_dir"):
        check_same_run(checkpoint, state_of(whole, total_steps=3))


@pytest.mark.slow
def test_a_horizon_that_moves_is_refused(runs):
    _, whole = runs
    (checkpoint,) = complete_checkpoints(whole / "checkpoints")
    check_same_run(checkpoint, state_of(whole, total_steps=4))
    with pytest.raises(TrainingError, match=r"optim\.decay_steps was 4, is None; optim\.total_steps was 4, is 5"):
        check_same_run(checkpoint, state_of(whole, total_steps=5, decay_steps=None))
    with pytest.raises(TrainingError, match=r"written by another recipe: optim\.decay_steps was 4, is 9; choose"):
        check_same_run(checkpoint, state_of(whole, total_steps=5, decay_steps=9))
