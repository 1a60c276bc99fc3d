"""Invariants: a retrieval folder is read as it is now, needs no README.md and is not written to; a row that cannot be
used is named."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import english_pairs, write_jsonl
from retrieval import write_retrieval

from anchor.encoding.encoder import Encoder
from anchor.errors import DataError
from eval.__main__ import main
from eval.reporting.report_data import retrieval_pairs
from eval.scoring.benchmark import run_tasks
from eval.scoring.tasks import local_retrieval_task


def test_a_folder_is_read_as_it_is_now_not_as_one_of_its_name_was_before(tmp_path):
    """Regression: the `datasets` library used the copy it had prepared of an earlier folder with the same name."""

    def documents(folder: Path) -> list[str]:
        task = local_retrieval_task(folder)
        task.load_data()
        return list(task.dataset["default"]["test"]["corpus"]["text"])

    folders = [write_retrieval(tmp_path / place / "small", seed) for seed, place in enumerate("ab")]
    for seed, folder in enumerate(folders):
        assert documents(folder) == [row["positive"] for row in english_pairs(30, seed=seed)]
    write_retrieval(folders[1], seed=2, pairs=40)
    assert documents(folders[1]) == [row["positive"] for row in english_pairs(40, seed=2)]


def test_a_retrieval_folder_needs_no_readme_and_gets_none(retrieval_folder, tmp_path):
    bare = Path(shutil.copytree(retrieval_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("README.md")))
    before = sorted(tmp_path.rglob("*"))

    def read(folder: Path) -> list[list]:
        task = local_retrieval_task(folder)
        task.load_data()
        parts = task.dataset["default"]["test"]
        return [list(parts["corpus"]), list(parts["queries"]), sorted(parts["relevant_docs"].items())]

    assert read(bare) == read(retrieval_folder)
    assert all(len(part) >= 10 for part in read(bare))
    write_retrieval(bare, seed=3)
    (bare / "README.md").unlink()
    assert read(bare)[0] != read(retrieval_folder)[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_two_local_tasks_of_one_name_are_refused(retrieval_folder, tmp_path, capsys):
    other = write_retrieval(tmp_path / "small")
    with pytest.raises(SystemExit) as stop:
        main(["mteb", "nowhere", "--retrieval", str(retrieval_folder), "--retrieval", str(other)])
    assert stop.value.code == 2
    assert "two --retrieval folders have one name, and results go by it; rename one" in capsys.readouterr().err


def test_a_retrieval_folder_lacking_a_file_is_refused(tmp_path):
    with pytest.raises(DataError) as error:
        local_retrieval_task(tmp_path)
    assert str(error.value) == f"{tmp_path}: no corpus.jsonl; expected a retrieval task in MTEB's folder layout"
    (write_retrieval(tmp_path) / QRELS).unlink()
    with pytest.raises(DataError) as error:
        local_retrieval_task(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: no qrels/test.jsonl (or BEIR's qrels/test.tsv); expected")


CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels/test.jsonl"
JUDGED = '{"query-id": "q0", "corpus-id": "d0", "score": %s}'


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (CORPUS, '{"_id": "d0", "title": ""}', ":1: no field 'text' with a text; known are _id, title"),
        (CORPUS, '{"_id": "d0", "title": "", "text": ', ":1: malformed JSON: Expecting value at character 37"),
        (CORPUS, '{"title": "", "text": "a"}', ":1: no field '_id'; known are text, title"),
        (CORPUS, '{"_id": "d1", "title": "", "text": "a"}', ":2: the _id 'd1' is given twice; ids must differ"),
        (CORPUS, '{"_id": 1.5, "title": "", "text": "a"}', ":1: the _id is 1.5; expected a text or a whole number"),
        (CORPUS, '{"_id": "d0", "text": "a"}', ":2: a title must be a text, in all rows or in none"),
        (CORPUS, '{"_id": "d0", "title": null, "text": "a"}', ":1: a title must be a text, in all rows or in none"),
        (QUERIES, '{"_id": "q0", "text": null}', ":1: 'text' is null; expected a text"),
        (QUERIES, None, ": holds no row"),
        (QRELS, None, ": holds no row"),
        (QRELS, '{"query-id": "q0", "corpus-id": "d77", "score": 1}', ":1: corpus-id 'd77' is not in corpus.jsonl"),
        (QRELS, '{"query-id": 0, "corpus-id": "d0", "score": 1}', ":1: query-id '0' is not in queries.jsonl"),
        (QRELS, '{"query-id": "q0", "score": 1}', ":1: no field 'corpus-id'; known are query-id, score"),
        (
            QRELS,
            JUDGED % 1 + "\n" + JUDGED % 0,
            ":2: query 'q0' and document 'd0' have score 0, and 1 at {file}:1; remove one",
        ),
        (QRELS, JUDGED % '"1"', ":1: 'score' is '1'; expected a number"),
        (QRELS, JUDGED % "Infinity", ":1: the score is inf; expected a whole number"),
        (QRELS, JUDGED % "0.5", ":1: the score is 0.5; expected a whole number"),
    ],
)
def test_a_row_of_a_retrieval_folder_that_cannot_be_used_is_named(tmp_path, name, line, message):
    """Regression: such rows gave errors of other libraries, or a score of 0."""
    file = write_retrieval(tmp_path / "small") / name
    rest = file.read_text().splitlines()[1:] if line is not None else []
    file.write_text("".join(f"{one}\n" for one in ([] if line is None else [line, *rest])))
    with pytest.raises(DataError) as error:
        local_retrieval_task(tmp_path / "small")
    assert str(error.value) == f"{file}{message.format(file=file)}"


def beir(folder: Path) -> Path:
    """The same task in the layout of BEIR's own downloads, metadata included."""
    for name in (CORPUS, QUERIES):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        write_jsonl(folder / name, [row | {"metadata": {f"m{i}": [i]} if i % 2 else {}} for i, row in enumerate(rows)])
    judged = [json.loads(line) for line in (folder / QRELS).read_text().splitlines()]
    lines = ["\t".join(judged[0]), *("\t".join(map(str, row.values())) for row in judged)]
    (folder / "qrels/test.tsv").write_text("\n".join(lines) + "\n")
    (folder / QRELS).unlink()
    (folder / "README.md").unlink()
    return folder


def test_a_folder_of_beir_is_the_same_task(tmp_path):
    """Regression: its qrels/test.tsv was refused, without advice on how to convert it."""

    def read(folder: Path) -> list[list]:
        task = local_retrieval_task(folder)
        task.load_data()
        parts = task.dataset["default"]["test"]
        return [list(parts["corpus"]), list(parts["queries"]), sorted(parts["relevant_docs"].items())]

    folder = beir(write_retrieval(tmp_path / "a/small"))
    before = sorted(tmp_path.rglob("*"))
    assert read(folder) == read(write_retrieval(tmp_path / "b/small"))
    assert sorted((tmp_path / "a").rglob("*")) == [one for one in before if "a" in one.relative_to(tmp_path).parts][1:]
    assert retrieval_pairs(folder) == retrieval_pairs(tmp_path / "b/small")
    assert len(retrieval_pairs(folder)) == 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q0\td0\t0", ":13: query 'q0' and document 'd0' have score 0, and 1 at {file}:2; remove one"),
        ("q0\td1\thigh", ":13: the score is high; expected a whole number"),
        ("q0\td1", ":13: 2 fields, the header has 3"),
        ("q0\td99\t1", ":13: corpus-id 'd99' is not in corpus.jsonl"),
        ("\td1\t1", ":13: the query-id is None; expected a text or a whole number"),
    ],
)
def test_a_judgement_of_beir_that_cannot_be_used_is_named(tmp_path, line, message):
    file = beir(write_retrieval(tmp_path / "small")) / "qrels/test.tsv"
    file.write_text(f"{file.read_text()}q0\td0\t1\n{line}\n")  # equal judgements may be given twice
    with pytest.raises(DataError) as error:
        local_retrieval_task(tmp_path / "small")
    assert str(error.value) == f"{file}{message.format(file=file)}"


@pytest.mark.filterwarnings("ignore")
def test_ids_may_be_numbers_and_lines_blank_in_a_retrieval_folder(export_dir, tmp_path):
    encoder, named, numbered = Encoder(export_dir, dtype="fp32"), tmp_path / "a/small", tmp_path / "b/small"
    for folder in (named, numbered):
        write_retrieval(folder, pairs=12)
    for name in (CORPUS, QUERIES, QRELS):
        text = re.sub(r'"[qd](\d+)"', r"\1", (numbered / name).read_text())
        (numbered / name).write_text(text.replace("\n", "\n\n", 1) + "\n")
    scores = [run_tasks(encoder, [local_retrieval_task(one)], tmp_path / one.parent.name) for one in (named, numbered)]
    assert scores[0] == scores[1]
    assert scores[0]["Local-small"] > 0
