"""Tables of scores: main scores side by side, and a benchmark's categories and averages as aggregated by mteb.

No task goes missing silently: a category or average that lacks a task is withheld, and the absent tasks are named.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mteb.benchmarks.benchmark import Benchmark, BenchmarkAggregation
from mteb.results import ModelResult, TaskResult
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from anchor.errors import DataError, first_line

MEAN_TASK, MEAN_TYPE = "Mean(Task)", "Mean(TaskType)"
SCORES = "scores.json"
_LARGEST = 1e6
"""Largest absolute score accepted; a number with hundreds of digits cannot be shown."""
_NO_RESULTS = ("model_meta.json", "run_settings.json", SCORES)


@dataclass(frozen=True, slots=True)
class Summary:
    """Scores of a result folder on a benchmark.

    Attributes:
        tasks: score of each complete task, 0 to 1.
        absent: tasks without a complete result; for a partial result, the missing subsets follow in brackets.
        values: categories and averages, 0 to 1; None if a task is absent.
        counts: ``(present, total)`` number of tasks per category.
    """

    tasks: dict[str, float]
    absent: list[str]
    values: dict[str, float | None]
    counts: dict[str, tuple[int, int]]


def score_table(labelled: list[tuple[str, Path]]) -> Table:
    """Return a table with one row per result folder and one column per task; scores times 100.

    Raises:
        DataError: a folder has no ``scores.json``, or it is unreadable.
    """
    rows = [(label, main_scores(folder)) for label, folder in labelled]
    tasks = sorted({task for _, scores in rows for task in scores})
    table = Table("model", *map(escape, tasks))
    for label, scores in rows:
        table.add_row(escape(label), *(f"{100 * scores[task]:.2f}" if task in scores else "not run" for task in tasks))
    return table


def main_scores(folder: Path) -> dict[str, float]:
    """Return the main scores, by task, of a folder that ``eval mteb`` wrote.

    Raises:
        DataError: the folder has no ``scores.json``, or it is unreadable.
    """
    if not (folder / SCORES).is_file():
        raise DataError(f"{folder}: no {SCORES}; run `python -m eval mteb` with --output {folder} first")
    return read_scores(folder)["scores"]


def read_scores(folder: Path) -> dict[str, Any]:
    """Return the content of ``scores.json``.

    Raises:
        DataError: the file is half-written, or not from `eval mteb`.
    """
    file = folder / SCORES
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        whole = all(isinstance(one, float | int) and not abs(one) > _LARGEST for one in found["scores"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not readable; delete it, the scores are in results/ too") from error
    if not whole:
        raise DataError(f"{file}: not readable; delete it, the scores are in results/ too")
    return found


def task_results(folder: Path) -> list[TaskResult]:
    """Return the results in mteb's layout under a folder; if it has ``scores.json``, only those of its revision.

    Raises:
        DataError: there are no results, a file is not a result, or the results belong to several models.
    """
    files = [path for path in sorted(folder.rglob("*.json")) if path.name not in _NO_RESULTS]
    files = [path for path in files if "cache" not in path.relative_to(folder).parts]
    if (folder / SCORES).is_file():
        revision = read_scores(folder).get("revision")
        files = [path for path in files if path.parent.name == revision]
    if not files:
        raise DataError(f"{folder}: no results in mteb's layout (TASK.json); expected an --output of `eval mteb`")
    models = sorted({str(path.parent.relative_to(folder)) for path in files})
    if len(models) > 1:
        raise DataError(
            f"{folder}: results of {len(models)} models or revisions ({', '.join(models)}); name one of them"
        )
    results = []
    for path in files:
        try:
            results.append(TaskResult.from_disk(path))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: not a result of mteb: {first_line(error)}") from error
    return results


def summarise(benchmark: Benchmark, results: list[TaskResult]) -> Summary:
    """Return a benchmark's categories and averages by mteb's own aggregation, withholding incomplete ones."""
    chosen = ModelResult(model_name="one", model_revision="one", task_results=results).select_tasks(benchmark.tasks)
    missing = {result.task_name: _missing(result) for result in chosen.task_results}
    by_name = {result.task_name: result for result in chosen.task_results if not missing[result.task_name]}
    kinds: dict[str, list[str]] = {}
    for task in benchmark.tasks:
        kinds.setdefault(task.metadata.type, []).append(task.metadata.name)
    values: dict[str, float | None] = {}
    for kind, names in kinds.items():
        there = [by_name[name] for name in names if name in by_name]
        whole = len(there) == len(names)
        values[kind] = BenchmarkAggregation.TASK_TYPES.aggregate(there)[kind] if whole else None
    names = [task.metadata.name for task in benchmark.tasks if task.metadata.name not in by_name]
    absent = [f"{name} ({', '.join(missing[name])})" if name in missing else name for name in names]
    for aggregation in (BenchmarkAggregation.MEAN_TASK, BenchmarkAggregation.MEAN_TASK_TYPE):
        key = aggregation.get_score_keys[0]
        values[key] = aggregation.aggregate(list(by_name.values()))[key] if not absent else None
    counts = {kind: (sum(name in by_name for name in names), len(names)) for kind, names in kinds.items()}
    return Summary({name: float(one.get_score()) for name, one in by_name.items()}, absent, values, counts)


def _missing(result: TaskResult) -> list[str]:
    """Return a result's subsets that lack a score; for the subset ``default``, return the split instead."""
    gaps = [
        split if score["hf_subset"] == "default" else score["hf_subset"]
        for split, scores in result.scores.items()
        for score in scores
        if score["main_score"] is None or math.isnan(score["main_score"])
    ]
    return sorted(set(gaps))


def published(benchmark: str) -> dict[str, dict[str, float]]:
    """Return published rows of a benchmark: label -> column -> score, 0 to 1.

    Raises:
        DataError: no rows are known for the benchmark.
    """
    known: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))
    if benchmark not in known:
        raise DataError(f"--compare published: no rows for '{benchmark}'; there are for {', '.join(known)}")
    columns = known[benchmark]["columns"]
    rows = known[benchmark]["rows"]
    return {label: {c: v / 100 for c, v in zip(columns, row, strict=True)} for label, row in rows.items()}


def benchmark_table(benchmark: Benchmark, summaries: dict[str, Summary], *, compare_published: bool = False) -> Table:
    """Return a table with one row per model and one column per category and average; scores times 100.

    A value that lacks tasks is replaced by the number of tasks present, "3 of 4". Published rows come last.
    """
    columns = list(next(iter(summaries.values())).values)
    table = Table("model", *columns, title=benchmark.name)
    for label, summary in summaries.items():
        table.add_row(escape(label), *(_cell(summary, column) for column in columns))
    if compare_published:
        table.add_section()
        for label, row in published(benchmark.name).items():
            table.add_row(escape(label), *(f"{100 * row[column]:.2f}" if column in row else "" for column in columns))
    return table


def absent_line(label: str, summary: Summary) -> str | None:
    """Return a line that names the tasks without a result, or None if there are none."""
    if not summary.absent:
        return None
    return f"{label}: averages are withheld, {len(summary.absent)} tasks have no result: {', '.join(summary.absent)}"


def print_table(table: Table) -> None:
    """Write a table to stdout: drawn on a terminal, otherwise as plain aligned columns at full width."""
    console = Console()
    if console.is_terminal:
        console.print(table)
        return
    columns = [[Text.from_markup(str(cell)).plain for cell in (c.header, *c.cells)] for c in table.columns]
    widths = [max(map(len, cells)) for cells in columns]
    if table.title is not None:
        sys.stdout.write(f"{table.title}\n")
    for row in zip(*columns, strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def _cell(summary: Summary, column: str) -> str:
    value = summary.values[column]
    if value is not None:
        return f"{100 * value:.2f}"
    there, every = summary.counts.get(column, (len(summary.tasks), len(summary.tasks) + len(summary.absent)))
    return f"{there} of {every}"
