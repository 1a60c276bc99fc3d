"""Read, check and convert a local retrieval folder in MTEB's or BEIR's layout.

Both layouts have ``corpus.jsonl`` and ``queries.jsonl``. Judgements are ``qrels/test.jsonl`` in MTEB's layout and
``qrels/test.tsv`` in BEIR's. A folder with both is read as MTEB's.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from anchor.data.retrieval_files import BEIR_JUDGEMENTS, RETRIEVAL_FILES, RETRIEVAL_README
from anchor.errors import DataError, did_you_mean
from eval.embedding.texts import iterate_rows
from eval.scoring.local_data import distinct_path

_CORPUS, _QUERIES, _JUDGEMENTS = RETRIEVAL_FILES
_TEXT_FIELDS = ("_id", "id", "title", "text")


class Judgement(NamedTuple):
    """Relevance of a document to a query.

    Attributes:
        where: file and line of the judgement.
        query, document: ids.
        score: relevance; above 0 is relevant.
    """

    where: str
    query: str
    document: str
    score: int


def judgements_file(folder: Path) -> Path:
    """Return the path of a folder's judgements.

    Raises:
        DataError: one of the folder's three files is missing.
    """
    found = [name for name in (_JUDGEMENTS, BEIR_JUDGEMENTS) if (folder / name).is_file()]
    missing = [name for name in (_CORPUS, _QUERIES) if not (folder / name).is_file()]
    missing += [] if found else [f"{_JUDGEMENTS} (or BEIR's {BEIR_JUDGEMENTS})"]
    if missing:
        raise DataError(f"{folder}: no {missing[0]}; expected a retrieval task in MTEB's folder layout")
    return folder / found[0]


def read_judgements(folder: Path) -> Iterator[Judgement]:
    """Yield a folder's judgements in order; identical duplicates are allowed.

    Raises:
        DataError: malformed row, missing field, a score that is not a whole number, or two scores for one pair.
    """
    file = judgements_file(folder)
    table = file.suffix == ".tsv"  # TSV cells are strings
    given: dict[tuple[str, str], tuple[int, str]] = {}
    fields = {"query-id": object, "corpus-id": object, "score": object if table else float}
    for where, row in iterate_rows(file, fields):
        query, document = (_id(where, name, row[name]) for name in ("query-id", "corpus-id"))
        score = _score(where, row["score"], table)
        before, there = given.setdefault((query, document), (score, where))
        if before != score:
            raise DataError(
                f"{where}: query '{query}' and document '{document}' have score {score}, and {before} at {there}; "
                "remove one"
            )
        yield Judgement(where, query, document, score)


def check_retrieval(folder: Path) -> None:
    """Check a retrieval task's files row by row.

    Without this check, `datasets` and mteb would fail far from the cause, or score nothing.

    Args:
        folder: a folder in either layout.

    Raises:
        DataError: a missing or empty file, malformed row, missing field, duplicate id, judgement of an unknown text,
            or contradictory judgements.
    """
    judgements = judgements_file(folder)
    queries, corpus = _text_ids(folder / _QUERIES), _text_ids(folder / _CORPUS)
    one = None
    for one in read_judgements(folder):
        for name, value, known, file in (
            ("query-id", one.query, queries, _QUERIES),
            ("corpus-id", one.document, corpus, _CORPUS),
        ):
            if value not in known:
                raise DataError(f"{one.where}: {name} '{value}' is not in {file}")
    if one is None:
        raise DataError(f"{judgements}: holds no row")


def retrieval_path(folder: Path) -> Path:
    """Return a retrieval task's folder in MTEB's layout with a README.md, named as by :func:`distinct_path`.

    If the folder lacks either, write links or converted files to the `datasets` cache; the folder stays unchanged.

    Args:
        folder: a folder that passed :func:`check_retrieval`.
    """
    path, judgements = distinct_path(folder), judgements_file(folder)
    if (folder / "README.md").is_file() and judgements.suffix == ".jsonl":
        return path
    listed = path.with_name(f"{path.name}-listed")
    (listed / "qrels").mkdir(parents=True, exist_ok=True)
    if judgements.suffix == ".tsv":
        for name in (_CORPUS, _QUERIES):
            _write(listed / name, lambda file, name=name: file.writelines(_texts_alone(folder / name)))
        _write(listed / _JUDGEMENTS, lambda file: file.writelines(_judgement_lines(folder)))
    else:
        for name in RETRIEVAL_FILES:
            with suppress(FileExistsError):
                (listed / name).symlink_to(folder.resolve() / name)
    _write(listed / "README.md", lambda file: file.write(RETRIEVAL_README))
    return listed


def _write(path: Path, fill: Callable[[TextIO], Any]) -> None:
    """Write a temporary file and rename it into place: another rank may already be reading the old one."""
    written = path.with_name(f"{path.name}.{os.getpid()}")
    with written.open("w", encoding="utf-8") as file:
        fill(file)
    written.replace(path)


def _texts_alone(file: Path) -> Iterator[str]:
    """Yield rows without BEIR's ``metadata``: its type varies between rows, so `datasets` cannot read it."""
    for _, row in iterate_rows(file, {"text": str}):
        yield json.dumps({name: row[name] for name in _TEXT_FIELDS if name in row}) + "\n"


def _judgement_lines(folder: Path) -> Iterator[str]:
    for one in read_judgements(folder):
        yield json.dumps({"query-id": one.query, "corpus-id": one.document, "score": one.score}) + "\n"


def _score(where: str, value: Any, table: bool) -> int:
    if table and isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,10}", value):
        value = int(value)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 2**31 or value != int(value):
        raise DataError(f"{where}: the score is {value}; expected a whole number")
    return int(value)


def _text_ids(file: Path) -> set[str]:
    ids: set[str] = set()
    titled = None
    for where, row in iterate_rows(file, {"text": str}):
        name = "_id" if "_id" in row else "id"
        if name not in row:
            raise DataError(f"{where}: no field '_id'{did_you_mean('_id', row)}")
        one = _id(where, name, row[name])
        if one in ids:
            raise DataError(f"{where}: the {name} '{one}' is given twice; ids must differ")
        ids.add(one)
        titled = isinstance(row.get("title"), str) if titled is None else titled
        if titled != isinstance(row.get("title"), str) or ("title" in row and not titled):
            raise DataError(f"{where}: a title must be a text, in all rows or in none")
    if not ids:
        raise DataError(f"{file}: holds no row")
    return ids


def _id(where: str, name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: the {name} is {value!r}; expected a text or a whole number")
    return str(value)
