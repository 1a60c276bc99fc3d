"""Invariants: averages are mteb's own; one that lacks a task is withheld and the task is named; published rows are
those of the papers."""

import json

import mteb
import pytest
from mteb.results import BenchmarkResults, ModelResult, TaskResult

from anchor.errors import ConfigError, DataError
from eval.__main__ import main
from eval.reporting.table import (
    absent_line,
    benchmark_table,
    main_scores,
    print_table,
    published,
    score_table,
    summarise,
    task_results,
)
from eval.scoring.tasks import LITE_TASKS, find_benchmark


def made_up_results(benchmark, leave_out=()) -> list[TaskResult]:
    """Return a result for every task, each with another score."""
    results = []
    for number, task in enumerate(benchmark.tasks):
        if task.metadata.name in leave_out:
            continue
        scores = {
            split: [
                {"main_score": number / 100, "hf_subset": subset, "languages": ["eng-Latn"]}
                for subset in task.hf_subsets
            ]
            for split in task.eval_splits
        }
        results.append(
            TaskResult(
                dataset_revision="r",
                task_name=task.metadata.name,
                mteb_version="2.0",
                scores=scores,
                evaluation_time=1.0,
                kg_co2_emissions=None,
            )
        )
    return results


@pytest.mark.parametrize(("name", "number"), [("MTEB(eng, v1)", 56), ("MTEB(eng, v2)", 41)])
def test_averages_are_those_of_mteb(name, number):
    benchmark = find_benchmark(name)
    results = made_up_results(benchmark)
    assert len(results) == number
    summary = summarise(benchmark, results)
    model = ModelResult(model_name="m/m", model_revision="r", task_results=results)
    theirs = benchmark.get_score(BenchmarkResults(model_results=[model]))["m/m"]
    assert summary.values["Mean(Task)"] == pytest.approx(theirs["Mean(Task)"])
    assert summary.values["Mean(TaskType)"] == pytest.approx(theirs["Mean(TaskType)"])
    assert summary.values["Retrieval"] == pytest.approx(theirs["Retrieval"])
    assert summary.values["Mean(Task)"] != summary.values["Mean(TaskType)"]
    assert absent_line("x", summary) is None


def test_an_average_that_lacks_a_task_is_withheld_and_the_task_named():
    benchmark = find_benchmark("MTEB(eng, v1)")
    summary = summarise(benchmark, made_up_results(benchmark, leave_out=("SciFact", "MSMARCO")))
    assert summary.values["Retrieval"] is None
    assert summary.values["Mean(Task)"] is None
    assert summary.values["STS"] is not None
    line = absent_line("mine", summary)
    assert line == "mine: averages are withheld, 2 tasks have no result: SciFact, MSMARCO"
    table = benchmark_table(benchmark, {"mine": summary}, compare_published=True)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["Retrieval"][0] == "13 of 15"
    assert cells["Mean(Task)"][0] == "54 of 56"
    assert "62.24" in cells["Mean(Task)"]


@pytest.mark.filterwarnings("ignore")  # mteb's own word about it
def test_a_task_that_lacks_a_subset_is_absent_and_the_subset_named():
    """Regression: the task counted as present, `28 of 28`, while its average was withheld and nothing was named."""
    benchmark = find_benchmark("MTEB(Scandinavian, v1)")
    results = made_up_results(benchmark)
    several = next(task for task in benchmark.tasks if len(task.hf_subsets) > 2)
    result = next(one for one in results if one.task_name == several.metadata.name)
    for scores in result.scores.values():
        del scores[1:]
    name = f"{several.metadata.name} ({', '.join(sorted(several.hf_subsets[1:]))})"
    summary = summarise(benchmark, results)
    number = len(benchmark.tasks)
    assert summary.absent == [name]
    assert absent_line("x", summary) == f"x: averages are withheld, 1 tasks have no result: {name}"
    assert several.metadata.name not in summary.tasks
    assert summary.values[several.metadata.type] is None
    table = benchmark_table(benchmark, {"x": summary})
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["Mean(Task)"] == [f"{number - 1} of {number}"]


def test_published_averages_are_near_the_mean_of_their_categories():
    """A typo in a row of seven categories would show in its average."""
    sizes = {"Retrieval": 15, "Reranking": 4, "Clustering": 11, "PairClassification": 3, "Classification": 12}
    sizes |= {"STS": 10, "Summarization": 1}
    rows = published("MTEB(eng, v1)")
    assert len(rows) == 10
    for label, row in rows.items():
        mean = sum(row[kind] * size for kind, size in sizes.items()) / 56
        assert mean == pytest.approx(row["Mean(Task)"], abs=2e-3), label


def test_the_lite_list_has_ten_tasks():
    benchmark = find_benchmark("lite")
    assert {task.metadata.name for task in benchmark.tasks} == set(LITE_TASKS)
    assert len(benchmark.tasks) == 10
    assert next(task for task in benchmark.tasks if task.metadata.name == "STS17").hf_subsets == ["en-en"]


def test_an_unknown_benchmark_is_named_with_a_suggestion():
    with pytest.raises(ConfigError) as error:
        find_benchmark("MTEB(eng,v2)")
    assert str(error.value) == "--benchmark: no benchmark is called 'MTEB(eng,v2)'; did you mean 'MTEB(eng, v2)'?"


def test_results_are_read_from_mtebs_layout_and_several_models_are_refused(tmp_path):
    benchmark = find_benchmark("lite")
    cache = mteb.ResultCache(tmp_path)
    for model in ("a/one", "b/two"):
        meta = mteb.models.ModelMeta.create_empty({"name": model, "revision": "r"})
        for result in made_up_results(benchmark)[:2]:
            cache.save_to_cache(result, meta)
        if model == "a/one":
            assert len(task_results(tmp_path)) == 2
    with pytest.raises(DataError, match="results of 2 models or revisions"):
        task_results(tmp_path)
    assert len(task_results(tmp_path / "results/a__one")) == 2


def test_folders_without_scores_are_refused_and_missing_tasks_say_so(tmp_path):
    with pytest.raises(DataError, match=r"no scores\.json"):
        score_table([("x", tmp_path)])
    for name, scores in (("a", {"X": 0.5}), ("b", {"Y": 0.25})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(json.dumps({"scores": scores}))
    table = score_table([("a", tmp_path / "a"), ("b", tmp_path / "b")])
    assert [list(column.cells) for column in table.columns] == [["a", "b"], ["50.00", "not run"], ["not run", "25.00"]]
    assert main_scores(tmp_path / "a") == {"X": 0.5}
    for content in ('{"scores": {"X"', "5", "{}", '{"scores": {"X": null}}'):
        file = tmp_path / "a/scores.json"
        file.write_text(content)
        for read in (main_scores, task_results):
            with pytest.raises(DataError) as error:
                read(tmp_path / "a")
            assert str(error.value) == f"{file}: not readable; delete it, the scores are in results/ too"


def test_a_table_that_is_not_for_a_terminal_has_all_its_numbers(tmp_path, capsys):
    """Regression: with twelve tasks, headers were cut to `Ar…` and scores to `10…`."""
    tasks = {f"A task with a long name {i:02d}": (i + 50) / 100 for i in range(12)}
    (tmp_path / "scores.json").write_text(json.dumps({"scores": tasks}))
    main(["table", f"mine={tmp_path}"])
    header, row = capsys.readouterr().out.splitlines()
    width = len("A task with a long name 00")
    assert header == "model  " + "  ".join(tasks)
    assert row == "mine   " + "  ".join(f"{50 + i}.00".ljust(width) for i in range(12)).rstrip()
    benchmark = find_benchmark("lite")
    summary = summarise(benchmark, made_up_results(benchmark, leave_out=("BIOSSES",)))
    print_table(benchmark_table(benchmark, {"mine": summary}))
    title, header, row = capsys.readouterr().out.splitlines()
    assert title == "lite"
    assert header.split() == ["model", *summary.values]
    assert "1 of 2" in row
    assert "9 of 10" in row


def test_labels_are_shown_as_they_are_and_equal_ones_refused(tmp_path, capsys):
    """Regression: `[v1]` was read as a style; of two equal labels, --benchmark showed only the last."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(json.dumps({"scores": {"X [en]": 0.5}}))
    main(["table", f"[v1]={tmp_path / 'a'}", f"[bold]x={tmp_path / 'b'}"])
    assert capsys.readouterr().out == "model    X [en]\n[v1]     50.00\n[bold]x  50.00\n"
    for command, label, first in (
        (["table", f"x={tmp_path / 'a'}", f"x={tmp_path / 'b'}", "--benchmark", "lite"], "x", tmp_path / "a"),
        (["mteb", "nowhere", "--tasks", "BIOSSES", "--compare", f"this={tmp_path / 'b'}"], "this", "nowhere/mteb"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        message = f"'{label}={tmp_path / 'b'}': the label '{label}' is that of {first} already; labels must differ"
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "BIOSSES", "--compare", "x=gone"], "gone: no scores.json; run `python -m eval mteb` with"),
        (["--benchmark", "lite", "--compare", "x=gone"], "gone: no results in mteb's layout (TASK.json)"),
        (["--benchmark", "BRIGHT", "--compare", "published"], "--compare published: no rows for 'BRIGHT'; there are"),
    ],
)
def test_what_cannot_be_compared_is_named_before_anything_is_scored(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr("anchor.encoding.opening.open_encoder", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["mteb", "nowhere", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_the_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    end = "\nexample: python -m eval decode runs/quickstart/stage1/export --text 'An anchor holds a ship in place.'\n"
    assert f"{end}\npython -m eval COMMAND --help says more, with an example of each\n" in capsys.readouterr().out
