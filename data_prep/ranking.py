"""What every way of mining shares: which documents of a query have a rank, and which ranks negatives are drawn from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class Query(NamedTuple):
    """A distinct query of a source.

    Attributes:
        key: its text id.
        text: bare.
        positives: numbers of the documents that are positives of it in any row.
        excluded: these and the document that is its own text; ascending.
    """

    key: int
    text: str
    positives: list[int]
    excluded: list[int]


@dataclass(frozen=True, slots=True)
class Window:
    """Which ranks negatives are drawn from, and how many.

    Attributes:
        negatives: negatives per query.
        first_rank, last_rank: ranks from 1, both included, positives left out.
        seed: seed of the draw.
        margin: documents that score more than the positive's score minus this have no rank; in units of the score.
        relative_margin: documents that score more than the positive's score minus this share of it have no rank.
    """

    negatives: int
    first_rank: int
    last_rank: int
    seed: int
    margin: float | None = None
    relative_margin: float | None = None

    def highest(self, positive: float) -> float:
        """The score above which a document has no rank; ``positive`` is the lowest score of the query's positives."""
        limits = [np.inf]
        if self.margin is not None:
            limits.append(positive - self.margin)
        if self.relative_margin is not None:
            limits.append(positive - self.relative_margin * abs(positive))
        return min(limits)

    def draw(self, ranked: np.ndarray, query: int) -> np.ndarray:
        """Some of the ranked documents, in the order of their ranks; fewer where there are no more."""
        window = ranked[self.first_rank - 1 : self.last_rank]
        if len(window) <= self.negatives:
            return window
        draw = np.random.default_rng([self.seed, query + (1 << 63)])
        return window[np.sort(draw.choice(len(window), self.negatives, replace=False))]


class Scorer(Protocol):
    """A corpus that queries are held against."""

    def rank(self, queries: Sequence[Query], window: Window) -> Iterator[np.ndarray]:
        """For each query the first ``window.last_rank`` documents that have a rank, best first."""
        ...


def ranked(scores: np.ndarray, excluded: Sequence[int], number: int, highest: float = np.inf) -> np.ndarray:
    """The best ``number`` documents, best first; ties by number.

    Args:
        scores: of all documents; minus infinity has no rank.
        excluded: documents without rank.
        number: how many.
        highest: documents that score more have no rank.
    """
    scores = np.where(scores > highest, -np.inf, scores)
    scores[[i for i in excluded if i < len(scores)]] = -np.inf
    least = np.partition(scores, len(scores) - number)[len(scores) - number] if len(scores) > number else -np.inf
    found = np.flatnonzero((scores >= least) & (scores > -np.inf))
    return found[np.lexsort((found, -scores[found]))][:number]
