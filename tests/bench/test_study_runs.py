"""Invariants: a cell is trained and scored under one lock, by one process; a run or data of other settings are neither
used nor deleted; no held-out text is trained on; a preparation killed anywhere goes on. Slow: a tiny study runs from
raw pairs to tables by the project's own commands, is killed, goes on, and runs nothing twice."""

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import english_pairs, write_jsonl
from studies import plan_of, write_result

from anchor.config.load import load_recipe
from anchor.config.train_recipe import TrainRecipe
from anchor.errors import ConfigError, DataError
from bench.study import prepare as study_prepare
from bench.study import run as study_run
from bench.study import tuning
from bench.study.plan import Cell, StudyPlan
from bench.study.prepare import prepare, split_pairs
from bench.study.programs import locked
from bench.study.recipe import StudyRecipe
from bench.study.run import missing, result_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def events(scale: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Locks and commands of a study, in order."""
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


@pytest.fixture
def trained(events: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that tuning trains, as `arm rate`; the loss falls with the rate."""
    happened: list[str] = []

    def train(plan: StudyPlan, cell: Cell, more: list[str]) -> None:
        given = dict(word.split("=", 1) for word in more)
        assert json.loads(given["evaluation"])["shards"] == str(plan.data.heldout_shards)
        happened.append(f"{cell.arm} {given['optim.lr']}")
        folder = Path(given["output_dir"])
        losses = {0: 2.0, cell.step: 2.0 - 3 * float(given["optim.lr"])}
        rows = [{"step": step, "held_out/loss_total_nats": loss} for step, loss in losses.items()]
        write_jsonl(folder / "held_out.jsonl", rows)
        (folder / "checkpoints").mkdir()

    monkeypatch.setattr(tuning, "train", train)
    return happened


def test_losses_of_learning_rates_are_of_one_setting(scale: Path, trained: list[str]) -> None:
    plan = plan_of(scale)
    tuning.tune(plan, "stage2", [1e-4])
    table = tuning.tune(plan, "stage2", [1e-4, 1e-1])
    assert trained == ["stage2 0.0001", "stage2 0.1"]
    assert list(plan.study.work_dir.rglob("held_out.jsonl")) != []
    assert list(plan.study.work_dir.rglob("checkpoints")) == []
    assert table.splitlines()[-1] == "| 0.1 | 2.0000 | 1.7000 |"
    (plan.data.shards / "index.json").write_text("[]")
    with pytest.raises(ConfigError) as caught:
        tuning.tune(plan, "stage2", [1e-2])
    assert str(caught.value) == (
        f"{plan.study.results_dir / 'tuning-stage2.json'}: 0.0001 was run with other settings; delete it, or choose "
        "another results_dir"
    )
    assert len(trained) == 2


def test_a_list_of_rates_is_tuned_before_the_arms_that_need_it(
    scale: Path, trained: list[str], events: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    rates = {"stage1": [1e-1, 1e-3], "stage2": [1e-4, 1e-2, 1e-3], "language_model": [1e-3, 1e-2]}
    scale.write_text(yaml.safe_dump(yaml.safe_load(scale.read_text()) | {"learning_rates": rates}))
    plan = plan_of(scale, stage2_long=5, stage2_full_long=4)
    names = ["untrained", "stage1_stage2", "stage2_full_long"]
    assert [plan.untuned(name) for name in names] == [[], ["stage1", "stage2"], []]
    assert tuning.tuned(plan, names, run=False).tuned == {}
    assert tuning.tuned(plan, ["untrained", "stage2_full_long"]).tuned == {}
    assert trained == []
    assert [len(study_run.missing(plan, name, 0)) for name in names] == [1, 2, 1]

    known = tuning.tuned(plan, names)
    assert trained == [
        *(f"stage1 {rate}" for rate in ("0.1", "0.001")),
        *(f"stage2 {r}" for r in ("0.0001", "0.01", "0.001")),
    ]
    assert known.tuned == {"stage1": 0.1, "stage2": 0.01}
    assert "stage1: 0.1 is the first or the last of the list; one beyond it may be better" in caplog.text
    assert known.untuned("stage1_stage2") == []
    lr = {}
    for name in ("stage1", "stage2", "stage2_long", "stage2_full_long"):
        cell = known.cells(name, 0)[-1]
        lr[name] = load_recipe(known.recipe_file(name), TrainRecipe, known.overrides(cell)).optim.lr
    assert lr == {"stage1": 0.1, "stage2": 0.01, "stage2_long": 0.01, "stage2_full_long": 4e-5}
    # Nothing is trained twice, and a start that trains nothing knows what is known.
    assert tuning.tuned(plan, names) == tuning.tuned(plan, names, run=False) == known
    assert len(trained) == 5
    # What --tune has found besides is not the scale's to choose.
    tuning.tune(plan, "stage2", [1e-1])
    assert tuning.tuned(plan, names).tuned == known.tuned
    study_run.run_study(known, ["stage1"], [0])
    with pytest.raises(ConfigError, match="made with other settings"):
        missing(replace(known, tuned={**known.tuned, "stage1": 1e-3}), "stage1", 0)


def test_an_arm_is_tuned_after_what_it_starts_from(scale: Path, trained: list[str]) -> None:
    rates = {"stage1": [1e-3, 1e-2], "stage1_stage2": [1e-4, 1e-3]}
    scale.write_text(yaml.safe_dump(yaml.safe_load(scale.read_text()) | {"learning_rates": rates}))
    plan = plan_of(scale)
    assert plan.untuned("stage1_stage2") == ["stage1", "stage1_stage2"]
    assert plan.untuned("stage2") == []
    tuning.tune(plan, "stage1_stage2", [5e-4])
    assert trained == ["stage1 0.001", "stage1 0.01", "stage1_stage2 0.0005"]
    assert tuning.tuned(plan, ["stage1_stage2"]).tuned == {"stage1": 0.01, "stage1_stage2": 0.001}


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
        "import os, sys; from pathlib import Path; from bench.study.programs import locked, run\n"
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
        with (tmp_path / ".study.lock").open("a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(int(orphan), signal.SIGKILL)
    with locked(tmp_path):
        pass


# Data without packing.


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the commands that preparation runs; decontamination only copies."""
    happened: list[str] = []

    def run(command: list[str], log_file: Path, lock: int) -> None:
        happened.append(command[3])
        if command[3] == "decontaminate":
            shutil.copytree(command[4], command[command.index("--output") + 1])

    monkeypatch.setattr(study_prepare, "run", run)
    return happened


def test_too_few_held_out_pairs_for_a_batch_are_refused_before_the_work(scale: Path, prepared: list[str]) -> None:
    """Regression: the shipped GPU scale held out 200 pairs for batches of 256 and failed after long preparation."""
    study = load_recipe(scale, StudyRecipe, ["heldout_pairs=7"])
    with pytest.raises(ConfigError) as caught:
        prepare(study)
    assert str(caught.value) == (
        "heldout_pairs is 7, expected at least the 8 pairs of a batch (pack: batch.pairs), better some more: a pair "
        "without tokens makes none"
    )
    assert prepared == []


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

    monkeypatch.setattr("anchor.dry_run.report.dry_run", dry_run)
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
    # A test run in the background of a shell ignores SIGINT, and so would what it starts.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "bench.study", str(scale), *argv]
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
