"""``python -m data_prep mine``: hard negatives of an E5 folder, by BM25 within each source.

1. A source's corpus is every distinct document of its rows: positives and the negatives that it has already.
2. Per distinct query: BM25 scores of all documents (bm25s, Lucene's variant), without the positives that any row
   has for this query and without the query's own text; the documents left are ranked, equal scores by their order
   in the file; documents that share no word with the query have no rank.
3. ``negatives`` of the ranks ``first_rank`` to ``last_rank`` are drawn by the seed and the query's text, and kept in
   the order of their ranks. They replace `negative`; all else in a row stays.

A pure function of the files and the arguments. One source's documents and their index are held in memory.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchor.data.shards import text_id
from anchor.errors import ConfigError
from data_prep.e5_rows import Line, negatives_of, read_lines
from data_prep.new_folder import new_folder
from data_prep.progress import tracked
from data_prep.readers import open_output
from data_prep.sources import e5_files
from data_prep.tables import print_table
from data_prep.words import words

log = logging.getLogger(__name__)

REPORT_NAME = "mine.json"


@dataclass(frozen=True, slots=True)
class Window:
    """Which ranks negatives are drawn from, and how many.

    Attributes:
        negatives: negatives per query.
        first_rank, last_rank: ranks from 1, both included, positives left out.
        seed: seed of the draw.
    """

    negatives: int
    first_rank: int
    last_rank: int
    seed: int

    def draw(self, ranked: np.ndarray, query: int) -> np.ndarray:
        """Some of the ranked documents, in the order of their ranks; fewer where there are no more."""
        window = ranked[self.first_rank - 1 : self.last_rank]
        if len(window) <= self.negatives:
            return window
        draw = np.random.default_rng([self.seed, query + (1 << 63)])
        return window[np.sort(draw.choice(len(window), self.negatives, replace=False))]


def mine(pairs: Path, output: Path, window: Window, *, as_json: bool) -> dict[str, Any]:
    """Run the whole command and write its report to stdout.

    Args:
        pairs: folder or file in E5 layout.
        output: new folder, in E5 layout.
        window: what is drawn.
        as_json: one JSON object instead of a table.

    Returns:
        The report.

    Raises:
        ConfigError: a missing path; a window that holds fewer ranks than negatives.
        DataError: a file that cannot be read; an output folder that exists.
    """
    ranks = window.last_rank - window.first_rank + 1
    if window.first_rank < 1 or window.negatives < 1 or ranks < window.negatives:
        raise ConfigError(
            f"--negatives is {window.negatives}, --ranks {window.first_rank}-{window.last_rank}; give at least one "
            "negative and as many ranks, from 1"
        )
    files = e5_files(pairs, "PAIRS")
    sources = []
    with new_folder(output) as folder:
        for name, file in files.items():
            corpus = Corpus(name, file)
            mined = corpus.mine(window)
            sources.append({"source": name, **_write(name, file, folder / file.name, corpus, mined, window.negatives)})
            log.info("%s: %d queries over %d documents", name, len(mined), len(corpus.documents))
        report = {
            "pairs": str(pairs),
            "output": str(output),
            "negatives": window.negatives,
            "ranks": [window.first_rank, window.last_rank],
            "seed": window.seed,
            "sources": sources,
        }
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _show(report, as_json)
    return report


class Corpus:
    """The documents, queries and known positives of one source.

    Attributes:
        documents: distinct documents, in the order of their first rows.
    """

    def __init__(self, name: str, file: Path) -> None:
        self.documents: list[str] = []
        self._name = name
        self._numbers: dict[int, int] = {}
        self._queries: dict[int, str] = {}
        self._known: dict[int, set[int]] = {}
        for line in read_lines(file, f"reading {name}"):
            if line.row is None:
                continue
            query = line.row["query"]
            key = text_id(query)
            self._queries[key] = query
            self._known.setdefault(key, set()).add(self._number(line.row["positive"]))
            for text in negatives_of(line.row):
                self._number(text)

    def _number(self, document: str) -> int:
        key = text_id(document)
        if key not in self._numbers:
            self._numbers[key] = len(self.documents)
            self.documents.append(document)
        return self._numbers[key]

    def mine(self, window: Window) -> dict[int, list[int]]:
        """Documents drawn for each query, by the query's text id."""
        import bm25s  # imports scipy; only this command needs it
        from bm25s.tokenization import Tokenized

        vocabulary: dict[str, int] = {}
        # One number object per word of the language, not per word of the corpus.
        ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in words(text)] for text in self.documents]
        if not vocabulary:
            return {key: [] for key in self._queries}
        logging.getLogger("bm25s").setLevel(logging.INFO)  # it asks for every debugging message
        index = bm25s.BM25(method="lucene")
        index.index(Tokenized(ids=ids, vocab=vocabulary), show_progress=False)
        del ids
        mined = {}
        for key, query in tracked(self._queries.items(), f"mining {self._name}", len(self._queries)):
            known = [vocabulary[word] for word in words(query) if word in vocabulary]
            excluded = self._known[key] | ({self._numbers[key]} if key in self._numbers else set())
            scores = index.get_scores_from_ids(known) if known else np.zeros(0, np.float32)
            mined[key] = window.draw(ranked(scores, excluded, window.last_rank), key).tolist()
        return mined


def ranked(scores: np.ndarray, excluded: set[int], number: int) -> np.ndarray:
    """The best ``number`` documents with a positive score that are not excluded, best first; ties by number."""
    scores = scores.copy()
    scores[[i for i in excluded if i < len(scores)]] = 0.0
    least = np.partition(scores, len(scores) - number)[len(scores) - number] if len(scores) > number else 0.0
    found = np.flatnonzero((scores >= least) & (scores > 0.0))
    return found[np.lexsort((found, -scores[found]))][:number]


def _write(
    name: str, file: Path, target: Path, corpus: Corpus, mined: dict[int, list[int]], negatives: int
) -> dict[str, int]:
    counts = dict.fromkeys(("rows", "unreadable", "short", "negatives"), 0)
    with open_output(target) as out:
        for line in read_lines(file, f"writing {name}"):
            counts["rows"] += 1
            if line.row is None:
                # `pack` refuses or skips it as its recipe says.
                counts["unreadable"] += 1
                out.write(line.data)
                continue
            found = mined[text_id(line.row["query"])]
            counts["short"] += len(found) < negatives
            counts["negatives"] += len(found)
            out.write(_with_negatives(line, [corpus.documents[i] for i in found]))
    return counts | {"queries": len(mined), "documents": len(corpus.documents)}


def _with_negatives(line: Line, texts: list[str]) -> bytes:
    # Half a surrogate pair, which `pack` refuses, stays a JSON escape.
    return (json.dumps({**(line.row or {}), "negative": texts}, ensure_ascii=False) + "\n").encode(
        errors="backslashreplace"
    )


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
        return
    names = ("rows", "unreadable", "queries", "documents", "negatives", "short")
    columns = ("source", *names[:-1], f"rows with fewer than {report['negatives']}")
    print_table(columns, [(source["source"], *(f"{source[name]:,}" for name in names)) for source in report["sources"]])
