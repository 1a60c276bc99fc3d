"""Files of a retrieval task of random texts."""

from pathlib import Path

import pytest
from conftest import english_pairs, write_jsonl

from anchor.data.retrieval_files import RETRIEVAL_README


def write_retrieval(folder: Path, seed: int = 0, pairs: int = 30) -> Path:
    """Write a retrieval task in MTEB's folder layout; the first ten texts have a query."""
    rows = english_pairs(pairs, seed=seed)
    write_jsonl(
        folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": r["positive"]} for i, r in enumerate(rows)]
    )
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": r["query"]} for i, r in enumerate(rows[:10])])
    write_jsonl(
        folder / "qrels/test.jsonl", [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(10)]
    )
    (folder / "README.md").write_text(RETRIEVAL_README)
    return folder


@pytest.fixture(scope="session")
def retrieval_folder(tmp_path_factory) -> Path:
    return write_retrieval(tmp_path_factory.mktemp("retrieval") / "small")
