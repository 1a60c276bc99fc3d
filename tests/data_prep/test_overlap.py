"""Invariants: the fast search finds what comparing every text with every evaluation text finds, whatever stands beside
it; short evaluation texts are ignored.
"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.decontamination.overlap import EvaluationTexts, Match
from data_prep.words import words

# Few words and short n-grams, so that texts overlap often and in parts.
TEXTS = st.lists(st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=9).map(" ".join), max_size=8)


def grams(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def naive(text: str, evaluation: list[str], length: int, least: float, min_words: int) -> list[tuple[int, float, bool]]:
    out = []
    for number, other in enumerate(evaluation):
        if len(words(other)) < min_words:
            continue
        mine, its = grams(text, length), grams(other, length)
        share = len(mine & its) / max(1, min(len(mine), len(its)))
        if words(text) == words(other):
            out.append((number, 1.0, True))
        elif share >= least:
            out.append((number, share, False))
    return out


@given(TEXTS, TEXTS, st.integers(1, 4), st.sampled_from([0.25, 0.5, 1.0]), st.integers(1, 3))
def test_the_search_finds_what_comparing_all_with_all_finds(
    evaluation: list[str], texts: list[str], length: int, least: float, min_words: int
) -> None:
    evaluation = list(dict.fromkeys(evaluation))
    found = EvaluationTexts(ngram_words=length, min_words=min_words)
    count = found.add("t", evaluation)
    kept = [i for i, text in enumerate(evaluation) if len(words(text)) >= min_words]
    assert count == len(kept) == len(found.tasks)
    result = [
        sorted((kept[m.text], m.overlap, m.exact) for m in matches) for matches in found.freeze().matches(texts, least)
    ]
    assert result == [naive(text, evaluation, length, least, min_words) for text in texts]


@pytest.mark.parametrize(
    ("text", "share"), [("a c e", 1 / 3), ("a c c", 1 / 2), ("a c c e", 1 / 3), ("a b e", 2 / 3), ("c a e f", 1 / 3)]
)
def test_two_unknown_words_are_two_words(text: str, share: float) -> None:
    """Regression: all unknown words shared one number, so "c" and "e" counted as one n-gram: too high a share."""
    found = EvaluationTexts(ngram_words=1, min_words=1)
    found.add("t", ["a b d"])
    assert found.freeze().matches(["x y", text], 0.1) == [[], [Match(0, share, False)]]


def test_thirteen_words_of_real_length() -> None:
    draw = random.Random(0)
    vocabulary = [f"w{i}" for i in range(5000)]
    evaluation = [" ".join(draw.choices(vocabulary, k=120)) for _ in range(200)]
    texts = [" ".join(draw.choices(vocabulary, k=120)) for _ in range(300)]
    whole, part = evaluation[17].split(), evaluation[40].split()
    texts[5] = " ".join(["new", *whole, "words"])  # all of it, inside a longer text
    texts[250] = " ".join(part[:66] + draw.choices(vocabulary, k=54))  # 54 of 108 n-grams: exactly half
    texts[251] = " ".join(part[:65] + draw.choices(vocabulary, k=55))
    texts[299] = evaluation[3].upper().replace(" ", ",  ")
    found = EvaluationTexts(ngram_words=13, min_words=3)
    found.add("t", evaluation)
    matches = {i: found for i, found in enumerate(found.freeze().matches(texts, 0.5)) if found}
    assert matches == {
        5: [Match(17, 1.0, False)],
        250: [Match(40, 0.5, False)],
        299: [Match(3, 1.0, True)],
    }


@pytest.mark.parametrize("texts", [[], [""], ["", "a b c"]])
def test_no_evaluation_text_matches_nothing(texts: list[str]) -> None:
    lookup = EvaluationTexts(ngram_words=2, min_words=1).freeze()
    assert lookup.matches(texts, 0.1) == [[] for _ in texts]
