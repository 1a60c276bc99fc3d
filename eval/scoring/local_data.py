"""Local data folders under names that the `datasets` library cannot confuse.

The library caches a prepared copy of a folder under the folder's last path component. If the folder's README.md lists
its files (``configs:``), as retrieval tasks require, the cache key includes neither path nor content (datasets 5.2).
Another folder of the same name, or the same folder after a change, would silently be read from the old copy.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets.config
import xxhash

from anchor.errors import DataError

CHECKSUMS = "checksums.json"
"""File in an offline copy that maps hub path to revision and SHA-256 of its files."""


def read_checksums(data_root: Path) -> dict[str, Any]:
    """Return the content of the checksum file; empty if there is no file.

    Raises:
        DataError: the file is not readable.
    """
    file = data_root / CHECKSUMS
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not readable ({error}); delete it and fetch again") from error


def holds_files(folder: Path) -> bool:
    """Return whether the folder holds any file, at any depth."""
    return folder.is_dir() and any(path.is_file() for path in folder.rglob("*"))


def data_hash(folder: Path) -> str:
    """Return a hash of the folder's path and its files' names, sizes and modification times."""
    folder = folder.resolve()
    digest = xxhash.xxh3_64(str(folder).encode())
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        about = file.stat()
        digest.update(f"{file.relative_to(folder)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def distinct_path(folder: Path) -> Path:
    """Return a link to the folder; the link's name ends in the folder's :func:`data_hash`.

    The link lies in the library's cache, next to the prepared copies.

    Args:
        folder: the data folder.
    """
    folder = folder.resolve()
    links = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / ".anchor-folders"
    links.mkdir(parents=True, exist_ok=True)
    link = links / f"{folder.name}-{data_hash(folder)}"
    with suppress(FileExistsError):  # an earlier run or another rank made it
        link.symlink_to(folder, target_is_directory=True)
    return link
