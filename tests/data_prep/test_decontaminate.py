"""Invariants: a pair that repeats an evaluation text is counted for its task and left out; every other line stays as it
was; nothing is written over.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import english_pairs, write_jsonl

from anchor.errors import AnchorError, ConfigError, DataError
from data_prep.__main__ import main
from data_prep.decontamination.decontaminate import decontaminate, evaluation_texts

LONG = " ".join(f"word{i}" for i in range(40))


def run(pairs: Path, *against: Path, output: Path | None = None, **changes: Any) -> dict[str, Any]:
    settings = {"overlap": 0.5, "ngram_words": 13, "min_words": 3, "examples": 2, "as_json": True}
    return decontaminate(pairs, against, output, **(settings | changes))


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    """A retrieval task, a file of sentence pairs in Parquet, and a text file."""
    folder = tmp_path / "mteb" / "fact"
    write_jsonl(folder / "corpus.jsonl", [{"_id": "the id of it", "title": "Rivers", "text": LONG}])
    write_jsonl(folder / "queries.jsonl", [{"_id": "q1", "text": "Where does the river end?"}])
    write_jsonl(folder / "qrels" / "test.jsonl", [{"query-id": "a b c d", "corpus-id": "the id of it", "score": 1}])
    (folder / "README.md").write_text("a b c d e f g")
    sts = tmp_path / "mteb" / "sts" / "data"
    sts.mkdir(parents=True)
    rows = [{"sentence1": "A man rides a horse.", "sentence2": ["A horse is ridden."], "score": 4.0}]
    pq.write_table(pa.Table.from_pylist(rows), sts / "test.parquet")
    text = tmp_path / "mteb" / "lines.txt"
    text.write_text("one line of text\n\nwhere does the river END\n", encoding="utf-8")
    return [folder, tmp_path / "mteb" / "sts", text]


def test_matching_pairs_are_counted_per_task_and_left_out(tmp_path: Path, tasks: list[Path]) -> None:
    rows: list[dict[str, Any]] = [{**row, "other": "kept"} for row in english_pairs(30)]
    rows[3]["query"] = "where does the river end"
    rows[4]["positive"] = f"Before it. {LONG} After it."
    rows[5] = {"query": "A horse is ridden", "positive": "a man, rides: a horse", "negative": []}
    rows[6]["negative"] = [LONG]  # hard negatives are not looked at
    rows[7]["query"], rows[8]["query"] = "Rivers", "the id of it"  # too short; an id
    rows[9]["positive"] = " ".join(LONG.split()[:20] + [f"x{i}" for i in range(20)])  # 8 of 28 n-grams
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    lines[20:20] = [b"\n", b"{broken\n", b'{"query": "where does the river end"}\n']
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    (pairs / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines).removesuffix(b"\n")))
    write_jsonl(pairs / "b.jsonl", english_pairs(3, seed=1))
    report = run(pairs, *tasks, output=tmp_path / "clean")

    assert report["sources"] == [
        {"source": "a", "rows": 32, "unreadable": 2, "matched": 3},
        {"source": "b", "rows": 3, "unreadable": 0, "matched": 0},
    ]
    counts = {
        task["task"]: [task[k] for k in ("texts", "pairs", "query_exact", "query_overlap", "positive_exact")]
        + [task["positive_overlap"]]
        for task in report["tasks"]
    }
    assert counts == {
        "fact": [2, 2, 1, 0, 0, 1],
        "sts": [2, 1, 1, 0, 1, 0],
        "mteb/lines.txt": [2, 1, 1, 0, 0, 0],
    }
    assert report["tasks"][0]["examples"][1] == {
        "where": f"{pairs}/a.jsonl.gz:5",
        "side": "positive",
        "overlap": 1.0,
        "exact": False,
        "text": f"Before it. {LONG} After it."[:200],
        "evaluation_text": LONG[:200],
    }
    kept = gzip.decompress((tmp_path / "clean" / "a.jsonl.gz").read_bytes()).splitlines(keepends=True)
    assert kept == [line for i, line in enumerate(lines) if i not in (3, 4, 5, 20)]
    assert (tmp_path / "clean" / "b.jsonl").read_bytes() == (pairs / "b.jsonl").read_bytes()
    assert json.loads((tmp_path / "clean" / "decontaminate.json").read_text()) == report
    # What is left matches nothing, and a lower threshold finds more.
    again = run(tmp_path / "clean", *tasks)
    assert [source["matched"] for source in again["sources"]] == [0, 0]
    assert run(pairs, *tasks, overlap=0.25)["sources"][0]["matched"] == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clean", "mteb", "pairs"]


def test_a_report_alone_writes_no_file_and_shows_tables(
    tmp_path: Path, tasks: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": "Where does the river end?\ud800", "positive": "In the sea."}, {"query": "q", "positive": "p"}]
    file = tmp_path / "s.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["decontaminate", str(file), "--against", str(tasks[2]), "--examples", "1"])
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "task            texts  pairs  query exact  query overlap  positive exact  positive overlap",
        "mteb/lines.txt  2      1      1            0              0               0",
        "",
        "source  rows  unreadable  reported",
        "s       2     0           1",
        "",
        f"mteb/lines.txt: {file}:1, query, exactly",
        '  text: "Where does the river end?"',
        '  evaluation text: "where does the river END\\n"',
    ]
    main(["decontaminate", str(file), "--against", str(tasks[2]), "--json"])
    assert json.loads(capsys.readouterr().out)["sources"][0]["matched"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mteb", "s.jsonl"]


def refusal(kind: type[AnchorError], *arguments: Any, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        run(*arguments, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_arguments_are_refused(tmp_path: Path, tasks: list[Path]) -> None:
    pairs = write_jsonl(tmp_path / "p" / "a.jsonl", english_pairs(2))
    suffixes = ".jsonl, .jsonl.gz, .jsonl.zst, .csv, .csv.gz, .csv.zst, .tsv, .tsv.gz, .tsv.zst, .parquet, .txt"
    (tmp_path / "empty").mkdir()
    short = write_jsonl(tmp_path / "short" / "a.jsonl", [{"text": "one two"}])
    for path, expected in [
        (tmp_path / "none", f"--against: {tmp_path}/none: no such folder or file ending in {suffixes}"),
        (tmp_path / "empty", f"--against: {tmp_path}/empty: holds no file ending in {suffixes}"),
        (short, f"--against: {short}: holds no text of 3 words or more; lower --min-words"),
    ]:
        assert refusal(ConfigError, pairs, path) == expected
    assert (
        refusal(ConfigError, pairs, tasks[0], tasks[0]) == "--against: two tasks are called 'fact'; rename one folder"
    )
    assert refusal(ConfigError, pairs, tasks[0], overlap=0.0) == (
        "--overlap is 0, --ngram-words 13, --min-words 3; give a share above 0 and at most 1, and positive numbers of "
        "words"
    )
    assert refusal(ConfigError, tmp_path / "q", tasks[0]) == f"PAIRS: {tmp_path}/q: no such file or folder"
    write_jsonl(tmp_path / "p" / "a.jsonl.gz", [])
    assert refusal(ConfigError, tmp_path / "p", tasks[0]) == (
        f"PAIRS: {tmp_path}/p: both a.jsonl and a.jsonl.gz are 'a'; remove one"
    )


def test_unreadable_files_leave_no_folder_behind(tmp_path: Path, tasks: list[Path]) -> None:
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(b"plain")
    assert refusal(DataError, broken, tasks[0], output=tmp_path / "out") == (
        f"{broken}: cannot be read: zlib inflate failed: incorrect header check"
    )
    assert not list(tmp_path.glob("out*"))
    text = tmp_path / "latin.txt"
    text.write_bytes(b"caf\xe9 au lait\n")
    assert refusal(DataError, write_jsonl(tmp_path / "a.jsonl", []), text) == (
        f"{text}: cannot be read as UTF-8 text: 'utf-8' codec can't decode byte 0xe9 in position 3: invalid "
        "continuation byte"
    )
    row = tmp_path / "task.jsonl"
    row.write_text("{}\n{\n")
    assert refusal(DataError, tmp_path / "a.jsonl", row).startswith(f"{row}:2: malformed JSON: ")


@pytest.mark.parametrize("name", ["out", "out.unfinished"])
def test_nothing_is_written_over(tmp_path: Path, tasks: list[Path], name: str) -> None:
    pairs = write_jsonl(tmp_path / "a.jsonl", english_pairs(2))
    (tmp_path / name).mkdir()
    assert refusal(DataError, pairs, tasks[0], output=tmp_path / "out") == (
        f"{tmp_path}/{name}: already exists and is not written over; delete it or choose another --output"
    )
    assert list((tmp_path / name).iterdir()) == []


def test_the_mteb_folders_at_hand_have_texts() -> None:
    root = Path(__file__).parents[3] / "shared" / "data" / "mteb" / "mteb"
    if not root.is_dir():
        pytest.skip("../shared/data/mteb is absent")
    counts = {folder.name: sum(1 for _ in evaluation_texts(folder / "test.jsonl")) for folder in [root / "sts16-sts"]}
    assert counts == {"sts16-sts": 2 * 1186}


def test_linked_folders_are_entered_once(tmp_path: Path, tasks: list[Path]) -> None:
    rows = english_pairs(3)
    rows[1]["query"] = "where does the river end"
    pairs = write_jsonl(tmp_path / "pairs" / "a.jsonl", rows)
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "linked").symlink_to(tasks[0], target_is_directory=True)
    (tmp_path / "task" / "again").symlink_to(tmp_path / "task", target_is_directory=True)
    report = run(pairs.parent, tmp_path / "task")
    assert report["tasks"][0]["texts"] == run(pairs.parent, tasks[0])["tasks"][0]["texts"]
    assert report["sources"][0]["matched"] == 1
