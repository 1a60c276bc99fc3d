"""Folders of data under names that the `datasets` library cannot mistake for one another.

That library keeps a prepared copy of a folder by the folder's last name. Where the folder's README.md lists its files
(``configs:``), as retrieval tasks need it, neither path nor content is part of the copy's name (datasets 5.2): another
folder of the same name, or the same folder after a change, would silently be read from the old copy.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets.config
import xxhash

from anchor.data.retrieval_files import RETRIEVAL_FILES, RETRIEVAL_README
from anchor.errors import DataError, did_you_mean
from eval.texts import iterate_rows

CHECKSUMS = "checksums.json"
"""In an offline copy: hub path -> revision and SHA-256 of its files."""


def read_checksums(data_root: Path) -> dict[str, Any]:
    """What the checksum file holds; nothing where there is none.

    Raises:
        DataError: not readable.
    """
    file = data_root / CHECKSUMS
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not readable ({error}); delete it and fetch again") from error


def holds_files(folder: Path) -> bool:
    """Whether there is any file in it."""
    return folder.is_dir() and any(path.is_file() for path in folder.rglob("*"))


def data_hash(folder: Path) -> str:
    """A hash of the folder's path and of its files' names, sizes and times."""
    folder = folder.resolve()
    digest = xxhash.xxh3_64(str(folder).encode())
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        about = file.stat()
        digest.update(f"{file.relative_to(folder)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def distinct_path(folder: Path) -> Path:
    """A link to the folder whose name ends in its :func:`data_hash`.

    The link is made in the library's cache, where the prepared copy goes too.

    Args:
        folder: holds data.
    """
    folder = folder.resolve()
    links = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / ".anchor-folders"
    links.mkdir(parents=True, exist_ok=True)
    link = links / f"{folder.name}-{data_hash(folder)}"
    with suppress(FileExistsError):  # made by an earlier run, or by another rank just now
        link.symlink_to(folder, target_is_directory=True)
    return link


def retrieval_path(folder: Path) -> Path:
    """A retrieval task's folder as :func:`distinct_path` names it, with the README.md that `datasets` reads it by.

    A folder without one is not written to: links to its files and the README.md lie in the library's cache.

    Args:
        folder: holds ``RETRIEVAL_FILES``.
    """
    path = distinct_path(folder)
    if (folder / "README.md").is_file():
        return path
    listed = path.with_name(f"{path.name}-listed")
    (listed / "qrels").mkdir(parents=True, exist_ok=True)
    for name in RETRIEVAL_FILES:
        with suppress(FileExistsError):
            (listed / name).symlink_to(folder.resolve() / name)
    # Renamed into place: another rank may read it already.
    written = listed / f"README.md.{os.getpid()}"
    written.write_text(RETRIEVAL_README, encoding="utf-8")
    written.replace(listed / "README.md")
    return listed


def check_retrieval(folder: Path) -> None:
    """Read a retrieval task's files row by row: `datasets` and mteb would fail far from the cause, or score nothing.

    Args:
        folder: holds ``RETRIEVAL_FILES``.

    Raises:
        DataError: an empty file, malformed row, missing field, an id given twice, a judgement of an unknown text.
    """
    corpus, queries, judgements = (folder / name for name in RETRIEVAL_FILES)
    known = {"corpus-id": _text_ids(corpus), "query-id": _text_ids(queries)}
    where = None
    for where, row in iterate_rows(judgements, {"query-id": object, "corpus-id": object, "score": float}):
        for name, file in (("query-id", queries), ("corpus-id", corpus)):
            one = _id(where, name, row[name])
            if one not in known[name]:
                raise DataError(f"{where}: {name} '{one}' is not in {file.name}")
        score = row["score"]
        if isinstance(score, bool) or (isinstance(score, float) and not score.is_integer()) or abs(score) >= 2**31:
            raise DataError(f"{where}: the score is {score}; expected a whole number")
    if where is None:
        raise DataError(f"{judgements}: holds no row")


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
