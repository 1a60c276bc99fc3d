"""Lookup of texts that repeat an evaluation text, exactly or by a share of their word n-grams.

1. Normalise every evaluation text to words. Keep the hash of all its words, and the sorted hashes of its n-grams.
2. Look up texts in chunks. The evaluation's vocabulary turns words into numbers, and one polynomial hash covers all
   windows of the chunk at once. A bitmap rejects most windows, and binary search checks the others. Words unknown to
   the evaluation share the number 0 here, because no evaluation text holds it.
3. A text matches exactly if its words equal those of an evaluation text. Otherwise it matches by overlap, if
   ``|shared n-grams| / min(|its n-grams|, |the evaluation text's n-grams|)`` over distinct n-grams reaches the
   threshold. Only texts with a hit get this far. Here each unknown word has its own number, so n-grams with different
   unknown words count as different.

Hashes have 64 bits: with 10^9 windows and 10^7 n-grams, expect one accidental hit in 2,000 runs.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import xxhash

from data_prep.words import words

_BASE = np.uint64(0x9E3779B97F4A7C15)
_PREVIEW_CHARACTERS = 200
_MAX_BITMAP_BITS = 28


class Match(NamedTuple):
    """Match of a text with an evaluation text.

    Attributes:
        text: number of the evaluation text.
        overlap: share of n-grams; 1 for an exact match.
        exact: True if all words are the same.
    """

    text: int
    overlap: float
    exact: bool


class _Vocabulary(dict[str, int]):
    def __missing__(self, word: str) -> int:
        return 0


class EvaluationTexts:
    """Evaluation texts, collected for lookup.

    Args:
        ngram_words: words in an n-gram.
        min_words: shorter evaluation texts are ignored, because a one-word title proves nothing.
    """

    def __init__(self, *, ngram_words: int, min_words: int) -> None:
        self.ngram_words = ngram_words
        self.min_words = min_words
        self.tasks: list[str] = []
        self.previews: list[str] = []
        self._vocabulary = _Vocabulary()
        self._exact: dict[int, list[int]] = {}
        self._hashes: list[np.ndarray] = []
        self._owners: list[np.ndarray] = []
        self._num_grams: list[int] = []

    def add(self, task: str, texts: Iterable[str]) -> int:
        """Add a task's texts; return the number of distinct ones with enough words."""
        seen: set[int] = set()
        for text in texts:
            found = words(text)
            key = _text_key(found)
            if len(found) < self.min_words or key in seen:
                continue
            seen.add(key)
            number = len(self.tasks)
            for word in found:
                self._vocabulary.setdefault(word, len(self._vocabulary) + 1)
            ids = np.fromiter(map(self._vocabulary.__getitem__, found), np.int64, len(found))
            grams = np.unique(_windows(ids, self.ngram_words))
            self.tasks.append(task)
            self.previews.append(text[:_PREVIEW_CHARACTERS])
            self._exact.setdefault(key, []).append(number)
            self._hashes.append(grams)
            self._owners.append(np.full(len(grams), number, dtype=np.int32))
            self._num_grams.append(len(grams))
        return len(seen)

    def freeze(self) -> "Lookup":
        """Return the texts sorted for lookup."""
        hashes = np.concatenate([np.empty(0, np.uint64), *self._hashes])
        owners = np.concatenate([np.empty(0, np.int32), *self._owners])
        order = np.argsort(hashes, kind="stable")
        return Lookup(
            self._vocabulary, self._exact, hashes[order], owners[order], np.asarray(self._num_grams), self.ngram_words
        )


class Lookup:
    """Sorted evaluation texts, made by :meth:`EvaluationTexts.freeze`."""

    def __init__(
        self,
        vocabulary: _Vocabulary,
        exact: dict[int, list[int]],
        hashes: np.ndarray,
        owners: np.ndarray,
        num_grams: np.ndarray,
        ngram_words: int,
    ) -> None:
        self._vocabulary, self._exact = vocabulary, exact
        self._hashes, self._owners, self._num_grams = hashes, owners, num_grams
        self._ngram_words = ngram_words
        # At least 16 bits per n-gram, up to the cap: at most one window in 16 passes by accident.
        bits = min(_MAX_BITMAP_BITS, max(10, 4 + len(hashes).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._bitmap = np.zeros(1 << bits, dtype=bool)
        self._bitmap[hashes >> self._shift] = True

    def matches(self, texts: Sequence[str], overlap: float) -> list[list[Match]]:
        """Return the matches of each text: exact ones, then overlaps of at least ``overlap``.

        Both are in the order of the evaluation texts.
        """
        split = [words(text) for text in texts]
        found: list[list[Match]] = [
            [Match(number, 1.0, True) for number in self._exact.get(_text_key(one), ())] for one in split
        ]
        ends = np.cumsum([len(one) for one in split])
        total = int(ends[-1]) if len(ends) else 0
        ids = np.fromiter(map(self._vocabulary.__getitem__, chain.from_iterable(split)), np.int64, total)
        windows = _windows(ids, self._ngram_words)
        passed = np.flatnonzero(self._bitmap[windows >> self._shift])
        at = np.searchsorted(self._hashes, windows[passed])
        known = at < len(self._hashes)
        known[known] = self._hashes[at[known]] == windows[passed[known]]
        hits = passed[known]
        owner = np.searchsorted(ends, hits, side="right")
        whole = hits + self._ngram_words <= ends[owner]  # drop windows that cross the end of a text
        for i in np.unique(owner[whole]):
            exact = {match.text for match in found[i]}
            grams = np.unique(_windows(self._distinct_ids(split[i]), self._ngram_words))
            found[i] += [match for match in self._overlaps(grams, overlap) if match.text not in exact]
        return found

    def _distinct_ids(self, found: list[str]) -> np.ndarray:
        """Number the words of one text; each word unknown to the evaluation gets its own number."""
        known = len(self._vocabulary)
        unknown: dict[str, int] = {}
        ids = (self._vocabulary[word] or known + unknown.setdefault(word, len(unknown) + 1) for word in found)
        return np.fromiter(ids, np.int64, len(found))

    def _overlaps(self, grams: np.ndarray, least: float) -> list[Match]:
        first = np.searchsorted(self._hashes, grams, side="left")
        last = np.searchsorted(self._hashes, grams, side="right")
        owners = np.concatenate([self._owners[a:b] for a, b in zip(first, last, strict=True)])
        numbers, shared = np.unique(owners, return_counts=True)
        share = shared / np.minimum(len(grams), self._num_grams[numbers])
        return [Match(int(n), float(s), False) for n, s in zip(numbers, share, strict=True) if s >= least]


def _text_key(found: list[str]) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(found).encode("utf-8", "surrogatepass"))


def _windows(ids: np.ndarray, length: int) -> np.ndarray:
    """Return the polynomial hash of every run of ``length`` numbers, uint64."""
    if len(ids) < length:
        return np.empty(0, np.uint64)
    # Mix the bits (splitmix64's finaliser), so that small numbers do not give small hashes.
    value = ids.astype(np.uint64) * _BASE
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    count = len(ids) - length + 1
    out = value[:count].copy()
    for k in range(1, length):
        out *= _BASE
        out += value[k : k + count]
    return out ^ (out >> np.uint64(32))
