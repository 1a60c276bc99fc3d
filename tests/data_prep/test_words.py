"""Invariants: what a reader takes for the same words is the same; scripts without spaces have words too."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.words import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two  dogs, in the GRASS.", ["two", "dogs", "in", "the", "grass"]),
        ("cafe\u0301 ＡＢＣ ﬁne", ["café", "abc", "fine"]),
        ("漢字とGPT3", ["漢", "字", "と", "gpt3"]),
        ("Straße", ["strasse"]),
        ("...", []),
        ("हिन्दी में खोज", ["हिन्दी", "में", "खोज"]),  # vowel signs are parts of words
        ("كِتَابٌ جَدِيدٌ", ["كِتَابٌ", "جَدِيدٌ"]),
        ("ภาษาที่", ["ภ", "า", "ษ", "า", "ที่"]),
    ],
)
def test_words_are_normalised(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@given(st.text(), st.sampled_from([" ", ", ", "\n\n", " — "]))
def test_spaces_and_punctuation_between_words_do_not_matter(text: str, between: str) -> None:
    assert words(between.join(words(text))) == words(" ".join(words(text)))
