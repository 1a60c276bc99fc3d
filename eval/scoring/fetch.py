"""``python -m eval fetch``: download an offline copy of tasks' data, to use with ``--data-root`` without a network.

* Each hub repository goes to ``DIR/<hub path>`` at the revision that mteb names. ``DIR/checksums.json`` records the
  SHA-256 of every file. ``--source`` copies from another offline copy instead of the hub.
* A repository is skipped if its revision and all its files match.
* A repository is written to a temporary folder and renamed. A folder with files that the checksums do not list is not
  replaced. Neither is another revision: tasks that want either one would be scored on the same data.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from mteb.abstasks.abstask import AbsTask

from anchor.errors import ConfigError, DataError, first_line
from eval.embedding.vectors import write_json
from eval.scoring.local_data import CHECKSUMS, holds_files, read_checksums
from eval.scoring.tasks import hub_datasets

log = logging.getLogger(__name__)


def fetch(tasks: Sequence[AbsTask], data_root: Path, source: Path | None = None) -> list[str]:
    """Copy the data of tasks into ``data_root``.

    Args:
        tasks: tasks to fetch data for.
        data_root: the offline copy.
        source: another offline copy to copy from; None for the hub.

    Returns:
        Hub paths that this call fetched.

    Raises:
        ConfigError: ``source`` is ``data_root``, or two revisions of a repository conflict.
        DataError: some repositories could not be fetched; the message names them all, and the rest are fetched.
    """
    if source is not None and source.resolve() == data_root.resolve():
        raise ConfigError(f"--source {source}: is --data-root itself; name another copy, or leave it out")
    sums = read_checksums(data_root)
    wanted = _one_revision_each(tasks, data_root, sums)
    fetched, failed = [], []
    for path, revision in wanted.items():
        known = sums.get(path, {"revision": None, "files": {}})
        if path in sums and known["revision"] == revision and not _wrong_files(data_root, path, known["files"]):
            continue
        folder, beside = data_root / path, data_root / f"{path}.unfinished"
        try:
            _refuse_foreign(path, folder, known["files"])
            _from_hub(path, revision, beside) if source is None else _from_copy(path, revision, beside, source)
        except DataError as error:
            failed.append(str(error))
            continue
        files = {str(file.relative_to(beside)): _sha256(file) for file in _files(beside)}
        sums[path] = {"revision": revision, "files": files}
        shutil.rmtree(folder, ignore_errors=True)
        # Write after each repository, so that an interrupted run keeps it, and before the rename, so that it is listed.
        write_json(data_root / CHECKSUMS, sums)
        os.replace(beside, folder)
        fetched.append(path)
        log.info("%s: %d files", folder, len(files))
    if failed:
        raise DataError(f"{data_root}: {len(failed)} of {len(wanted)} repositories are missing: {'; '.join(failed)}")
    return fetched


def _one_revision_each(tasks: Sequence[AbsTask], data_root: Path, sums: dict[str, Any]) -> dict[str, str | None]:
    """Return hub path -> revision of all repositories.

    Raises:
        ConfigError: tasks want two revisions of a repository, or a revision other than the one in ``data_root``.
    """
    wanted: dict[str, tuple[str | None, str]] = {}
    for task in tasks:
        name = task.metadata.name
        for path, revision in hub_datasets(task):
            other, by = wanted.setdefault(path, (revision, name))
            if other != revision:
                raise ConfigError(
                    f"{path}: {by} wants revision {other}, {name} wants {revision}; fetch them by two calls, each with "
                    "a --data-root of its own"
                )
            if path in sums and sums[path]["revision"] != revision and holds_files(data_root / path):
                raise ConfigError(
                    f"{data_root / path}: holds revision {sums[path]['revision']}, {name} wants {revision}; give "
                    "another --data-root, or delete the folder if no other task needs it"
                )
    return {path: revision for path, (revision, _) in wanted.items()}


def verify(data_root: Path) -> int:
    """Check every file of an offline copy; return the number of files.

    Raises:
        DataError: there are no checksums, or a file is missing or altered.
    """
    sums = read_checksums(data_root)
    if not sums:
        raise DataError(f"{data_root}: no {CHECKSUMS}; run `python -m eval fetch` with --data-root {data_root} first")
    wrong = [f for path, about in sums.items() for f in _wrong_files(data_root, path, about["files"])]
    if wrong:
        raise DataError(f"{data_root}: {len(wrong)} files are missing or altered: {', '.join(wrong)}; fetch again")
    return sum(len(about["files"]) for about in sums.values())


def _refuse_foreign(path: str, folder: Path, known: dict[str, str]) -> None:
    """Refuse to replace a folder with files that no fetch wrote."""
    foreign = [file for file in _files(folder) if str(file.relative_to(folder)) not in known]
    if foreign:
        raise DataError(f"{path} ({foreign[0]} is there and not listed in {CHECKSUMS}; move it away)")


def _from_copy(path: str, revision: str | None, beside: Path, source: Path) -> None:
    if not (source / path).is_dir():
        raise DataError(f"{path} (not in {source})")
    about = read_checksums(source).get(path)
    if about is not None and about["revision"] != revision:
        raise DataError(f"{path} ({source} has revision {about['revision']}, wanted is {revision})")
    if about is not None and (wrong := _wrong_files(source, path, about["files"])):
        raise DataError(f"{path} ({wrong[0]} is missing or altered)")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        shutil.copytree(source / path, beside)
    except shutil.Error as error:
        name, _, why = error.args[0][0]
        raise DataError(f"{path} ({name}: {why})") from error


def _from_hub(path: str, revision: str | None, beside: Path) -> None:
    try:
        snapshot_download(path, repo_type="dataset", revision=revision, local_dir=beside)
    except OSError as error:  # base class of the hub client's errors: no network, no such repository, no access
        raise DataError(f"{path} ({first_line(error)})") from error
    shutil.rmtree(beside / ".cache", ignore_errors=True)  # metadata of the hub client


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
