"""``python -m data_prep mine``: hard negatives for an E5 folder, by BM25 or by an embedder, within each source.

1. A source's corpus is every distinct document of its rows: positives and existing negatives.
2. Score the documents for each distinct query, by BM25 (:mod:`data_prep.mining.lexical`) or by the cosine of a
   sentence-transformers model (:mod:`data_prep.mining.dense`). Leave out the query's own text and its positives in any
   row. With a margin, also leave out documents whose score comes too close to the positive's or exceeds it
   (NV-Retriever, Moreira et al. 2024, arXiv:2407.15831: TopK-MarginPos and TopK-PercPos). Rank the others; equal scores
   keep their order in the file.
3. Draw ``negatives`` of the ranks ``first_rank`` to ``last_rank``, seeded by the seed and the query's text, and keep
   them in rank order. They replace `negative`; the rest of the row stays.

The result is a pure function of the files, the model and the arguments. Memory holds one source's documents and their
index; an embedder's vectors are on disk.
"""

import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anchor.data.records import is_usable
from anchor.data.row_files import open_output
from anchor.data.shards import text_id
from anchor.errors import ConfigError
from anchor.progress import tracked
from data_prep.mining.dense import Dense, load_model
from data_prep.mining.lexical import Lexical
from data_prep.mining.ranking import Query, Scorer, Window
from data_prep.new_folder import new_folder
from data_prep.sources.e5_rows import SIDES, Line, negatives_of, read_lines
from data_prep.sources.streams import e5_files
from data_prep.tables import print_table

log = logging.getLogger(__name__)

REPORT_NAME = "mine.json"


def mine(
    pairs: Path, output: Path, window: Window, *, as_json: bool, model: Path | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Run the command and write its report to stdout.

    Args:
        pairs: folder or file in E5 layout.
        output: new folder, in E5 layout.
        window: ranks to draw from, and how many negatives to draw.
        as_json: write one JSON object instead of a table.
        model: folder of a sentence-transformers model; None uses BM25.
        device: torch device of the model.

    Returns:
        The report.

    Raises:
        ConfigError: if a path or device is missing, the window holds fewer ranks than negatives, or a margin is out of
            range.
        DataError: if a file cannot be read, or the output folder exists.
    """
    ranks = window.last_rank - window.first_rank + 1
    if window.first_rank < 1 or window.negatives < 1 or ranks < window.negatives:
        raise ConfigError(
            f"--negatives is {window.negatives}, --ranks {window.first_rank}-{window.last_rank}; give at least one "
            "negative and as many ranks, from 1"
        )
    if window.margin is not None and not math.isfinite(window.margin):
        raise ConfigError(f"--margin is {window.margin:g}; give a finite number")
    if window.relative_margin is not None and not 0.0 <= window.relative_margin <= 1.0:
        raise ConfigError(f"--relative-margin is {window.relative_margin:g}; give a share from 0 to 1")
    files = e5_files(pairs, "PAIRS")
    embedder = load_model(model, device) if model is not None else None
    sources = []
    with new_folder(output) as folder:

        def scorer(documents: list[str], name: str) -> Scorer:
            return Lexical(documents) if embedder is None else Dense(embedder, documents, folder, name)

        for name, file in files.items():
            corpus = Corpus(name, file)
            mined = corpus.mine(window, scorer)
            sources.append({"source": name, **_write(name, file, folder / file.name, corpus, mined, window.negatives)})
            log.info("%s: %d queries over %d documents", name, len(mined), len(corpus.documents))
        report = {
            "pairs": str(pairs),
            "output": str(output),
            "negatives": window.negatives,
            "ranks": [window.first_rank, window.last_rank],
            "seed": window.seed,
            "model": str(model) if model is not None else None,
            "margin": window.margin,
            "relative_margin": window.relative_margin,
            "sources": sources,
        }
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _show(report, as_json)
    return report


class Corpus:
    """Documents, queries and known positives of one source.

    Attributes:
        documents: distinct documents, in order of first appearance.
    """

    def __init__(self, name: str, file: Path) -> None:
        self.documents: list[str] = []
        self._name = name
        self._numbers: dict[int, int] = {}
        self._queries: dict[int, str] = {}
        self._known: dict[int, set[int]] = {}
        for line in read_lines(file, f"reading {name}"):
            # A text that `pack` refuses in one row must not become a negative in others.
            if line.row is None or not all(is_usable(line.row[side]) for side in SIDES):
                continue
            query = line.row["query"]
            key = text_id(query)
            self._queries[key] = query
            self._known.setdefault(key, set()).add(self._number(line.row["positive"]))
            for text in filter(is_usable, negatives_of(line.row)):
                self._number(text)

    def _number(self, document: str) -> int:
        key = text_id(document)
        if key not in self._numbers:
            self._numbers[key] = len(self.documents)
            self.documents.append(document)
        return self._numbers[key]

    def mine(self, window: Window, scorer: Callable[[list[str], str], Scorer]) -> dict[int, list[int]]:
        """Return the documents drawn for each query, by the query's text id."""
        queries = [
            Query(key, text, sorted(self._known[key]), sorted(self._known[key] | self._same_text(key)))
            for key, text in self._queries.items()
        ]
        found = scorer(self.documents, self._name).rank(queries, window)
        progress = tracked(zip(queries, found, strict=True), f"mining {self._name}", len(queries), unit=" queries")
        return {query.key: window.draw(ranks, query.key).tolist() for query, ranks in progress}

    def _same_text(self, key: int) -> set[int]:
        """Return the document equal to the query's own text, if there is one."""
        return {self._numbers[key]} if key in self._numbers else set()


def _write(
    name: str, file: Path, target: Path, corpus: Corpus, mined: dict[int, list[int]], negatives: int
) -> dict[str, int]:
    counts = dict.fromkeys(("rows", "unreadable", "short", "negatives"), 0)
    with open_output(target) as out:
        for line in read_lines(file, f"writing {name}"):
            counts["rows"] += 1
            if line.row is None or text_id(line.row["query"]) not in mined:
                # Pass the line through: `pack` refuses or skips it as its recipe says.
                counts["unreadable"] += 1
                out.write(line.data)
                continue
            found = mined[text_id(line.row["query"])]
            counts["short"] += len(found) < negatives
            counts["negatives"] += len(found)
            out.write(_with_negatives(line, [corpus.documents[i] for i in found]))
    return counts | {"queries": len(mined), "documents": len(corpus.documents)}


def _with_negatives(line: Line, texts: list[str]) -> bytes:
    # A lone surrogate, which `pack` refuses, stays a JSON escape.
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
