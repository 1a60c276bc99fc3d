"""Invariants: the shipped scales and arms are valid; a study's cells and commands follow from its recipes; tables and
plots are made of the results alone; results of other settings are refused; user errors are one line. Slow: a tiny study
runs from raw pairs to tables by the project's own commands, is killed, goes on, and runs nothing twice."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import english_pairs, write_jsonl

from anchor.config.load import load_recipe
from anchor.config.schema import E5Source, PackRecipe, TrainRecipe
from anchor.errors import ConfigError, DataError
from launch.study import prepare as study_prepare
from launch.study import run as study_run
from launch.study import tuning
from launch.study.__main__ import main
from launch.study.plan import Cell, StudyPlan
from launch.study.prepare import StudyData, pack_recipe, prepare, split_pairs
from launch.study.programs import locked
from launch.study.recipe import StudyRecipe, load_arms
from launch.study.run import commands, missing, result_file
from launch.study.tables import curves_of, difference_table, final_table, read_results

ROOT = Path(__file__).parents[2]
SCALES = sorted((ROOT / "launch/recipes/study").glob("[cg]pu.yaml"))
TINY = {
    "retrieval_source": "squad_dev",
    "seeds": [0],
    "ranks": 1,
    "stage1_steps": 2,
    "stage2_steps": 3,
    "curve_steps": [1],
    "warmup_fraction": 0.1,
    "heldout_pairs": 8,
    "pack": ["text.max_tokens=96", "batch.pairs=8", "batch.pack_tokens=1024"],
    "train": [f"engine.deepspeed={ROOT / 'ds_configs/zero3.json'}"],
    "evaluation": {
        **{"tasks": [], "retrieval_queries": 12, "retrieval_documents": 16, "decoded_pairs": 7, "dtype": "fp32"},
    },
}


@pytest.fixture
def scale(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A scale of the shipped arms and recipes over seven tiny sources, in a folder of its own."""
    recipes = Path(shutil.copytree(ROOT / "launch/recipes/study", tmp_path / "recipes"))
    (source,) = load_recipe(recipes / "pack.yaml", PackRecipe).sources
    assert isinstance(source, E5Source)
    assert source.only is not None
    for number, name in enumerate([*source.only, "squad_dev"]):
        rows = [row | {"negative": row["negative"][0]} for row in english_pairs(40, seed=number)]
        for row in rows:
            row["query"] = f"{name} {row['query']}"
        write_jsonl(tmp_path / "pairs" / f"{name}.jsonl", rows)
    where = {"pairs": tmp_path / "pairs", "mteb": tmp_path / "none", "base": tiny_model_dir}
    where |= {"work_dir": tmp_path / "work", "results_dir": tmp_path / "results", "arms": recipes / "arms.yaml"}
    path = recipes / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {key: str(value) for key, value in where.items()}))
    return path


def plan_of(scale: Path, **matched: int) -> StudyPlan:
    study = load_recipe(scale, StudyRecipe)
    return StudyPlan(study, load_arms(study), StudyData(study.work_dir / "data"), matched)


@pytest.mark.parametrize("path", SCALES, ids=lambda path: path.stem)
def test_the_shipped_scales_name_arms_and_recipes_that_exist(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = plan_of(path, stage2_long=60, stage2_full_long=50)
    assert len(SCALES) == 2
    assert {"untrained", "stage1", "stage2", "stage1_stage2", "language_model_stage2"} <= set(plan.arms.arms)
    assert pack_recipe(plan.study).text.hard_negatives == 1
    for name in plan.arms.arms:
        for cell in plan.cells(name, 0):
            recipe = load_recipe(plan.recipe_file(name), TrainRecipe, plan.overrides(cell))
            assert recipe.optim.total_steps == cell.step
            assert (ROOT / recipe.engine.deepspeed).is_file()
    # Stage II is the same run in every arm but for what it starts from.
    pair = [plan.cells(name, 0)[-1] for name in ("stage2", "stage1_stage2")]
    first, second = (load_recipe(plan.recipe_file(c.arm), TrainRecipe, plan.overrides(c)) for c in pair)
    backbone = second.backbone.model_copy(update={"path": first.backbone.path})
    assert second.model_copy(update={"backbone": backbone, "output_dir": first.output_dir}) == first
    assert first.backbone.path == plan.study.base
    assert second.backbone.path == str(plan.run_folder("stage1", 0) / "export")


def test_the_cpu_scale_begins_with_the_model_of_the_other_recipes_of_its_size() -> None:
    packed = load_recipe(ROOT / "launch/recipes/smollm2-135m/pack.yaml", PackRecipe)
    assert load_recipe(ROOT / "launch/recipes/study/cpu.yaml", StudyRecipe).base == packed.tokenizer


def test_the_horizon_of_a_curve_is_its_last_step(scale: Path) -> None:
    plan = plan_of(scale)
    cells = plan.cells("stage2", 0)
    assert cells == [Cell("stage2", 0, 1, final=False), Cell("stage2", 0, 3, final=True)]
    optims = [load_recipe(plan.recipe_file("stage2"), TrainRecipe, plan.overrides(cell)).optim for cell in cells]
    assert [(o.total_steps, o.decay_steps, o.warmup_steps) for o in optims] == [(1, 3, 1), (3, 3, 1)]
    assert [cell.step for cell in plan.cells("untrained", 0)] == [0]
    assert plan.seeds("untrained") == (0,)


def test_stage_2_has_an_order_of_its_own_that_all_its_arms_share(scale: Path) -> None:
    plan = plan_of(scale, stage2_long=5, stage2_full_long=4)

    def seed_of(name: str, seed: int) -> int:
        cell = plan.cells(name, seed)[-1]
        return load_recipe(plan.recipe_file(name), TrainRecipe, plan.overrides(cell)).seed

    first, second = ([seed_of(name, seed) for seed in range(4)] for name in ("stage1", "stage1_stage2"))
    assert len({*first, *second}) == 8
    for name in ("stage2", "stage2_long", "stage2_full_long", "language_model_stage2"):
        assert [seed_of(name, seed) for seed in range(4)] == second
    assert [seed_of("language_model", seed) for seed in range(4)] == first


def test_arms_of_equal_compute_await_their_flops(scale: Path) -> None:
    assert plan_of(scale).cells("stage2_long", 0) == []
    assert [cell.step for cell in plan_of(scale, stage2_long=5).cells("stage2_long", 0)] == [1, 5]


def test_the_commands_of_a_row_are_whole(scale: Path) -> None:
    plan = plan_of(scale)
    stage1, stage2, score = commands(plan, plan.cells("stage1_stage2", 0)[-1])
    assert [shlex.split(line)[2] for line in (stage1, stage2, score)] == ["anchor.train", "anchor.train", "eval"]
    assert f"output_dir={plan.run_folder('stage1', 0)}" in shlex.split(stage1)
    assert f"backbone.path={plan.run_folder('stage1', 0) / 'export'}" in shlex.split(stage2)
    assert str(plan.run_folder("stage1_stage2", 0) / "export") in shlex.split(score)


def test_the_commands_of_a_row_train_every_arm_of_a_chain(scale: Path) -> None:
    with (scale.parent / "arms.yaml").open("a") as file:
        file.write("  third: {label: third, after: stage1_stage2, recipe: stage2, steps: stage2}\n")
    plan = plan_of(scale)
    lines = commands(plan, plan.cells("third", 0)[-1])
    trained = [word for line in lines for word in shlex.split(line) if word.startswith("output_dir=")]
    names = ("stage1", "stage1_stage2", "third")
    assert trained == [f"output_dir={plan.run_folder(name, 0)}" for name in names]
    assert len(lines) == len(names) + 1  # and the last one is scored


def write_result(plan: StudyPlan, cell: Cell, score: float, **changes: Any) -> Path:
    cost = {"steps": cell.step, "pairs": 8, "tokens": 1000, "training_seconds": 60.0, "petaflops": 2.0}
    arm = plan.arm(cell.arm)
    result = {
        **{"arm": cell.arm, "label": arm.label, "after": arm.after, "seed": cell.seed, "step": cell.step},
        **{"final": cell.final, "curve": arm.has_curve, "scores": {"A": score, "B": score / 2}},
        **{
            "data_index_sha256": "a",
            "own": cost,
            "with_before": cost,
            "decoded": None,
            "settings_sha256": plan.settings_sha256(cell),
        },
    }
    file = result_file(plan, cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result | changes))
    return file


@pytest.fixture
def scored(scale: Path) -> StudyPlan:
    """Results of three arms: two seeds of two arms, one of the third."""
    plan = plan_of(scale)
    write_result(plan, plan.cells("untrained", 0)[0], 0.1)
    write_result(plan, plan.cells("stage1", 0)[0], 0.2)
    for seed in (0, 1):
        for name, gain in (("stage2", 0.0), ("stage1_stage2", 0.1 - 0.3 * seed)):
            for cell in plan.cells(name, seed):
                write_result(plan, cell, 0.3 + 0.1 * cell.step + gain)
    return plan


def test_tables_say_mean_spread_and_paired_differences(scored: StudyPlan) -> None:
    results = read_results(scored.study.results_dir)
    assert len(results) == 10
    final = final_table(results, ["A", "mean"])
    assert "| Stage II only (LoRA) | 2 | 3 | 1,000 | 2.0 | 1.00 ± 0.00 | 60.00 ± 0.00 | 45.00 ± 0.00 |" in final
    # 0.3 + 0.3 + 0.1 and 0.3 + 0.3 - 0.2: mean 55, standard deviation 30 / sqrt(2).
    assert "| 55.00 ± 21.21 |" in final
    assert "| Stage I + II | -5.00 ± 21.21 (1/2) |" in difference_table(results, ["A"], "stage2")


def test_a_curve_begins_with_what_the_arm_starts_from(scored: StudyPlan) -> None:
    curves = {curve.label: curve.points for curve in curves_of(read_results(scored.study.results_dir), "A")}
    assert set(curves) == {"Stage II only (LoRA)", "Stage I + II"}
    assert curves["Stage II only (LoRA)"][0] == pytest.approx([10.0])
    assert curves["Stage I + II"][0] == pytest.approx([20.0])
    assert curves["Stage I + II"][3] == pytest.approx([70.0, 40.0])


def test_tables_and_plots_are_made_of_the_results_alone(scored: StudyPlan, scale: Path, capsys) -> None:
    folder = scored.study.results_dir
    main([str(scale), "--tables"])
    assert capsys.readouterr().out == f"{folder / 'tables.md'}\n"
    assert "Stage I + II" in (folder / "tables.md").read_text()
    first = (folder / "curves.svg").read_bytes()
    assert b"Stage I + II" in first
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    main([str(scale), "--tables"])
    assert (folder / "curves.svg").read_bytes() == first
    assert not scored.study.work_dir.exists()


def test_the_list_counts_what_is_missing(scored: StudyPlan, scale: Path, capsys) -> None:
    result_file(scored, scored.cells("stage1_stage2", 0)[-1]).unlink()
    main([str(scale), "--list", "--only", "stage2,stage1_stage2,stage2_long", "--seeds", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| stage2 | 0 | 2/2 | none |",
        "| stage1_stage2 | 0 | 1/2 | 3 |",
        "| stage2_long | 0 | 0/0 | after packing |",
    ]


def test_a_result_of_other_settings_is_refused(scored: StudyPlan, scale: Path, capsys) -> None:
    file = write_result(scored, scored.cells("stage2", 0)[0], 0.5, settings_sha256="other")
    with pytest.raises(SystemExit) as exit_:
        main([str(scale), "--list"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {file}: made with other settings than the recipes now say; delete it, or choose another results_dir"
    )


def test_one_table_does_not_hold_two_last_steps_of_a_seed(scored: StudyPlan, scale: Path, capsys) -> None:
    scale.write_text(scale.read_text().replace("stage2_steps: 3", "stage2_steps: 4"))
    longer = plan_of(scale)
    old, new = (result_file(plan, plan.cells("stage2", 0)[-1]) for plan in (scored, longer))
    with pytest.raises(ConfigError) as caught:  # before anything is trained
        missing(longer, "stage2", 0)
    end = "delete it, or choose another results_dir"
    assert str(caught.value).endswith(f"-step1.json: made with other settings than the recipes now say; {end}")
    for cell in longer.cells("stage2", 0):
        write_result(longer, cell, 0.5)
    with pytest.raises(ConfigError) as caught:
        missing(longer, "stage2", 0)
    assert str(caught.value) == f"{old}: the last step of a study of other settings; {end}"
    with pytest.raises(SystemExit) as exit_:
        main([str(scale), "--tables"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {old.parent}: {old.name} and {new.name} are both the last of their arm and seed; "
        "delete one, or choose another results_dir"
    )


def test_one_table_does_not_hold_results_of_different_shards(scored: StudyPlan, scale: Path, capsys) -> None:
    file = write_result(scored, scored.cells("stage1", 0)[0], 0.2, data_index_sha256="b")
    with pytest.raises(SystemExit) as exit_:
        main([str(scale), "--tables"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {file.parent}: untrained-seed0-step0.json and {file.name} are of different shards "
        "(data_index_sha256); delete one, or choose another results_dir"
    )


def test_settings_do_not_depend_on_where_things_lie_but_on_what_is_done(scale: Path) -> None:
    cell = plan_of(scale).cells("stage1_stage2", 0)[-1]
    before = plan_of(scale).settings_sha256(cell)
    raw = yaml.safe_load(scale.read_text())
    scale.write_text(yaml.safe_dump(raw | {"work_dir": "elsewhere", "pairs": "there", "ranks": 2}))
    assert plan_of(scale).settings_sha256(cell) == before
    arms = scale.parent / "arms.yaml"
    shipped = "label: Stage I only, recipe: stage1,"
    assert shipped in arms.read_text()
    arms.write_text(arms.read_text().replace(shipped, shipped + " overrides: [optim.lr=1e-5],"))
    assert plan_of(scale).settings_sha256(cell) != before  # Stage I is part of I + II
    alone = plan_of(scale).cells("stage2", 0)[-1]
    assert plan_of(scale).settings_sha256(alone) != before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "stage3"], "--only: no arm is called 'stage3'; did you mean 'stage2'?"),
        (["--seeds", "a"], "--seeds: got 'a', expected numbers separated by commas, such as 0,1,2"),
        (["--tables"], "{results}: holds no result; run the study first"),
        (["curve_steps=[3,1]"], "{scale}: curve_steps (3, 1) must ascend"),
    ],
)
def test_a_wrong_call_is_one_line(argv: list[str], message: str, scale: Path, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(scale), *(argv if "--tables" in argv else [*argv, "--list"])])
    assert exit_.value.code == 2
    expected = message.format(results=scale.parents[1] / "results", scale=scale)
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {expected}"


def test_an_arm_that_names_no_arm_above_it_is_refused(scale: Path) -> None:
    arms = scale.parent / "arms.yaml"
    arms.write_text(arms.read_text().replace("after: stage1,", "after: stage9,"))
    with pytest.raises(Exception, match=r"arms\.stage1_stage2 names 'stage9', which is no arm above it"):
        plan_of(scale)


# Runs without training: commands are recorded and leave what the next step reads.


@pytest.fixture
def events(scale: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a study locks and runs, in order."""
    shards = plan_of(scale).data.shards
    shards.mkdir(parents=True)
    (shards / "index.json").write_text("{}")
    happened: list[str] = []

    def run(command: list[str], log_file: Path, lock: int) -> None:
        given = dict(word.split("=", 1) for word in command if "=" in word)
        if "anchor.train" in command:
            happened.append(f"train {given['output_dir']} to {given['optim.total_steps']}")
            about = dict.fromkeys(("commit", "device", "num_ranks", "versions"))
            recipe = {"optim": {"total_steps": int(given["optim.total_steps"])}}
            export = Path(given["output_dir"]) / "export"
            export.mkdir(parents=True, exist_ok=True)
            (export / "anchor.json").write_text(json.dumps(about | {"recipe": recipe, "data_index_sha256": "a"}))
        else:
            happened.append(f"{command[3]} {command[4]}")
            output = Path(command[command.index("--output") + 1])
            if command[3] == "decode":
                write_jsonl(output, [{"reference": "a", "decoded": "a", "token_f1": 1.0, "rouge_l": 1.0}])
            else:
                output.mkdir(exist_ok=True)
                (output / "scores.json").write_text(json.dumps({"scores": {"A": 0.5}}))

    @contextmanager
    def locked(folder: Path) -> Iterator[int]:
        happened.append(f"lock {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        yield 0
        happened.append(f"unlock {folder}")

    monkeypatch.setattr(study_run, "run", run)
    monkeypatch.setattr(study_run, "locked", locked)
    monkeypatch.setattr(study_run, "flops_per_step", lambda plan, name: 1e12)
    return happened


def test_a_cell_is_trained_and_scored_under_one_lock(scale: Path, events: list[str]) -> None:
    plan = plan_of(scale)
    study_run.run_study(plan, ["stage1_stage2"], [0])
    own, before = plan.run_folder("stage1_stage2", 0), plan.run_folder("stage1", 0)
    start_ = [f"lock {own}", f"lock {before}"]
    first = [*start_, f"train {before} to 2", f"unlock {before}", f"train {own} to 1"]
    second = [*start_, f"unlock {before}", f"train {own} to 3"]
    scored = [f"mteb {own / 'export'}", f"unlock {own}"]
    assert events == [*first, *scored, *second, *scored]


def test_a_run_of_other_settings_is_neither_used_nor_deleted(scale: Path, events: list[str]) -> None:
    plan = plan_of(scale)
    index = plan.data.shards / "index.json"
    study_run.run_study(plan, ["stage1_stage2"], [0])
    shutil.rmtree(plan.study.results_dir)
    del events[:]
    study_run.run_study(plan, ["stage1"], [0])  # the same settings: its export is used
    own, before = plan.run_folder("stage1_stage2", 0), plan.run_folder("stage1", 0)
    assert [event for event in events if "train" in event] == []
    recipe = scale.parent / "stage1.yaml"
    text = recipe.read_text()
    changes = [
        (recipe, text.replace("alpha: 0.2", "alpha: 0.3"), "objective.alpha was 0.2, is 0.3"),
        (index, "[]", "data_index_sha256 was "),
        (scale, scale.read_text().replace("\nbase: ", "\nbase: else"), "base was "),
        (scale, scale.read_text().replace("stage1_steps: 2", "stage1_steps: 4"), "optim.decay_steps was 2, is 4"),
    ]
    for file, changed, differs in changes:
        kept = file.read_text()
        file.write_text(changed)
        assert changed != kept
        shutil.rmtree(plan.study.results_dir, ignore_errors=True)
        for arm, folder in (("stage1", before), ("stage1_stage2", own)):
            with pytest.raises(ConfigError) as caught:
                study_run.run_study(plan_of(scale), [arm], [0])
            assert str(caught.value).startswith(f"{folder}: made with other settings: ")
            assert differs in str(caught.value)
            assert str(caught.value).endswith(f"; delete {folder} or choose another work_dir")
        file.write_text(kept)
    assert (own / "export/anchor.json").is_file()
    (own / "settings.json").unlink()
    with pytest.raises(ConfigError) as caught:
        study_run.run_study(plan, ["stage1_stage2"], [0])
    assert str(caught.value) == (
        f"{own}: made with settings that are not known, it has no settings.json; "
        f"delete {own} or choose another work_dir"
    )


def test_losses_of_learning_rates_are_of_one_setting(
    scale: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(scale)
    trained: list[str] = []

    def train(plan: StudyPlan, cell: Cell, more: list[str]) -> None:
        given = dict(word.split("=", 1) for word in more)
        assert json.loads(given["evaluation"])["shards"] == str(plan.data.heldout_shards)
        trained.append(given["optim.lr"])
        rows = [{"step": step, "held_out/loss_total_nats": 2.0 - step * float(given["optim.lr"])} for step in (0, 3)]
        write_jsonl(Path(given["output_dir"]) / "held_out.jsonl", rows)

    monkeypatch.setattr(tuning, "train", train)
    tuning.tune(plan, "stage2", [1e-4])
    table = tuning.tune(plan, "stage2", [1e-4, 1e-1])
    assert trained == ["0.0001", "0.1"]
    assert table.splitlines()[-1] == "| 0.1 | 2.0000 | 1.7000 |"
    (plan.data.shards / "index.json").write_text("[]")
    with pytest.raises(ConfigError) as caught:
        tuning.tune(plan, "stage2", [1e-2])
    assert str(caught.value) == (
        f"{plan.study.results_dir / 'tuning-stage2.json'}: 0.0001 was run with other settings; delete it, or choose "
        "another results_dir"
    )
    assert len(trained) == 2


def test_a_cell_that_another_process_finished_meanwhile_is_not_run(
    scale: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(scale)

    @contextmanager
    def waited(folder: Path) -> Iterator[int]:
        for cell in plan.cells("stage2", 0):
            write_result(plan, cell, 0.5)
        yield 0

    monkeypatch.setattr(study_run, "locked", waited)
    study_run.run_study(plan, ["stage2"], [0])
    assert events == []
    assert missing(plan, "stage2", 0) == []


def test_what_a_killed_study_started_still_holds_its_lock(tmp_path: Path) -> None:
    child = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(300)"
    parent = (
        "import os, sys; from pathlib import Path; from launch.study.programs import locked, run\n"
        "with locked(Path(sys.argv[1])) as lock:\n"
        f"    run(['python', '-c', {child!r}, sys.argv[1] + '/started'], Path(sys.argv[1]) / 'log', lock)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = tmp_path / "started"
    with subprocess.Popen([sys.executable, "-c", parent, str(tmp_path)], cwd=ROOT, env=environment) as study:
        while not started.exists() and study.poll() is None:
            time.sleep(0.05)
        (orphan,) = Path(f"/proc/{study.pid}/task/{study.pid}/children").read_text().split()
        study.kill()
    try:
        with (tmp_path / ".lock").open("a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(int(orphan), signal.SIGKILL)
    with locked(tmp_path):
        pass


# Data without packing.


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the commands that preparing runs; decontamination only copies."""
    happened: list[str] = []

    def run(command: list[str], log_file: Path, lock: int) -> None:
        happened.append(command[3])
        if command[3] == "decontaminate":
            shutil.copytree(command[4], command[command.index("--output") + 1])

    monkeypatch.setattr(study_prepare, "run", run)
    return happened


def test_data_of_other_settings_is_refused(scale: Path, prepared: list[str]) -> None:
    study = load_recipe(scale, StudyRecipe)
    folder = study.work_dir / "data"
    prepare(study)
    prepare(study)
    assert prepared.count("decontaminate") == 1
    evaluation = study.evaluation.model_copy
    changes: list[tuple[dict[str, Any], str]] = [
        ({"pack": (*study.pack, "text.max_tokens=64")}, "pack.text.max_tokens was 96, is 64"),
        ({"heldout_pairs": 9}, "heldout_pairs was 8, is 9"),
        ({"evaluation": evaluation(update={"retrieval_queries": 11})}, "retrieval_queries was 12, is 11"),
        ({"evaluation": evaluation(update={"retrieval_documents": 15})}, "retrieval_documents was 16, is 15"),
        ({"evaluation": evaluation(update={"decoded_pairs": 6})}, "decoded_pairs was 7, is 6"),
    ]
    for update, differs in changes:
        with pytest.raises(ConfigError) as caught:
            prepare(study.model_copy(update=update))
        assert str(caught.value) == (
            f"{folder}: made with other settings: {differs}; delete {folder} or choose another work_dir"
        )
    write_jsonl(study.pairs / "squad.jsonl", english_pairs(41))
    with pytest.raises(ConfigError, match=r"made with other settings: pairs\.squad was "):
        prepare(study)


def test_no_held_out_text_is_trained_on() -> None:
    def rows(name: str, number: int) -> list[dict[str, Any]]:
        return [
            {"query": f"{name} query {i}", "positive": f"{name} text {i}", "negative": [f"{name} other {i}"]}
            for i in range(number)
        ]

    first, second = rows("first", 10), rows("second", 10)
    first[0]["query"] = "FIRST  query 9"  # held out, written otherwise
    first[1]["positive"] = "first text 8"
    first[2]["negative"] = ["unseen", "first text 9"]
    first[3]["negative"] = "second query 9"  # of another source
    second[4]["query"] = "first text 8"  # the other side
    second[5]["positive"] = "second other 9"  # a distractor of a held-out pair is no held-out text
    parts = split_pairs({"first": first, "second": second}, 2)
    assert parts["first"] == (first[4:8], first[8:])
    assert parts["second"] == ([*second[:4], *second[5:8]], second[8:])
    with pytest.raises(DataError) as caught:
        split_pairs({"first": [first[0], first[0], first[9]], "second": second}, 1)
    assert str(caught.value) == (
        "first: 3 pairs, of which 1 are held out; none of the others is without a text of those; lower heldout_pairs"
    )


def test_a_preparation_killed_anywhere_goes_on(
    scale: Path, prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_recipe(scale, StudyRecipe)
    whole = prepare(study.model_copy(update={"work_dir": study.work_dir / "whole"})).folder / "split"
    expected = {file.relative_to(whole): file.read_bytes() for file in whole.rglob("*.jsonl")}
    assert len(expected) == 2 * 7 + 1
    renamed = os.replace
    killed = 0
    for number in range(1, 10):
        calls: list[Path] = []

        def replace(old: Path, new: Path, number: int = number, calls: list[Path] = calls) -> None:
            calls.append(new)
            if len(calls) == number:
                raise KeyboardInterrupt
            renamed(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                prepare(study)
            except KeyboardInterrupt:
                killed += 1
        folder = prepare(study).folder / "split"
        assert {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.jsonl")} == expected
        shutil.rmtree(study.work_dir / "data")
    assert killed >= 3


def test_flops_follow_the_shards_and_the_recipe(scale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def dry_run(recipe: TrainRecipe, where: str, options: object) -> dict[str, Any]:
        asked.append(where)
        return {"time": {"executed_flops_per_step": float(len(asked))}}

    monkeypatch.setattr("anchor.engine.dry_run.dry_run", dry_run)
    plan = plan_of(scale)
    plan.data.shards.mkdir(parents=True)
    (plan.data.shards / "index.json").write_text("{}")
    assert [study_run.flops_per_step(plan, "stage1") for _ in range(2)] == [1, 1]
    (plan.data.shards / "index.json").write_text("[]")
    assert study_run.flops_per_step(plan, "stage1") == 2
    recipe = scale.parent / "stage1.yaml"
    recipe.write_text(recipe.read_text().replace("alpha: 0.2", "alpha: 1.0"))
    assert [study_run.flops_per_step(plan, "stage1") for _ in range(2)] == [3, 3]


def start(scale: Path, *argv: str) -> subprocess.Popen:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.study", str(scale), *argv]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_a_killed_study_goes_on_and_runs_nothing_twice(scale: Path) -> None:
    plan = plan_of(scale)
    arms = ("--only", "untrained,stage1,stage1_stage2")
    killed = start(scale, *arms)
    deadline = time.monotonic() + 400
    first = result_file(plan, plan.cells("stage1", 0)[0])
    while not first.is_file() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    killed.send_signal(signal.SIGINT)
    _, errors = killed.communicate(timeout=120)
    assert first.is_file(), errors
    assert killed.returncode != 0
    kept = {file: file.stat().st_mtime_ns for file in plan.study.results_dir.glob("*.json")}
    assert missing(plan, "stage1_stage2", 0) != []
    out, errors = (done := start(scale, *arms)).communicate(timeout=400)
    assert done.returncode == 0, errors
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert "| Stage I + II | 1 | 5 |" in out  # two steps of Stage I, three of Stage II
    result = json.loads(result_file(plan, plan.cells("stage1_stage2", 0)[-1]).read_text())
    assert result["own"]["pairs"] == 3 * 8
    assert result["with_before"]["pairs"] == 5 * 8
    assert 0 < result["own"]["petaflops"] < result["with_before"]["petaflops"]
    assert set(result["scores"]) == {"Local-retrieval"}
    decoded = json.loads(first.read_text())["decoded"]
    assert decoded["pairs"] == 7
    assert 0 <= decoded["token_f1"] <= 1
    # By hand: the printed commands make the same cell.
    before = result["scores"]
    shutil.rmtree(plan.study.work_dir / "runs")
    for line in result["commands"]:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        subprocess.run(shlex.split(line), cwd=ROOT, env=environment, check=True, capture_output=True, timeout=200)
    folder = plan.run_folder("stage1_stage2", 0)
    assert json.loads((folder / "scores-step3/scores.json").read_text())["scores"] == before
