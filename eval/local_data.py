"""Folders of data under names that the `datasets` library cannot mistake for one another.

That library keeps a prepared copy of a folder by the folder's last name. Where the folder's README.md lists its files
(``configs:``), as retrieval tasks need it, neither path nor content is part of the copy's name (datasets 5.2): another
folder of the same name, or the same folder after a change, would silently be read from the old copy.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets.config
import xxhash

from anchor.errors import DataError

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
