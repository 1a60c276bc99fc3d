"""Invariants: nothing is imported; no document twice; siblings on one side; training
and held-out share nothing; the same bytes every time; nothing is written over.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import WORDS

from anchor.errors import ConfigError, DataError
from data_prep.__main__ import main
from data_prep.documentation import docs
from data_prep.documentation.docs import find_packages, write_docs
from data_prep.documentation.docstrings import Docstring

PROSE = " ".join(f"word{i}" if i % 7 == 0 else WORDS[i % len(WORDS)] for i in range(30))


def prose(i: int) -> str:
    return f"This is document number {'abcdefghij'[i % 10] * (i // 10 + 1)} of the corpus. {PROSE}."


def function(i: int, indent: str = "", self_argument: str = "") -> str:
    doc = f'{indent}    """Do the thing called {chr(97 + i % 26)}{i} well.\n\n{indent}    {prose(i)}\n{indent}    """\n'
    return f"{indent}def f{i}({self_argument}):\n{doc}"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Package of 12 modules with 6 documented functions and methods each, which cannot be imported."""
    root = tmp_path / "site" / "fakepackage"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (root / "tests").mkdir()
    (root / "tests" / "test_x.py").write_text(function(999))
    (root / "broken.py").write_text("def f(:\n")
    for module in range(12):
        first = module * 6
        text = "raise RuntimeError('imported')\n" + "".join(function(first + i) for i in range(3)) + "class C:\n"
        (root / f"m{module:02}.py").write_text(text + "".join(function(first + i, "    ", "self") for i in range(3, 6)))
    monkeypatch.syspath_prepend(str(root.parent))
    return "fakepackage"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(package: str, output: Path, **changes: Any) -> dict[str, Any]:
    return write_docs(output, [package], **{"heldout_pairs": 5, "heldout_documents": 14} | changes)


def module_of(text: str) -> int:
    """Return the fake package's module that a document comes from."""
    return next(i for i in range(72) if text == prose(i)) // 6


def test_both_parts_are_written_in_their_layouts(package: str, tmp_path: Path) -> None:
    about = run(package, tmp_path / "out")
    pairs = read_jsonl(tmp_path / "out" / "pairs" / "package_docs.jsonl")
    corpus = read_jsonl(tmp_path / "out" / "heldout" / "corpus.jsonl")
    queries = read_jsonl(tmp_path / "out" / "heldout" / "queries.jsonl")
    qrels = read_jsonl(tmp_path / "out" / "heldout" / "qrels" / "test.jsonl")
    assert about["counts"] == {
        "docstrings": 72,
        "distinct": 72,
        "pairs": 72,
        "training_pairs": len(pairs),
        "heldout_queries": 5,
        "heldout_documents": 14,
    }
    assert {tuple(row) for row in pairs} == {("query", "positive", "negative")}
    assert {tuple(row) for row in corpus} == {("_id", "title", "text")}
    assert {tuple(row) for row in queries} == {("_id", "text")}
    assert {tuple(row) for row in qrels} == {("query-id", "corpus-id", "score")}
    assert (len(corpus), len(queries), len(qrels)) == (14, 5, 5)
    header = (tmp_path / "out" / "heldout" / "README.md").read_text()
    configs = yaml.safe_load(header.strip("-\n"))["configs"]
    assert {c["config_name"]: c["data_files"] for c in configs} == {
        "default": [{"split": "test", "path": "qrels/test.jsonl"}],
        "corpus": [{"split": "corpus", "path": "corpus.jsonl"}],
        "queries": [{"split": "queries", "path": "queries.jsonl"}],
    }
    # Each query's document is its own body: both come from the same function.
    texts = {row["_id"]: row["text"] for row in corpus + queries}
    for row in qrels:
        number = next(i for i in range(72) if texts[row["corpus-id"]] == prose(i))
        assert texts[row["query-id"]] == f"Do the thing called {chr(97 + number % 26)}{number} well."
        assert row["query-id"] != row["corpus-id"]


def test_training_and_heldout_share_no_document_and_no_module(package: str, tmp_path: Path) -> None:
    run(package, tmp_path / "out")
    pairs = read_jsonl(tmp_path / "out" / "pairs" / "package_docs.jsonl")
    heldout = [row["text"] for row in read_jsonl(tmp_path / "out" / "heldout" / "corpus.jsonl")]
    training = [row[side] for row in pairs for side in ("positive", "negative")]
    assert len(pairs) == 72 - 18  # whole modules of six until there are 14
    assert len(heldout) == 14
    assert {module_of(text) for text in training}.isdisjoint({module_of(text) for text in heldout})


def test_the_negative_is_a_sibling_of_the_same_class_or_module(package: str, tmp_path: Path) -> None:
    run(package, tmp_path / "out")
    pairs = read_jsonl(tmp_path / "out" / "pairs" / "package_docs.jsonl")
    numbers = {prose(i): i for i in range(72)}
    assert len(pairs) > 50
    for row in pairs:
        positive, negative = numbers[row["positive"]], numbers[row["negative"]]
        assert positive != negative
        assert positive // 6 == negative // 6
        if positive % 6 >= 3:  # a method's is another method
            assert negative % 6 >= 3


def test_the_same_call_gives_the_same_bytes_and_another_seed_another_split(package: str, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(package, tmp_path / name, seed=seed)
    trees = [
        {f.relative_to(tmp_path / name).as_posix(): f.read_bytes() for f in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    ]
    assert len(trees[0]) == 6
    assert trees[0] == trees[1]
    assert trees[0]["heldout/corpus.jsonl"] != trees[2]["heldout/corpus.jsonl"]


def test_the_number_of_training_pairs_can_be_limited(package: str, tmp_path: Path) -> None:
    run(package, tmp_path / "all")
    run(package, tmp_path / "few", max_pairs=10)
    every = read_jsonl(tmp_path / "all" / "pairs" / "package_docs.jsonl")
    assert read_jsonl(tmp_path / "few" / "pairs" / "package_docs.jsonl") == every[:10]
    assert len({module_of(row["positive"]) for row in every[:10]}) > 3  # drawn from all over


def test_a_finished_folder_is_kept_and_another_one_is_not_written_over(package: str, tmp_path: Path) -> None:
    first = run(package, tmp_path / "out")
    mark = tmp_path / "out" / "pairs" / "package_docs.jsonl"
    before = mark.stat().st_mtime_ns
    assert run(package, tmp_path / "out") == first
    assert mark.stat().st_mtime_ns == before
    refused = f"{tmp_path}/out: already exists and is not the result of this command; choose another --output"
    with pytest.raises(DataError) as caught:
        run(package, tmp_path / "out", seed=1)
    assert str(caught.value) == refused
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError) as caught:
        run(package, tmp_path / "mine")
    assert str(caught.value) == refused.replace("/out", "/mine")


def test_an_interrupted_run_leaves_no_folder_and_is_done_again(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(docs.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            run(package, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.unfinished").is_dir()
    run(package, tmp_path / "out")
    assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "out.unfinished").exists()
    (tmp_path / "other.unfinished").mkdir()
    with pytest.raises(DataError) as caught:
        run(package, tmp_path / "other")
    assert str(caught.value) == (
        f"{tmp_path}/other.unfinished: in the way, and not written by this command; move it or choose another --output"
    )


def test_a_folder_that_lost_a_file_is_not_called_complete(package: str, tmp_path: Path) -> None:
    about = run(package, tmp_path / "out")
    assert run(package, tmp_path / "out") == about
    shutil.rmtree(tmp_path / "out" / "pairs")
    (tmp_path / "out" / "heldout" / "qrels" / "test.jsonl").unlink()
    with pytest.raises(DataError) as caught:
        run(package, tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path}/out: pairs/package_docs.jsonl, heldout/qrels/test.jsonl missing; delete the folder and run again"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            '{"seed"',
            "docs.json: not readable (Expecting ':' delimiter: line 1 column 8 (char 7)); delete {out} and run again",
        ),
        ("[]", ": already exists and is not the result of this command; choose another --output"),
    ],
)
def test_a_damaged_report_is_one_line(package: str, tmp_path: Path, content: str, expected: str) -> None:
    output = tmp_path / "out"
    run(package, output)
    (output / "docs.json").write_text(content)
    with pytest.raises(DataError) as caught:
        run(package, output)
    assert str(caught.value).removeprefix(str(output)).removeprefix("/") == expected.replace("{out}", str(output))


def test_wrong_arguments_are_refused(package: str, tmp_path: Path) -> None:
    cases: list[tuple[type[Exception], dict[str, Any], str]] = [
        (
            ConfigError,
            {"heldout_pairs": 15},
            "--heldout-pairs is 15 and --heldout-documents 14; each held-out pair needs a document, so give 0 < pairs "
            "<= documents",
        ),
        (ConfigError, {"max_pairs": 0}, "--max-pairs is 0; give a positive number or leave it out"),
        (
            DataError,
            {"heldout_documents": 72},
            "fakepackage: 72 usable docstrings are too few for 72 held-out documents and training pairs; name more "
            "packages or lower --heldout-documents and --heldout-pairs",
        ),
    ]
    for kind, changes, expected in cases:
        with pytest.raises(kind) as caught:
            run(package, tmp_path / "out", **changes)
        assert str(caught.value) == expected
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_an_error_only_when_it_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_such_package_here", "not-a-name", "sys", "__main__"):
        with pytest.raises(DataError) as caught:
            find_packages([name])
        assert str(caught.value) == (
            f"--packages: no installed package '{name}' with a source folder; give its import name"
        )
    monkeypatch.setattr(docs, "DEFAULT_PACKAGES", ("no_such_package_here", "yaml"))
    assert list(find_packages(None)) == ["yaml"]
    monkeypatch.setattr(docs, "DEFAULT_PACKAGES", ("no_such_package_here",))
    with pytest.raises(DataError) as caught:
        find_packages(None)
    assert str(caught.value) == "none of no_such_package_here is installed; name other packages with --packages"


def test_duplicates_are_dropped_over_the_whole_corpus(tmp_path: Path) -> None:
    def doc(summary: str, body: str) -> Docstring:
        return Docstring(summary, body, "m.py", "", "f")

    long = " ".join(WORDS * 3)
    assert len(long) > 300
    found = [
        doc("Return the first thing", long),
        doc("return the FIRST thing.", "other text"),  # the same summary
        doc("Return the second thing", long.upper() + "!"),  # the same body
        doc("Return the third thing", long[:250] + " another end"),  # the same beginning
        doc("Return the fourth thing", "Another text, which begins otherwise. " + long),
    ]
    assert docs.drop_duplicates(found) == [found[0], found[4]]


def test_the_command_line_writes_the_folder(package: str, tmp_path: Path) -> None:
    arguments = ["--packages", package, "--heldout-pairs", "5", "--heldout-documents", "14", "--max-pairs", "20"]
    main(["docs", "--output", str(tmp_path / "out"), *arguments])
    assert len(read_jsonl(tmp_path / "out" / "pairs" / "package_docs.jsonl")) == 20
    with pytest.raises(SystemExit) as stop:
        main(["docs", "--output", str(tmp_path / "out"), "--packages", " , "])
    assert stop.value.code == 2


def test_a_real_package_gives_real_pairs(tmp_path: Path) -> None:
    about = write_docs(tmp_path / "out", ["networkx"], heldout_pairs=20, heldout_documents=30)
    pairs = read_jsonl(tmp_path / "out" / "pairs" / "package_docs.jsonl")
    assert about["packages"]["networkx"]
    assert len(pairs) > 300
    assert len({row["positive"] for row in pairs}) == len({row["query"] for row in pairs}) == len(pairs)
    for row in pairs:
        assert len(row["query"].split()) >= 4
        assert len(row["positive"].split()) >= 25
        assert len(row["positive"]) <= 1200
        assert row["positive"] != row["negative"]
        assert ">>>" not in row["positive"]
