"""Invariants: the shipped scales and arms are valid; a study's cells and commands follow from its recipes; tables and
plots are made of the results alone; results of other settings are refused; user errors are one line."""

import shlex
from pathlib import Path

import pytest
import yaml
from studies import plan_of, write_result

from anchor.config.load import load_recipe
from anchor.config.pack_recipe import PackRecipe
from anchor.config.train_recipe import TrainRecipe
from anchor.errors import ConfigError
from bench.study.__main__ import main
from bench.study.plan import Cell, StudyPlan
from bench.study.prepare import pack_recipe
from bench.study.recipe import StudyRecipe
from bench.study.run import commands, missing, result_file
from bench.study.tables import curves_of, difference_table, final_table, read_results, write_tables

ROOT = Path(__file__).parents[2]
SCALES = sorted((ROOT / "launch/recipes/study").glob("[cg]pu*.yaml"))


@pytest.mark.parametrize("path", SCALES, ids=lambda path: path.stem)
def test_the_shipped_scales_name_arms_and_recipes_that_exist(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = plan_of(path, stage2_long=60, stage2_full_long=50)
    assert len(SCALES) == 3
    assert {"untrained", "stage1", "stage2", "stage1_stage2", "language_model_stage2"} <= set(plan.arms.arms)
    packed = pack_recipe(plan.study)
    assert packed.text.hard_negatives == 1
    assert plan.study.heldout_pairs > packed.batch.pairs  # or there would be no held-out batch
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


@pytest.mark.parametrize("path", SCALES, ids=lambda path: path.stem)
def test_a_scale_begins_with_the_model_of_the_other_recipes_of_its_size(path: Path) -> None:
    packed = load_recipe(ROOT / "launch/recipes/smollm2-135m/pack.yaml", PackRecipe)
    assert load_recipe(path, StudyRecipe).base == packed.tokenizer


def test_the_horizon_of_a_curve_is_its_last_step(scale: Path) -> None:
    plan = plan_of(scale)
    cells = plan.cells("stage2", 0)
    assert cells == [Cell("stage2", 0, 1, final=False), Cell("stage2", 0, 3, final=True)]
    optims = [load_recipe(plan.recipe_file("stage2"), TrainRecipe, plan.overrides(cell)).optim for cell in cells]
    assert [(o.total_steps, o.decay_steps, o.warmup_steps) for o in optims] == [(1, 3, 1), (3, 3, 1)]
    assert [cell.step for cell in plan.cells("untrained", 0)] == [0]
    assert plan.seeds("untrained") == (0,)


def test_a_scale_sets_the_rate_of_a_recipe_or_of_an_arm(scale: Path) -> None:
    text = yaml.safe_load(scale.read_text())

    def rate_of(name: str, rates: dict[str, float]) -> float:
        scale.write_text(yaml.safe_dump(text | {"learning_rates": rates}))
        plan = plan_of(scale, stage2_long=5, stage2_full_long=4)
        cell = plan.cells(name, 0)[-1]
        return load_recipe(plan.recipe_file(name), TrainRecipe, plan.overrides(cell)).optim.lr

    rates = {"stage2": 3e-4}
    assert [rate_of(name, rates) for name in ("stage2", "stage1_stage2", "stage2_long")] == [3e-4] * 3
    assert rate_of("stage2_full_long", rates) == 4e-5  # its own, in arms.yaml
    assert rate_of("stage1", rates) == rate_of("stage1", {}) == 4e-5
    # Without a step there is no rate: a result of the untrained model belongs to every one of them.
    assert rate_of("untrained", {"stage1": 3e-4}) == 4e-5
    rates |= {"stage2_long": 5e-4, "stage2_full_long": 6e-4}
    assert [rate_of(name, rates) for name in ("stage2", "stage2_long", "stage2_full_long")] == [3e-4, 5e-4, 6e-4]


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
    # Their schedule is their own: only their end compares.
    assert plan_of(scale, stage2_long=5).cells("stage2_long", 0) == [Cell("stage2_long", 0, 5, final=True)]


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


@pytest.fixture
def scored(scale: Path) -> StudyPlan:
    """Results of three arms: two seeds of two arms, one seed of the third."""
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
    assert "| Stage II only (LoRA) | 2 | 3 | 1,000 | 2 | 1.00 ± 0.00 | 60.00 ± 0.00 | 45.00 ± 0.00 |" in final
    # 0.3 + 0.3 + 0.1 and 0.3 + 0.3 - 0.2: mean 55, standard deviation 30 / sqrt(2).
    assert "| 55.00 ± 21.21 |" in final
    assert "| Stage I + II | -5.00 ± 21.21 (1/2) |" in difference_table(results, ["A"], "stage2")


def test_a_table_without_rows_is_left_out_with_its_caption(scored: StudyPlan) -> None:
    def tables() -> str:
        return (write_tables(scored.study.results_dir, scored.arms) or pytest.fail("no result")).read_text()

    assert "Difference to `stage2`" in tables()
    for file in scored.study.results_dir.glob("stage2-seed*"):
        file.unlink()
    assert "Difference to" not in tables()


def test_a_curve_begins_with_what_the_arm_starts_from(scored: StudyPlan) -> None:
    curves = {curve.label: curve.points for curve in curves_of(read_results(scored.study.results_dir), "A")}
    assert set(curves) == {"Stage II only (LoRA)", "Stage I + II"}
    assert curves["Stage II only (LoRA)"][0] == pytest.approx([10.0])
    assert curves["Stage I + II"][0] == pytest.approx([20.0])
    assert curves["Stage I + II"][3] == pytest.approx([70.0, 40.0])


def test_an_arm_of_equal_compute_is_a_point(scored: StudyPlan) -> None:
    plan = StudyPlan(scored.study, scored.arms, scored.data, {"stage2_long": 5})
    for seed, score in ((0, 0.4), (1, 0.6)):
        write_result(plan, plan.cells("stage2_long", seed)[-1], score)
    label = plan.arm("stage2_long").label
    curves = {curve.label: curve.points for curve in curves_of(read_results(plan.study.results_dir), "A")}
    assert curves[label] == {5: pytest.approx([40.0, 60.0])}


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
        "| stage2_long | 0 | 0/? | after packing |",
    ]
    # As in a fresh checkout, which has results but no shards yet.
    known = plan_of(scale, stage2_long=5)
    write_result(known, known.cells("stage2_long", 0)[-1], 0.5)
    main([str(scale), "--list", "--only", "stage2_long", "--seeds", "0"])
    assert capsys.readouterr().out.splitlines()[2:] == ["| stage2_long | 0 | 1/? | after packing |"]


def test_what_awaits_tuning_is_said(scored: StudyPlan, scale: Path, capsys) -> None:
    arguments = [str(scale), "learning_rates.stage1=[1e-4,1e-5]", "--only", "stage2,stage1_stage2", "--seeds", "0"]
    main([*arguments, "--list"])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| stage2 | 0 | 2/2 | none |",
        "| stage1_stage2 | 0 | 0/2 | 1 3, after tuning |",
    ]
    main([*arguments, "--commands"])
    assert capsys.readouterr().out.splitlines() == ["# stage1_stage2: after tuning stage1"]


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


def test_a_step_that_left_the_curve_stays_in_the_table_if_the_rest_is_the_same(scored: StudyPlan, scale: Path) -> None:
    file = result_file(scored, scored.cells("stage2", 0)[0])
    scale.write_text(scale.read_text().replace("curve_steps:\n- 1", "curve_steps:\n- 2"))
    other = plan_of(scale)
    assert [cell.step for cell in missing(other, "stage2", 0)] == [2]
    write_result(scored, scored.cells("stage2", 0)[0], 0.5, settings_sha256="other")
    with pytest.raises(ConfigError) as caught:
        missing(other, "stage2", 0)
    assert str(caught.value) == f"{file}: made with other settings; delete it, or choose another results_dir"


def test_one_table_does_not_hold_results_of_different_shards(scored: StudyPlan, scale: Path, capsys) -> None:
    file = write_result(scored, scored.cells("stage1", 0)[0], 0.2, data_index_sha256="b")
    with pytest.raises(SystemExit) as exit_:
        main([str(scale), "--tables"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {file.parent}: untrained-seed0-step0.json and {file.name} are of different shards "
        "(data_index_sha256); delete one, or choose another results_dir"
    )


def test_one_table_does_not_hold_results_of_different_tasks(scored: StudyPlan, scale: Path, capsys) -> None:
    """Regression: a task missing from one result raised KeyError."""
    file = write_result(scored, scored.cells("stage1", 0)[0], 0.2, scores={"A": 0.2, "STS16": 0.3})
    with pytest.raises(SystemExit) as exit_:
        main([str(scale), "--tables"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {file.parent}: untrained-seed0-step0.json and {file.name} are of different tasks (only one has "
        "B, STS16); delete one, or choose another results_dir"
    )


def test_tokens_and_work_are_means_over_the_seeds(scored: StudyPlan) -> None:
    """Regression: the table showed the first seed's numbers."""
    results = read_results(scored.study.results_dir)
    last = next(r for r in results if r["arm"] == "stage2" and r["seed"] == 1 and r["final"])
    last["with_before"] |= {"tokens": 2001, "petaflops": 4}
    assert "| Stage II only (LoRA) | 2 | 3 | 1,500 | 3 |" in final_table(results, ["A", "mean"])


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
        (
            ["learning_rates={stage3: 1e-3}"],
            "learning_rates: no arm is 'stage3' or has such a recipe; did you mean 'stage2'?",
        ),
        (
            ["learning_rates={plain: [1e-3, 1e-4]}"],
            "learning_rates.plain: a list is tuned on the arm of that name, and there is none",
        ),
    ],
)
def test_a_wrong_call_is_one_line(argv: list[str], message: str, scale: Path, capsys) -> None:
    arms = scale.parent / "arms.yaml"
    arms.write_text(arms.read_text() + "  other: {label: other, recipe: plain, steps: stage1}\n")
    (arms.parent / "plain.yaml").write_text((arms.parent / "stage1.yaml").read_text())
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
