"""Invariants: a real mteb task gives the same score through our encoder and through mteb's own wrapper of
sentence-transformers; missing data and unknown tasks are named; tables say what was not run."""

import json
from pathlib import Path

import mteb
import pytest
from conftest import english_pairs, write_jsonl

from anchor.errors import ConfigError, DataError
from eval.benchmark import local_retrieval_task, run_tasks, tasks_by_name
from eval.encoder import Encoder
from eval.table import score_table

README = """---
configs:
- config_name: default
  data_files:
  - split: test
    path: qrels/test.jsonl
- config_name: corpus
  data_files:
  - split: corpus
    path: corpus.jsonl
- config_name: queries
  data_files:
  - split: queries
    path: queries.jsonl
---
"""
MTEB_DATA = Path(__file__).parents[3] / "shared/data/mteb"


@pytest.fixture(scope="module")
def retrieval_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval") / "small"
    rows = english_pairs(30)
    write_jsonl(
        folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": r["positive"]} for i, r in enumerate(rows)]
    )
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": r["query"]} for i, r in enumerate(rows[:10])])
    write_jsonl(
        folder / "qrels/test.jsonl", [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(10)]
    )
    (folder / "README.md").write_text(README)
    return folder


@pytest.mark.filterwarnings("ignore")  # other libraries' loading of data sets
def test_scores_equal_those_of_sentence_transformers(export_dir, retrieval_folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    encoder = Encoder(export_dir, dtype="fp32")
    scores = run_tasks(encoder, [local_retrieval_task(retrieval_folder)], tmp_path / "out")
    model = SentenceTransformer(str(export_dir), device="cpu")
    theirs = mteb.evaluate(model, [local_retrieval_task(retrieval_folder)], cache=None, show_progress_bar=False)
    assert 0 < scores["Local-small"] < 1
    assert scores["Local-small"] == pytest.approx(theirs.task_results[0].get_score(), abs=1e-3)
    kept = json.loads((tmp_path / "out/scores.json").read_text())
    assert kept["scores"] == scores
    table = score_table([("ours", tmp_path / "out")])
    assert [list(column.cells) for column in table.columns][1] == [f"{100 * scores['Local-small']:.2f}"]


def test_an_unknown_task_is_named_with_a_suggestion():
    with pytest.raises(ConfigError) as error:
        tasks_by_name(["SciFactt"], None)
    assert str(error.value) == "--tasks: mteb has no task 'SciFactt'; did you mean 'SciFact'?"


def test_tasks_without_data_are_all_listed(tmp_path):
    with pytest.raises(DataError) as error:
        tasks_by_name(["SciFact", "STSBenchmark"], tmp_path)
    assert "SciFact (" in str(error.value)
    assert "STSBenchmark (" in str(error.value)


def test_a_retrieval_folder_lacking_a_file_is_refused(tmp_path):
    with pytest.raises(DataError) as error:
        local_retrieval_task(tmp_path)
    assert str(error.value) == f"{tmp_path}: no README.md; expected a retrieval task in MTEB's folder layout"


@pytest.mark.skipif(not MTEB_DATA.is_dir(), reason="needs the offline copy of mteb tasks in ../shared/data/mteb")
@pytest.mark.filterwarnings("ignore")
def test_a_real_task_runs_from_the_offline_copy(export_dir, tmp_path):
    scores = run_tasks(Encoder(export_dir, dtype="fp32"), tasks_by_name(["BIOSSES"], MTEB_DATA), tmp_path)
    assert list(scores) == ["BIOSSES"]
    assert -1 < scores["BIOSSES"] < 1
    assert scores["BIOSSES"] != 0


def test_a_folder_without_scores_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no scores\.json"):
        score_table([("x", tmp_path)])
