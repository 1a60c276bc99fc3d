"""Invariants: negatives mined by an embedder are those of its own cosines, all at once and in blocks, also where scores
are equal; never a positive, never above the margin; torch is imported for this alone.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import english_pairs, write_jsonl
from sentence_transformers import SentenceTransformer

import data_prep.mining.dense as dense_module
from anchor.errors import ConfigError
from data_prep.__main__ import main
from data_prep.mining.mine import mine
from data_prep.mining.ranking import Window

ROOT = Path(__file__).parents[2]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def expected_of(folder: Path, rows: list[dict[str, Any]], window: Window) -> list[list[str]]:
    """Return the expected negatives from one product of all queries with all documents.

    Nothing is drawn: the window has as many ranks as negatives.
    """
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    documents = list(dict.fromkeys(text for row in rows for text in (row["positive"], *row["negative"])))
    queries = list(dict.fromkeys(row["query"] for row in rows))
    vectors = (
        function(texts, normalize_embeddings=True, show_progress_bar=False)
        for function, texts in ((model.encode_query, queries), (model.encode_document, documents))
    )
    left, right = vectors
    scores = dict(zip(queries, left @ right.T, strict=True))
    out = []
    for row in rows:
        known = {documents.index(other["positive"]) for other in rows if other["query"] == row["query"]}
        own = scores[row["query"]]
        limit = window.highest(min(own[i] for i in known))
        order = [
            i
            for i in sorted(range(len(documents)), key=lambda i: (-own[i], i))
            if i not in known and documents[i] != row["query"] and own[i] <= limit
        ]
        out.append([documents[i] for i in order[window.first_rank - 1 : window.last_rank]])
    return out


@pytest.mark.parametrize("blocks", [{}, {"_ENCODED_TEXTS": 7, "_BLOCK_DOCUMENTS": 11, "_BLOCK_SCORES": 300}])
@pytest.mark.parametrize("margins", [(None, None), (0.002, None), (None, 0.005)])
def test_negatives_are_those_of_the_models_cosines(
    tmp_path: Path,
    export_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    blocks: dict[str, int],
    margins: tuple[float | None, float | None],
) -> None:
    for name, value in blocks.items():
        monkeypatch.setattr(dense_module, name, value)
    rows = english_pairs(40)
    rows[5] = rows[5] | {"query": rows[2]["query"]}  # one query with two positives
    rows[7]["negative"].append(rows[8]["query"])  # a document that is a query
    file = write_jsonl(tmp_path / "s.jsonl", rows)
    window = Window(6, 3, 8, 0, *margins)
    report = mine(file, tmp_path / "out", window, as_json=True, model=export_dir)
    found = [row["negative"] for row in read(tmp_path / "out" / "s.jsonl")]
    expected = expected_of(export_dir, rows, window)
    assert found == expected
    assert any(expected)
    assert [report[name] for name in ("margin", "relative_margin", "model")] == [*margins, str(export_dir)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mine.json", "s.jsonl"]
    if margins != (None, None):
        assert found != expected_of(export_dir, rows, Window(6, 3, 8, 0))
    mine(file, tmp_path / "again", window, as_json=True, model=export_dir)
    assert (tmp_path / "again" / "s.jsonl").read_bytes() == (tmp_path / "out" / "s.jsonl").read_bytes()


class _Flat:
    """Embedder with few directions, so that many scores are equal."""

    device = "cpu"

    def get_embedding_dimension(self) -> int:
        return 2

    def encode_document(self, texts: list[str], **_: Any) -> np.ndarray:
        return np.asarray([[1.0, 0.0] if len(text) % 2 else [0.0, 1.0] for text in texts], dtype=np.float32)

    encode_query = encode_document


def test_equal_scores_are_ranked_by_the_order_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.mining.mine.load_model", lambda *_: _Flat())
    rows = [{"query": "q", "positive": "a" * (2 + i), "negative": []} for i in range(0, 60, 2)]
    rows = [row | {"query": f"{i:03}"} for i, row in enumerate(rows)]  # odd queries, even documents
    rows += [{"query": "other", "positive": "b" * (1 + i), "negative": []} for i in range(0, 60, 2)]
    file = write_jsonl(tmp_path / "s.jsonl", rows)
    mine(file, tmp_path / "out", Window(4, 2, 5, 0), as_json=True, model=tmp_path)
    found = read(tmp_path / "out" / "s.jsonl")
    assert found[3]["negative"] == ["b" * (1 + i) for i in (2, 4, 6, 8)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "{tmp}"], "--model {tmp}: not a sentence-transformers folder, it has no modules.json"),
        (["--model", "{model}", "--device", "tpu9"], "--device tpu9: cannot be used: "),
    ],
)
def test_a_wrong_model_or_device_is_refused(
    tmp_path: Path, export_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    file = write_jsonl(tmp_path / "s.jsonl", english_pairs(3))
    filled = [one.format(tmp=tmp_path, model=export_dir) for one in arguments]
    with pytest.raises(SystemExit) as stop:
        main(["mine", str(file), "--output", str(tmp_path / "o"), "--negatives", "1", "--ranks", "1-2", *filled])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: " + expected.format(tmp=tmp_path))
    assert not (tmp_path / "o").exists()


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"^--model .*: cannot be loaded: "):
        dense_module.load_model(tmp_path, "cpu")


def test_bm25_needs_no_torch(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "s.jsonl", english_pairs(8))
    program = "import sys; sys.modules['torch'] = None; from data_prep.__main__ import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "mine", str(file), "--output", str(tmp_path / "o"), "--negatives", "1"]
    done = subprocess.run([*command, "--ranks", "1-4"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(len(row["negative"]) == 1 for row in read(tmp_path / "o" / "s.jsonl"))
