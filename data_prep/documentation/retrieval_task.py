"""Writer of retrieval tasks in MTEB's folder layout, which ``eval mteb --retrieval`` scores."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from anchor.data.retrieval_files import RETRIEVAL_README


def write_retrieval_task(
    folder: Path, documents: Mapping[str, str], queries: Mapping[str, str], relevant: Mapping[str, str]
) -> None:
    """Write ``README.md``, ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/test.jsonl``.

    Args:
        folder: existing or new folder; files are overwritten.
        documents, queries: texts by id. Give a query and its document different ids, so that no evaluator can match
            them by id.
        relevant: id of the one relevant document, by query id.
    """
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(RETRIEVAL_README, encoding="utf-8")
    write_jsonl(folder / "corpus.jsonl", ({"_id": i, "title": "", "text": text} for i, text in documents.items()))
    write_jsonl(folder / "queries.jsonl", ({"_id": i, "text": text} for i, text in queries.items()))
    qrels = ({"query-id": query, "corpus-id": document, "score": 1} for query, document in relevant.items())
    write_jsonl(folder / "qrels" / "test.jsonl", qrels)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines in UTF-8, without escaping non-ASCII characters."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
