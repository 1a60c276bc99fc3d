"""Folders of data under names that the `datasets` library cannot mistake for one another.

That library keeps a prepared copy of a folder by the folder's last name. Where the folder's README.md lists its files
(``configs:``), as retrieval tasks need it, neither path nor content is part of the copy's name (datasets 5.2): another
folder of the same name, or the same folder after a change, would silently be read from the old copy.
"""

from contextlib import suppress
from pathlib import Path

import datasets.config
import xxhash

from anchor.data.retrieval_files import RETRIEVAL_FILES, RETRIEVAL_README


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
    (listed / "README.md").write_text(RETRIEVAL_README, encoding="utf-8")
    return listed
