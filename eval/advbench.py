"""AdvBench-IR: does an embedder find harmful passages for harmful queries? Lower is safer.

The paper's set (BehnamGhader et al. 2025) is two hub repositories, read from their offline copies: ``AdvBench-IR`` with
rows ``ID, query, title, document`` and ``AdvBench-IR-Small-Wiki-100`` with rows ``ID, title, passage``.

1. A document is cut into passages of 100 words; a last one that is shorter is dropped unless it is the only one.
2. A passage's text is ``title # words``; benign Wikipedia passages join the corpus in the same form.
3. A query is answered by the passages of its own document; the score is the share of queries with one of them among
   the first k: ``hit_rate_at_k``, main score at 5.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from anchor.data.datasets_errors import datasets_line
from anchor.errors import DataError, did_you_mean
from eval.local_data import distinct_path

ADVBENCH = "AdvBench-IR"
PASSAGE_WORDS = 100


def own_metadata(name: str, path: str, revision: str = "local", **changes: Any) -> TaskMetadata:
    """mteb's description of a retrieval task that is not its own.

    Args:
        name: of the task.
        path: where its data is.
        revision: of the data.
        changes: replace fields.
    """
    fields: dict[str, Any] = {
        "name": name,
        "dataset": {"path": path, "revision": revision},
        "description": "A retrieval task from a local folder.",
        "type": "Retrieval",
        "category": "t2t",
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
        "main_score": "ndcg_at_10",
    }
    unknown = ("reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect")
    nothing = dict.fromkeys((*unknown, "sample_creation", "bibtex_citation"))
    return TaskMetadata(**{**nothing, **fields, **changes})


def passages(document: dict[str, Any]) -> list[str]:
    """Texts of a harmful document's passages."""
    words = document["document"].split()
    starts = range(0, max(1, len(words)), PASSAGE_WORDS)
    pieces = [words[start : start + PASSAGE_WORDS] for start in starts]
    kept = [piece for number, piece in enumerate(pieces) if number == 0 or len(piece) == PASSAGE_WORDS]
    return [f"{document['title']} # {' '.join(piece)}" for piece in kept]


class AdvBenchIR(AbsTaskRetrieval):
    """The task; its data must be an offline copy, see :func:`eval.tasks.with_data`."""

    hub_paths = ("McGill-NLP/AdvBench-IR", "McGill-NLP/AdvBench-IR-Small-Wiki-100")
    metadata = own_metadata(
        ADVBENCH,
        hub_paths[0],
        description="Harmful queries against harmful and benign passages; lower is safer.",
        main_score="hit_rate_at_5",
    )

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Read both folders and build corpus, queries and relevant passages."""
        if self.data_loaded:
            return
        folder = Path(self.metadata.dataset["path"])
        harmful = _rows(folder, ("ID", "query", "title", "document"))
        benign = _rows(folder.with_name(Path(self.hub_paths[1]).name), ("ID", "title", "passage"))
        corpus: dict[str, str] = {}
        relevant: dict[str, dict[str, int]] = {}
        for row in harmful:
            for number, text in enumerate(passages(row)):
                corpus[f"malicious_{row['ID']}-{number}"] = text
                relevant.setdefault(str(row["ID"]), {})[f"malicious_{row['ID']}-{number}"] = 1
        corpus.update({f"wiki_{row['ID']}": f"{row['title']} # {row['passage']}" for row in benign})
        queries = {str(row["ID"]): row["query"] for row in harmful}
        self.dataset = {
            "default": {
                "test": {
                    "corpus": _table(corpus),
                    "queries": _table(queries),
                    "relevant_docs": relevant,
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True


def _table(texts: dict[str, str]) -> Dataset:
    return Dataset.from_dict({"id": list(texts), "text": list(texts.values())})


def _rows(folder: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a folder of JSON lines, CSV or Parquet.

    Raises:
        DataError: unreadable, or a field is missing.
    """
    try:
        table = load_dataset(str(distinct_path(folder)), split="train")
    except (FileNotFoundError, ValueError, DatasetGenerationError) as error:
        raise DataError(f"{folder}: not readable as a data set: {datasets_line(error)}") from error
    for field in fields:
        if field not in table.column_names:
            raise DataError(f"{folder}: no field '{field}'{did_you_mean(field, table.column_names)}")
    return table.to_list()
