"""BM25 scores of a source's documents (bm25s, Lucene's variant); documents without a word of the query have no rank."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.mining.ranking import Query, Window, ranked
from data_prep.words import words


class Lexical:
    """BM25 index of some documents.

    Args:
        documents: distinct texts.
    """

    def __init__(self, documents: list[str]) -> None:
        import bm25s  # imports scipy; nothing else here needs it
        from bm25s.tokenization import Tokenized

        self._vocabulary: dict[str, int] = {}
        # Share one int object per distinct word, instead of one per occurrence.
        ids = [[self._vocabulary.setdefault(word, len(self._vocabulary)) for word in words(text)] for text in documents]
        logging.getLogger("bm25s").setLevel(logging.INFO)  # it enables every debug message
        self._index = bm25s.BM25(method="lucene")
        if self._vocabulary:
            self._index.index(Tokenized(ids=ids, vocab=self._vocabulary), show_progress=False)

    def rank(self, queries: Sequence[Query], window: Window) -> Iterator[np.ndarray]:
        """Rank the documents as :class:`data_prep.mining.ranking.Scorer` describes."""
        for query in queries:
            known = [self._vocabulary[word] for word in words(query.text) if word in self._vocabulary]
            if not known:
                yield np.empty(0, np.int64)
                continue
            scores = self._index.get_scores_from_ids(known)
            highest = window.highest(float(scores[query.positives].min()))
            yield ranked(np.where(scores > 0.0, scores, -np.inf), query.excluded, window.last_rank, highest)
