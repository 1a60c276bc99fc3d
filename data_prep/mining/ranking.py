"""Rules shared by all mining methods: which documents have a rank, and which ranks negatives are drawn from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class Query(NamedTuple):
    """Distinct query of a source.

    Attributes:
        key: text id of the query.
        text: bare text.
        positives: numbers of the documents that are a positive of this query in any row.
        excluded: the positives and the document equal to the query's own text; ascending.
    """

    key: int
    text: str
    positives: list[int]
    excluded: list[int]


@dataclass(frozen=True, slots=True)
class Window:
    """Ranks to draw negatives from, and how many to draw.

    Attributes:
        negatives: negatives per query.
        first_rank, last_rank: ranks from 1, both inclusive, not counting positives.
        seed: seed of the draw.
        margin: documents that score above the positive's score minus this have no rank; in units of the score.
        relative_margin: documents that score above the positive's score minus this share of it have no rank.
    """

    negatives: int
    first_rank: int
    last_rank: int
    seed: int
    margin: float | None = None
    relative_margin: float | None = None

    def highest(self, positive: float) -> float:
        """Return the score above which a document has no rank.

        ``positive`` is the lowest score among the query's positives.
        """
        limits = [np.inf]
        if self.margin is not None:
            limits.append(positive - self.margin)
        if self.relative_margin is not None:
            limits.append(positive - self.relative_margin * abs(positive))
        return min(limits)

    def draw(self, ranked: np.ndarray, query: int) -> np.ndarray:
        """Draw negatives from the ranked documents, in rank order; fewer if the window is too small."""
        window = ranked[self.first_rank - 1 : self.last_rank]
        if len(window) <= self.negatives:
            return window
        draw = np.random.default_rng([self.seed, query + (1 << 63)])
        return window[np.sort(draw.choice(len(window), self.negatives, replace=False))]


class Scorer(Protocol):
    """Corpus that ranks its documents for queries."""

    def rank(self, queries: Sequence[Query], window: Window) -> Iterator[np.ndarray]:
        """Yield for each query the first ``window.last_rank`` documents that have a rank, best first."""
        ...


def ranked(scores: np.ndarray, excluded: Sequence[int], number: int, highest: float = np.inf) -> np.ndarray:
    """Return the best ``number`` documents, best first; ties go by document number.

    Args:
        scores: scores of all documents; minus infinity means no rank.
        excluded: documents without a rank.
        number: maximum number of documents.
        highest: documents that score above this have no rank.
    """
    scores = np.where(scores > highest, -np.inf, scores)
    scores[[i for i in excluded if i < len(scores)]] = -np.inf
    least = np.partition(scores, len(scores) - number)[len(scores) - number] if len(scores) > number else -np.inf
    found = np.flatnonzero((scores >= least) & (scores > -np.inf))
    return found[np.lexsort((found, -scores[found]))][:number]
