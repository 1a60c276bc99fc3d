"""Collect a report's data: training curves and provenance of runs, scores, and views of a model's embeddings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float
from sklearn.manifold import TSNE

from anchor.data import row_files as files
from anchor.encoding.encoder import TextEncoder
from anchor.errors import ConfigError, DataError, first_line
from eval.decode import read_pairs
from eval.embedding.texts import check_field, iterate_rows, read_rows
from eval.reporting.plots import histogram, scatter
from eval.reporting.table import main_scores
from eval.scoring.retrieval_folder import read_judgements

MAX_TEXTS = 500
"""Most texts or pairs to embed for a figure: enough for a picture, quick on a CPU."""
_SHORT = 240
_LARGEST = 1 << 63
"""Largest integer accepted in the metrics; figures cannot show more."""


@dataclass(frozen=True, slots=True)
class Run:
    """Content of a run or result folder.

    Attributes:
        label: name shown in the report.
        folder: path of the folder.
        metrics: rows of ``metrics.jsonl``.
        held_out: rows of ``held_out.jsonl``.
        provenance: text of ``run.yaml``, or None.
        scores: main score of each task, 0 to 1.
        results: folder of the scores, or None.
    """

    label: str
    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    provenance: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    results: Path | None = None

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Return the steps and values of a metric, from the rows that have it."""
        rows = [row for row in (*self.metrics, *self.held_out) if _is_number(row.get(name))]
        return [row["step"] for row in rows], [float(row[name]) for row in rows]

    def throughput(self) -> tuple[list[float], list[float]]:
        """Return the steps and the tokens per second."""
        wanted = ("data/tokens", "time/step_seconds")
        rows = [row for row in self.metrics if all(_is_number(row.get(name)) and row[name] for name in wanted)]
        return [row["step"] for row in rows], [row[wanted[0]] / row[wanted[1]] for row in rows]


def read_run(item: str) -> Run:
    """Read a folder, given as ``DIR`` or ``LABEL=DIR``.

    The folder is a run (``metrics.jsonl``), results (``scores.json``), or a run with results below it.

    Raises:
        ConfigError: the folder is missing or holds nothing to report.
        DataError: a file is unreadable.
    """
    label, equals, path = item.partition("=") if not _is_folder(item) else ("", "", "")
    folder = Path(path if equals else item)
    if not _is_folder(folder):
        raise ConfigError(f"{folder}: no such folder; expected a run or a result folder")
    places = [folder, folder / "mteb", folder / "export" / "mteb"]
    results = next((place for place in places if (place / "scores.json").is_file()), None)
    metrics = folder / "metrics.jsonl"
    if results is None and not metrics.is_file():
        raise ConfigError(
            f"{folder}: neither metrics.jsonl nor scores.json; expected a run or an output of `eval mteb`"
        )
    rows = _metrics(metrics)
    run_yaml = folder / "run.yaml"
    return Run(
        label=label if equals else _label(folder),
        folder=folder,
        metrics=rows,
        held_out=_metrics(folder / "held_out.jsonl"),
        provenance=_text(run_yaml) if run_yaml.is_file() else None,
        scores=main_scores(results) if results is not None else {},
        results=results,
    )


def _metrics(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file, empty without a file; drop a half-written last line of a killed run."""
    found = list(files.read_rows(file)) if file.is_file() else []
    if found and found[-1].problem is not None and not str(found[-1].value).endswith("\n"):
        found.pop()
    for row in found:
        expected = "expected the metrics of a run"
        if row.problem is not None:
            raise DataError(f"{row.place}: {row.problem}; {expected}")
        step = row.value.get("step") if isinstance(row.value, dict) else None
        for name, value in row.value.items() if step is not None else ():
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise DataError(f"{row.place}: '{name}' is a number of {len(str(abs(value)))} digits; {expected}")
        if step is None or not _is_number(step) or not math.isfinite(step):
            raise DataError(f"{row.place}: a row without a 'step' that is a number; {expected}")
    return [row.value for row in found]


def _is_folder(path: Path | str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # the name is too long
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8: byte {error.start + 1} is 0x{error.object[error.start]:02x}") from error


def final_values(run: Run) -> dict[str, str]:
    """Return the last step, last loss, median throughput and peak memory, as text."""
    out: dict[str, str] = {}
    for name, key, unit in (("steps", "step", ""), ("loss", "loss/total_nats", " nats")):
        _, values = run.column(key)
        if values:
            out[name] = f"{values[-1]:,.4g}{unit}"
    _, speeds = run.throughput()
    if speeds:
        out["median speed"] = f"{float(np.median(speeds)):,.0f} tokens/s"
    _, memory = run.column("memory/peak_gib")
    if memory:
        out["peak memory"] = f"{max(memory):.2f} GiB"
    return out


def commit_of(run: Run) -> str:
    """Return the commit from a run's provenance, or a dash.

    Raises:
        DataError: ``run.yaml`` is not readable as YAML.
    """
    try:
        about = yaml.safe_load(run.provenance) if run.provenance else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{run.folder / 'run.yaml'}: not readable: {first_line(error)}") from error
    return str(about.get("commit") or "–") if isinstance(about, dict) else "–"


@dataclass(frozen=True, slots=True)
class PairsLook:
    """Similarities and neighbours of query-document pairs.

    Attributes:
        figure: SVG histogram of positives and negatives.
        caption: numbers behind the figure.
        neighbours: for each listed query: its text, the rank of its document, and the nearest documents as
            ``(text, cosine, is positive)``.
    """

    figure: str
    caption: str
    neighbours: list[tuple[str, int, list[tuple[str, float, bool]]]]


def look_at_pairs(encoder: TextEncoder, path: Path, shown: int = 6) -> PairsLook:
    """Embed pairs and compare each query with all documents.

    Every other document is a negative, unless its text equals the positive's.

    Args:
        encoder: the model.
        path: JSON lines with ``query`` and ``positive``, or a retrieval folder in MTEB's or BEIR's layout.
        shown: number of queries to list neighbours for.

    Raises:
        ConfigError: no such file.
        DataError: malformed input, or pairs that give no negative.
    """
    pairs = (retrieval_pairs(path) if path.is_dir() else read_pairs(path))[:MAX_TEXTS]
    queries, documents = ([pair[side] for pair in pairs] for side in (0, 1))
    similar = encoder.encode(queries, encoder.prompts.get("query", "")) @ (
        encoder.encode(documents, encoder.prompts.get("document", "")).T
    )
    same = np.asarray(documents)[:, None] == np.asarray(documents)[None]
    positives, negatives = np.diag(similar), similar[~same]
    if not len(negatives):
        raise DataError(f"{path}: {len(pairs)} pairs give no negative; give pairs of different documents")
    ranks = 1 + ((similar > positives[:, None]) & ~same).sum(axis=1)
    caption = (
        f"{len(pairs)} pairs. Mean cosine {positives.mean():.3f} of positives, {negatives.mean():.3f} of negatives; "
        f"the positive is the nearest document for {100 * (ranks == 1).mean():.1f} % of the queries."
    )
    chosen = np.linspace(0, len(pairs) - 1, min(shown, len(pairs))).astype(int)
    neighbours = []
    for i in chosen:
        best = _distinct(np.argsort(-similar[i]), documents, 3)
        rows = [(_short(documents[j]), float(similar[i, j]), bool(same[i, j])) for j in best]
        neighbours.append((_short(queries[i]), int(ranks[i]), rows))
    groups = {"positives": positives, "negatives": negatives[:: max(1, len(negatives) // 20000)]}
    return PairsLook(histogram(groups, "cosine similarity"), caption, neighbours)


def look_at_labels(encoder: TextEncoder, path: Path) -> tuple[str, str]:
    """Return a 2-D map (t-SNE) of labelled texts, as SVG, and its caption.

    Args:
        encoder: the model.
        path: JSON lines with ``text`` and ``label``.

    Raises:
        ConfigError: no such file.
        DataError: malformed rows, or fewer than eight texts.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected JSON lines with 'text' and 'label'")
    rows = read_rows(path, {"text": str, "label": object})
    rows = rows[:: max(1, len(rows) // MAX_TEXTS)][:MAX_TEXTS]
    if len(rows) < 8:
        raise DataError(f"{path}: {len(rows)} texts are too few for a map; give at least 8")
    points = flat_map(encoder.encode([row["text"] for row in rows], encoder.prompts.get("document", "")))
    labels = [str(row["label"]) for row in rows]
    return scatter(points, labels), f"{len(rows)} texts in {len(set(labels))} groups; t-SNE of cosine distances."


def flat_map(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N 2"]:
    """Return a deterministic t-SNE map of the vectors."""
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    return TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=0).fit_transform(vectors)


def retrieval_pairs(folder: Path) -> list[tuple[str, str]]:
    """Return ``(query, document)`` text pairs for a retrieval folder's positive test judgements.

    Raises:
        DataError: a file is missing or malformed.
    """
    judgements = [(one.query, one.document) for one in read_judgements(folder) if one.score > 0]
    queries, corpus = (
        read_rows(folder / name, {"_id": object, "text": str}) for name in ("queries.jsonl", "corpus.jsonl")
    )
    query = {str(row["_id"]): row["text"] for row in queries}
    document = {str(row["_id"]): f"{row.get('title') or ''} {row['text']}".strip() for row in corpus}
    return [(query[q], document[d]) for q, d in dict.fromkeys(judgements) if q in query and d in document]


def read_decoded(path: Path, shown: int = 20) -> list[dict[str, Any]]:
    """Return the first ``shown`` rows of an output file of ``eval decode``.

    Raises:
        ConfigError: no such file.
        DataError: a row is malformed.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected the --output of `python -m eval decode`")
    rows = []
    for where, row in iterate_rows(path, {"source": str, "decoded": str}, shown):
        for name, kind in (("direction", str), ("reference", str), ("rouge_l", float)):
            if name in row:
                check_field(where, row, name, kind)
        rows.append({**row, "source": _short(row["source"])})
    return rows


def _label(folder: Path) -> str:
    path = folder.resolve()
    while path.name in ("mteb", "export"):
        path = path.parent
    return path.name


def _distinct(order: np.ndarray, texts: Sequence[str], number: int) -> list[int]:
    seen: dict[str, int] = {}
    for j in order:
        seen.setdefault(texts[int(j)], int(j))
        if len(seen) == number:
            break
    return list(seen.values())


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else text[:_SHORT].rstrip() + " …"
