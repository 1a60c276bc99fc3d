"""``python -m eval report``: write one offline HTML file from run and result folders.

The page has no scripts and loads nothing: figures are inline SVG, and its content security policy forbids the rest.
It follows the reader's light or dark setting and fits a phone. Everything that scrolls or opens works by keyboard.
"""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from mteb.benchmarks.benchmark import Benchmark

from anchor.encoding.encoder import TextEncoder
from anchor.errors import ConfigError
from eval.decode import check_output
from eval.reporting.plots import curves, shown
from eval.reporting.report_data import Run, commit_of, final_values, look_at_labels, look_at_pairs, read_decoded
from eval.reporting.table import absent_line, published, summarise, task_results
from eval.scoring.advbench import ADVBENCH

_CURVES = (
    ("loss/total_nats", "Loss", "loss (nats)", False),
    ("optim/grad_norm", "Gradient norm", "gradient norm", True),
    (None, "Throughput", "tokens per second", False),
    ("memory/peak_gib", "Peak memory", "peak memory (GiB)", False),
    ("held_out/loss_total_nats", "Held-out loss", "held-out loss (nats)", False),
    ("held_out/ndcg_at_10", "Held-out retrieval", "held-out nDCG@10", False),
    (
        "held_out/dependence_document_to_query_nats",
        "Use of the document's embedding",
        "cost of a wrong document (nats per token of the query)",
        False,
    ),
    (
        "held_out/dependence_query_to_document_nats",
        "Use of the query's embedding",
        "cost of a wrong query (nats per token of the document)",
        False,
    ),
)


@dataclass(frozen=True, slots=True)
class Looks:
    """Inputs of the report's sections on a model's embeddings.

    Attributes:
        encoder: the model; None leaves these sections out, except decoded texts.
        pairs: query-document pairs for the similarities and neighbours.
        labelled: texts with labels for the map.
        decoded: output file of ``eval decode``.
    """

    encoder: TextEncoder | None = None
    pairs: Path | None = None
    labelled: Path | None = None
    decoded: Path | None = None


def write_report(
    runs: Sequence[Run],
    output: Path,
    *,
    title: str = "Anchor report",
    benchmark: Benchmark | None = None,
    looks: Looks | None = None,
    overwrite: bool = False,
) -> None:
    """Write the page.

    Args:
        runs: from :func:`eval.reporting.report_data.read_run`; labels must differ.
        output: the HTML file.
        title: title of the page.
        benchmark: also show its categories and averages, next to published rows.
        looks: inputs of the sections on embeddings.
        overwrite: replace the file.

    Raises:
        ConfigError: the file exists, two runs have the same label, or ``benchmark`` is given without results.
    """
    check_output(output, overwrite=overwrite)
    labels = [run.label for run in runs]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"eval report: two folders are called '{label}'; name them: LABEL=DIR")
    looks = looks or Looks()
    context: dict[str, Any] = {
        "title": title,
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": [{"run": run, "final": final_values(run), "commit": commit_of(run)} for run in runs],
        "figures": _figures(runs),
        "scores": _scores(runs),
        "benchmark": _benchmark(runs, benchmark) if benchmark is not None else None,
        "pairs": None,
        "map": None,
        "decoded": read_decoded(looks.decoded) if looks.decoded is not None else [],
    }
    if looks.encoder is not None and looks.pairs is not None:
        look = look_at_pairs(looks.encoder, looks.pairs)
        context["pairs"] = {"figure": Markup(look.figure), "caption": look.caption, "neighbours": look.neighbours}  # noqa: S704 - our own SVG
    if looks.encoder is not None and looks.labelled is not None:
        figure, caption = look_at_labels(looks.encoder, looks.labelled)
        context["map"] = {"figure": Markup(figure), "caption": caption}  # noqa: S704 - our own SVG
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: shown(value) if type(value) is str else value,
    )
    page = environment.get_template("report.html.j2").render(context)
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(output.name + ".tmp")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, output)


def _figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    figures = []
    for name, title, unit, log in _CURVES:
        series = {run.label: run.column(name) if name is not None else run.throughput() for run in runs}
        series = {label: line for label, line in series.items() if line[0]}
        if not series:
            continue
        log_scale = log and all(value > 0 for _, values in series.values() for value in values)
        last = "; ".join(f"{label}: {values[0]:,.4g} to {values[-1]:,.4g}" for label, (_, values) in series.items())
        svg = Markup(curves(series, unit, log=log_scale))  # noqa: S704 - our own SVG
        figures.append(
            {"title": title, "svg": svg, "caption": f"{unit[0].upper()}{unit[1:]}, first to last step: {last}."}
        )
    return figures


def _scores(runs: Sequence[Run]) -> dict[str, Any] | None:
    scored = [run for run in runs if run.scores]
    if not scored:
        return None
    tasks = sorted({task for run in scored for task in run.scores})
    rows = []
    for task in tasks:
        values = [run.scores.get(task) for run in scored]
        best = (min if task in _LOWER_IS_BETTER else max)(value for value in values if value is not None)
        cells = [("not run" if v is None else f"{100 * v:.2f}", v == best and len(scored) > 1) for v in values]
        rows.append((task, cells))
    return {"labels": [run.label for run in scored], "rows": rows}


def _benchmark(runs: Sequence[Run], benchmark: Benchmark) -> dict[str, Any]:
    summaries = {run.label: summarise(benchmark, task_results(run.results)) for run in runs if run.results is not None}
    if not summaries:
        raise ConfigError("eval report: --benchmark needs at least one folder with results of `eval mteb`")
    columns = list(next(iter(summaries.values())).values)
    rows = [(label, [_cell(summary.values[c]) for c in columns]) for label, summary in summaries.items()]
    known = published(benchmark.name) if benchmark.name in _PUBLISHED else {}
    baselines = [(label, [_cell(row.get(column)) for column in columns]) for label, row in known.items()]
    notes = [absent_line(label, summary) for label, summary in summaries.items()]
    return {
        "name": benchmark.name,
        "columns": columns,
        "rows": rows,
        "baselines": baselines,
        "notes": [note for note in notes if note is not None],
    }


_LOWER_IS_BETTER = (ADVBENCH,)
_PUBLISHED = ("MTEB(eng, v1)", "MTEB(eng, v2)", "lite")


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
