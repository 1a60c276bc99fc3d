"""Invariants: negatives come from the rank window of the source's own documents, ranked as BM25 says; none is a
positive of any row with the same query; equal input gives equal bytes; all else in a row stays.
"""

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import english_pairs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from anchor.errors import AnchorError, ConfigError, DataError
from data_prep.__main__ import main
from data_prep.mining.mine import mine
from data_prep.mining.ranking import Window, ranked
from data_prep.words import words


def run(pairs: Path, output: Path, negatives: int, first: int, last: int, seed: int = 0) -> dict[str, Any]:
    return mine(pairs, output, Window(negatives, first, last, seed), as_json=True)


def read(file: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def bm25(query: str, documents: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """BM25 of Robertson and Zaragoza 2009 with Lucene's inverse document frequency."""
    split = [Counter(words(document)) for document in documents]
    mean = sum(one.total() for one in split) / len(split)
    scores = []
    for one in split:
        score = 0.0
        for word in words(query):
            held = sum(word in other for other in split)
            weight = math.log(1 + (len(split) - held + 0.5) / (held + 0.5))
            score += weight * one[word] / (one[word] + k1 * (1 - b + b * one.total() / mean))
        scores.append(score)
    return scores


# Few words, so that queries and documents repeat and scores tie.
SHORT = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=4).map(" ".join)
ROWS = st.lists(
    st.fixed_dictionaries({"query": SHORT, "positive": SHORT, "negative": st.lists(SHORT, max_size=2)}),
    min_size=1,
    max_size=8,
)


@given(ROWS, st.integers(1, 3), st.integers(1, 3))
def test_negatives_are_ranked_as_the_formula_says_and_never_positives(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], first: int, width: int
) -> None:
    folder = tmp_path_factory.mktemp("mine")
    file = write_jsonl(folder / "s.jsonl", rows)
    run(file, folder / "out", width, first, first + width - 1)
    documents = list(dict.fromkeys(text for row in rows for text in (row["positive"], *row["negative"])))
    mined = read(folder / "out" / "s.jsonl")
    assert len(mined) == len(rows)
    for row, new in zip(rows, mined, strict=True):
        known = {other["positive"] for other in rows if other["query"] == row["query"]} | {row["query"]}
        scores = {d: s for d, s in zip(documents, bm25(row["query"], documents), strict=True) if d not in known and s}
        best = sorted(scores.values(), reverse=True)[first - 1 : first - 1 + width]
        assert {key: new[key] for key in ("query", "positive")} == {key: row[key] for key in ("query", "positive")}
        assert len(set(new["negative"])) == len(new["negative"])
        # Compared by score: single precision may order equal scores otherwise.
        assert [scores[text] for text in new["negative"]] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(("margin", "relative"), [(0.2, None), (None, 0.3), (0.1, 0.3)])
def test_a_margin_leaves_out_what_scores_near_the_positive(
    tmp_path: Path, margin: float | None, relative: float | None
) -> None:
    rows = [{"query": "red river", "positive": "red river of the north"}, {"query": "x", "positive": "red"}]
    rows += [{"query": "y", "positive": text} for text in ("red river", "red river bank", "a red one", "river")]
    rows += [{"query": "y", "positive": "nothing of this is in any other document " * (1 + i)} for i in range(3)]
    file = write_jsonl(tmp_path / "s.jsonl", rows)
    mine(file, tmp_path / "out", Window(9, 1, 9, 0, margin, relative), as_json=True)
    documents = [row["positive"] for row in rows]
    scores = dict(zip(documents, bm25("red river", documents), strict=True))
    own = scores.pop("red river of the north")
    del scores["red river"]  # the query itself
    limit = min(own - (margin or 0.0), own - (relative or 0.0) * own)
    expected = sorted((t for t, s in scores.items() if 0 < s <= limit), key=lambda t: -scores[t])
    assert 0 < len(expected) < sum(score > 0 for score in scores.values())
    assert read(tmp_path / "out" / "s.jsonl")[0]["negative"] == expected


@given(st.lists(st.integers(0, 4), max_size=30), st.sets(st.integers(0, 40), max_size=5), st.integers(1, 12))
def test_ranks_are_those_of_a_full_sort(values: list[int], excluded: set[int], number: int) -> None:
    scores = np.asarray(values, dtype=np.float32)
    expected = [i for i in sorted(range(len(values)), key=lambda i: (-values[i], i)) if values[i] and i not in excluded]
    with_rank = np.where(scores > 0, scores, -np.inf)
    assert ranked(with_rank, sorted(excluded), number).tolist() == expected[:number]
    below = [i for i in expected if values[i] <= 2]
    assert ranked(with_rank, sorted(excluded), number, 2.0).tolist() == below[:number]
    assert scores.tolist() == values


def test_negatives_are_drawn_from_the_window_by_the_seed(tmp_path: Path) -> None:
    rows = [{**row, "id": i} for i, row in enumerate(english_pairs(120))]
    pairs = tmp_path / "pairs"
    write_jsonl(pairs / "a.jsonl", rows)
    (pairs / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in rows[:60])))
    report = run(pairs, tmp_path / "one", 3, 5, 30)
    assert report["sources"] == [
        {"source": "a", "rows": 120, "unreadable": 0, "short": 0, "negatives": 360, "queries": 120, "documents": 360},
        {"source": "b", "rows": 60, "unreadable": 0, "short": 0, "negatives": 180, "queries": 60, "documents": 180},
    ]
    assert json.loads((tmp_path / "one" / "mine.json").read_text()) == report
    run(pairs, tmp_path / "whole", 26, 5, 30)
    run(pairs, tmp_path / "two", 3, 5, 30)
    run(pairs, tmp_path / "other", 3, 5, 30, seed=1)
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        one, whole, other = (read(tmp_path / folder / name) for folder in ("one", "whole", "other"))
        own = {text for row in read(pairs / name) for text in (row["positive"], *row["negative"])}
        for row, new, window in zip(rows, one, whole, strict=False):
            assert {**new, "negative": row["negative"]} == row
            assert own.issuperset(new["negative"])
            places = [window["negative"].index(text) for text in new["negative"]]
            assert places == sorted(places)
        assert sum(a["negative"] != b["negative"] for a, b in zip(one, other, strict=True)) > len(one) / 2
        # All over the window, not only its top.
        drawn = {w["negative"].index(text) for n, w in zip(one, whole, strict=True) for text in n["negative"]}
        assert len(drawn) == 26
    # What was mined is the layout that `mine` and `pack` read.
    assert run(tmp_path / "one", tmp_path / "again", 1, 1, 1)["sources"][0]["documents"] > 120


def test_rows_that_cannot_be_used_stay_for_pack_to_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.jsonl"
    rows = [
        '{"query": "red river", "positive": "red river one"}',
        "{broken",
        '{"query": "q", "positive": 3}',
        '{"query": "\\ud800 red", "positive": "漢"}',
        '{"query": "...", "positive": "river two red", "negative": null}',
        '{"query": "red", "positive": "river red \\u0000"}',
    ]
    file.write_text("\n\n".join(rows), encoding="utf-8")
    main(["mine", str(file), "--output", str(tmp_path / "out"), "--negatives", "2", "--ranks", "1-2"])
    assert capsys.readouterr().out.splitlines() == [
        "source  rows  unreadable  queries  documents  negatives  rows with fewer than 2",
        "s       6     4           2        2          1          2",
    ]
    lines = (tmp_path / "out" / "s.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == [
        '{"query": "red river", "positive": "red river one", "negative": ["river two red"]}',
        *rows[1:4],
        '{"query": "...", "positive": "river two red", "negative": []}',
        rows[5],  # what `pack` refuses became a negative of every other row once
    ]


def test_texts_without_words_have_no_negatives(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "s.jsonl", [{"query": "?", "positive": "!"}, {"query": "a", "positive": "..."}])
    (source,) = run(file, tmp_path / "out", 1, 1, 5)["sources"]
    assert (source["negatives"], source["short"]) == (0, 2)
    empty = write_jsonl(tmp_path / "e.jsonl", [])
    assert run(empty, tmp_path / "none", 1, 1, 5)["sources"][0]["rows"] == 0


def refusal(kind: type[AnchorError], *arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        run(*arguments)
    return str(caught.value)


def test_wrong_margins_are_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "s.jsonl", english_pairs(3))
    with pytest.raises(ConfigError) as caught:
        mine(file, tmp_path / "out", Window(1, 1, 5, 0, None, 1.5), as_json=True)
    assert str(caught.value) == "--relative-margin is 1.5; give a share from 0 to 1"
    # No score is above "nan", so that every document had a rank.
    for margin in (math.nan, -math.inf):
        with pytest.raises(ConfigError) as caught:
            mine(file, tmp_path / "out", Window(1, 1, 5, 0, margin), as_json=True)
        assert str(caught.value) == f"--margin is {margin:g}; give a finite number"


def test_wrong_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "s.jsonl", english_pairs(3))
    for negatives, first, last in ((0, 1, 5), (1, 0, 5), (3, 4, 5)):
        assert refusal(ConfigError, file, tmp_path / "out", negatives, first, last) == (
            f"--negatives is {negatives}, --ranks {first}-{last}; give at least one negative and as many ranks, from 1"
        )
    assert refusal(DataError, file, tmp_path, 1, 1, 5) == (
        f"{tmp_path}: already exists and is not written over; delete it or choose another --output"
    )
    assert refusal(ConfigError, tmp_path / "x", tmp_path / "out", 1, 1, 5) == (
        f"PAIRS: {tmp_path}/x: no such file or folder"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]
    with pytest.raises(SystemExit) as stop:
        main(["mine", str(file), "--output", "x", "--negatives", "1", "--ranks", "3"])
    assert stop.value.code == 2
    assert "expected two ranks such as 3-50, got '3'" in capsys.readouterr().err
