"""``python -m eval fetch``: an offline copy of tasks' data, made where there is a network, used with ``--data-root``.

Every hub repository goes to ``DIR/<hub path>`` at the revision that mteb names; ``DIR/checksums.json`` gets the
SHA-256 of every file. ``--source`` copies from another offline copy instead of the hub. A repository whose files are
all there and right is not fetched again.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from mteb.abstasks.abstask import AbsTask

from anchor.errors import DataError, first_line
from eval.tasks import hub_datasets
from eval.vectors import write_json

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"


def fetch(tasks: Sequence[AbsTask], data_root: Path, source: Path | None = None) -> list[str]:
    """Copy the data of tasks into ``data_root``.

    Args:
        tasks: whose data.
        data_root: the offline copy.
        source: another offline copy; None: the hub.

    Returns:
        Hub paths fetched now.

    Raises:
        DataError: something could not be fetched, all of it named; the rest is there.
    """
    wanted = {path: revision for task in tasks for path, revision in hub_datasets(task)}
    sums = read_checksums(data_root)
    fetched, failed = [], []
    for path, revision in wanted.items():
        if path in sums and not _wrong_files(data_root, path, sums[path]["files"]):
            continue
        try:
            _copy(path, revision, data_root, source)
        except DataError as error:
            failed.append(str(error))
            continue
        folder = data_root / path
        files = {str(file.relative_to(folder)): _sha256(file) for file in _files(folder)}
        sums[path] = {"revision": revision, "files": files}
        write_json(data_root / CHECKSUMS, sums)  # after each: an interrupted run keeps what it has
        fetched.append(path)
        log.info("%s: %d files", folder, len(files))
    if failed:
        raise DataError(f"{data_root}: {len(failed)} of {len(wanted)} repositories are missing: {'; '.join(failed)}")
    return fetched


def verify(data_root: Path) -> int:
    """Check every file of an offline copy; returns their number.

    Raises:
        DataError: no checksums, or a file that is missing or altered.
    """
    sums = read_checksums(data_root)
    if not sums:
        raise DataError(f"{data_root}: no {CHECKSUMS}; run `python -m eval fetch` with --data-root {data_root} first")
    wrong = [f for path, about in sums.items() for f in _wrong_files(data_root, path, about["files"])]
    if wrong:
        raise DataError(f"{data_root}: {len(wrong)} files are missing or altered: {', '.join(wrong)}; fetch again")
    return sum(len(about["files"]) for about in sums.values())


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
    except ValueError as error:
        raise DataError(f"{file}: not readable ({error}); delete it and fetch again") from error


def _copy(path: str, revision: str | None, data_root: Path, source: Path | None) -> None:
    if source is not None:
        if not (source / path).is_dir():
            raise DataError(f"{path} (not in {source})")
        shutil.copytree(source / path, data_root / path, dirs_exist_ok=True)
        return
    beside = data_root / f"{path}.unfinished"
    try:
        snapshot_download(path, repo_type="dataset", revision=revision, local_dir=beside)
    except OSError as error:  # root of the hub client's own errors: no network, no such repository, no access
        raise DataError(f"{path} ({first_line(error)})") from error
    shutil.rmtree(beside / ".cache", ignore_errors=True)  # the hub client's own notes
    shutil.rmtree(data_root / path, ignore_errors=True)
    os.replace(beside, data_root / path)


def _wrong_files(data_root: Path, path: str, files: dict[str, str]) -> list[str]:
    folder = data_root / path
    return [
        str(folder / name)
        for name, digest in files.items()
        if not (folder / name).is_file() or _sha256(folder / name) != digest
    ]


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
