"""Tables and plots of a study from the JSON of its cells alone: Markdown, with SVG and PNG beside it."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from anchor.errors import ConfigError, DataError
from anchor.json_files import load_json, refuse_other_shape
from bench.study.plots import Curve, draw_curves
from bench.study.recipe import ArmsRecipe

Result = dict[str, Any]
MEAN = "mean"
_RESULT = {
    **{"arm": str, "label": str, "seed": int, "step": int, "final": bool, "curve": bool},
    **{"scores": {str: (int, float)}, "own": dict, "with_before": dict},
}
_LONGEST = 160


def read_results(folder: Path) -> list[Result]:
    """Read all cells of a folder, in the order of their names."""
    return [_read_result(file) for file in sorted(folder.glob("*-seed*-step*.json"))]


def _read_result(file: Path) -> Result:
    try:
        result = load_json(file)
        refuse_other_shape(result, _RESULT)
    except ValueError as error:
        raise DataError(f"{file}: not a result of a study ({error}); delete it, and run the study again") from error
    return result


def spread(values: Sequence[float]) -> str:
    """Format mean and sample standard deviation; a single value has no deviation."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def score_of(result: Result, task: str) -> float:
    """Return a task's main score times 100, or the mean over the tasks."""
    scores = result["scores"]
    return 100 * (statistics.fmean(scores.values()) if task == MEAN else scores[task])


def write_tables(folder: Path, arms: ArmsRecipe) -> Path | None:
    """Write ``tables.md``, ``curves.svg`` and ``curves.png``; return None if there is no result yet.

    Raises:
        ConfigError: the results do not fit into one table.
    """
    results = [result for result in read_results(folder) if result["arm"] in arms.arms]
    if not results:
        return None
    order = list(arms.arms)
    results.sort(key=lambda r: (order.index(r["arm"]), r["seed"], r["step"]))
    _refuse_mixed(folder, results)
    tasks = [*dict.fromkeys(task for result in results for task in result["scores"]), MEAN]
    differences = f"Difference to `{arms.baseline}` of the same seed: mean ± standard deviation, seeds that gained."
    tables = {
        "Scores x 100, mean ± standard deviation over seeds.": final_table(results, tasks),
        differences: difference_table(results, tasks, arms.baseline),
        "Mean over the tasks by steps of Stage II.": curve_table(results),
        "Decoding of held-out documents' embeddings into queries.": decoding_table(results),
    }
    parts = [part for caption, table in tables.items() if table for part in (caption, table)]
    path = folder / "tables.md"
    path.write_text("\n\n".join([*parts, *examples(results)]) + "\n", encoding="utf-8")
    curves = {task: curves_of(results, task) for task in tasks}
    if any(curves.values()):
        draw_curves(curves, folder / "curves")
    return path


def _refuse_mixed(folder: Path, results: Sequence[Result]) -> None:
    """Refuse results with two ends of one arm and seed, with different shards, or with different tasks."""
    ends: dict[tuple[str, int], Result] = {}
    for result in results:
        other = ends.setdefault((result["arm"], result["seed"]), result) if result["final"] else result
        if other is not result:
            _refuse(folder, other, result, "are both the last of their arm and seed")
        if result["data_index_sha256"] != results[0]["data_index_sha256"]:
            _refuse(folder, results[0], result, "are of different shards (data_index_sha256)")
        if differing := sorted(set(result["scores"]) ^ set(results[0]["scores"])):
            _refuse(folder, results[0], result, f"are of different tasks (only one has {', '.join(differing)})")


def _refuse(folder: Path, first: Result, second: Result, what: str) -> NoReturn:
    names = (f"{r['arm']}-seed{r['seed']}-step{r['step']}.json" for r in (first, second))
    raise ConfigError(f"{folder}: {' and '.join(names)} {what}; delete one, or choose another results_dir")


def _by_arm(results: Iterable[Result]) -> dict[str, list[Result]]:
    out: dict[str, list[Result]] = {}
    for result in results:
        out.setdefault(result["arm"], []).append(result)
    return out


def final_table(results: Sequence[Result], tasks: Sequence[str]) -> str:
    """Return a table with one row per arm: its cost, and the scores of its last step."""
    rows = []
    for cells in _by_arm(r for r in results if r["final"]).values():
        costs = [r["with_before"] for r in cells]
        tokens, petaflops = (statistics.fmean(cost[key] for cost in costs) for key in ("tokens", "petaflops"))
        rows.append(
            [
                *(cells[0]["label"], len(cells), costs[0]["steps"], f"{round(tokens):,}", f"{petaflops:.3g}"),
                spread([cost["training_seconds"] / 60 for cost in costs]),
                *(spread([score_of(r, task) for r in cells]) for task in tasks),
            ]
        )
    return markdown(["arm", "seeds", "steps", "tokens", "PFLOP", "minutes", *tasks], rows)


def difference_table(results: Sequence[Result], tasks: Sequence[str], baseline: str) -> str:
    """Return the differences to the baseline, paired by seed so that what the seeds have in common cancels."""
    arms = _by_arm(r for r in results if r["final"])
    base = {r["seed"]: r for r in arms.pop(baseline, [])}
    rows = []
    for cells in arms.values():
        paired = [(r, base[r["seed"]]) for r in cells if r["seed"] in base]
        if paired:
            gains = {task: [score_of(r, task) - score_of(b, task) for r, b in paired] for task in tasks}
            won = (f"{spread(gain)} ({sum(g > 0 for g in gain)}/{len(gain)})" for gain in gains.values())
            rows.append([cells[0]["label"], *won])
    return markdown(["arm", *tasks], rows) if rows else ""


def curves_of(results: Sequence[Result], task: str) -> list[Curve]:
    """Return the contrastive arms' scores over the steps of Stage II; a curve begins with its arm's starting point."""
    arms = _by_arm(results)
    out = []
    for name, cells in arms.items():
        if not cells[0]["curve"]:
            continue
        points: dict[int, list[float]] = {}
        starts = [] if all(cell["final"] for cell in cells) else _starts(results, cells)
        for result in [*starts, *cells]:
            step = result["step"] if result["arm"] == name else 0
            points.setdefault(step, []).append(score_of(result, task))
        out.append(Curve(cells[0]["label"], points))
    return out


def _starts(results: Sequence[Result], cells: Sequence[Result]) -> list[Result]:
    """Return the cells that an arm's runs start from: of the same seeds, or the untrained model."""
    after, seeds = cells[0]["after"], {r["seed"] for r in cells}
    if after is None:
        return [r for r in results if r["with_before"]["steps"] == 0]
    return [r for r in results if r["arm"] == after and r["final"] and r["seed"] in seeds]


def curve_table(results: Sequence[Result]) -> str:
    """Return a table of the mean over the tasks, by arm and step."""
    curves = curves_of(results, MEAN)
    steps = sorted({step for curve in curves for step in curve.points})
    rows = [[curve.label, *(spread(curve.points.get(step, [])) for step in steps)] for curve in curves]
    return markdown(["arm", *map(str, steps)], rows) if rows else ""


def decoding_table(results: Sequence[Result]) -> str:
    """Return a table of token F1 and ROUGE-L by arm."""
    rows = []
    for cells in _by_arm(r for r in results if r["decoded"]).values():
        figures = ([100 * r["decoded"][key] for r in cells] for key in ("token_f1", "rouge_l"))
        rows.append([cells[0]["label"], len(cells), cells[0]["decoded"]["pairs"], *map(spread, figures)])
    return markdown(["arm", "seeds", "pairs", "token F1", "ROUGE-L"], rows) if rows else ""


def examples(results: Sequence[Result]) -> list[str]:
    """Return the best and the worst decoded queries of the first arm that reconstructs, first seed."""
    shown = next((r for r in results if r["decoded"] and r["with_before"]["steps"]), None)
    if shown is None:
        return []
    parts = []
    for name in ("best", "worst"):
        rows = [
            [_cell(e["reference"]), _cell(e["decoded"]), f"{100 * e['token_f1']:.0f}"]
            for e in shown["decoded"]["examples"][name]
        ]
        parts.append(f"The {len(rows)} {name} of {shown['decoded']['pairs']} ({shown['label']}, seed {shown['seed']}):")
        parts.append(markdown(["query", "decoded from its document's embedding", "token F1"], rows, texts=2))
    return parts


def _cell(text: str) -> str:
    """Return the text as one line that a Markdown table can hold."""
    line = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]], texts: int = 1) -> str:
    """Return a Markdown table; the first ``texts`` columns are text, the others numbers."""
    lines = [columns, ["---" if i < texts else "---:" for i in range(len(columns))], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
