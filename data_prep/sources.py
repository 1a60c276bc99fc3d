"""Recipe sections -> streams of rows, each with the place it came from for messages."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from anchor.config.schema import Columns, E5Source, FilesSource, HubSource
from anchor.errors import ConfigError, DataError, did_you_mean
from data_prep.e5 import E5_TRAITS

_JSON_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True, slots=True)
class Source:
    """One source of pairs: every batch comes from one of these.

    Attributes:
        name: name in the index and in the metrics.
        rows: opens a fresh stream of ``(where, row)``; a row that cannot be parsed is a :class:`DataError`.
        columns: names of the fields.
        instructions: none, one, or several that alternate by row.
        symmetric: whether documents carry the instruction too.
    """

    name: str
    rows: Callable[[], Iterator[tuple[str, Any]]]
    columns: Columns
    instructions: tuple[str, ...]
    symmetric: bool


def resolve_sources(sections: tuple[E5Source | FilesSource | HubSource, ...], where: str) -> list[Source]:
    """Turn the recipe's sections into sources; an E5 folder yields one per file.

    Raises:
        ConfigError: missing path, unknown source, two sources of one name.
    """
    sources: list[Source] = []
    for number, section in enumerate(sections):
        here = f"{where}: sources.{number}"
        if isinstance(section, E5Source):
            sources += _e5_sources(section, here)
        elif isinstance(section, FilesSource):
            files = _files(section.path, (*_JSON_SUFFIXES, ".parquet"), here)
            sources.append(_named(section, lambda files=files: _chain(files)))
        else:
            sources.append(_named(section, lambda section=section: _hub_rows(section)))
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{where}: two sources are called '{name}'; rename one")
    return sources


def _named(section: FilesSource | HubSource, rows: Callable[[], Iterator[tuple[str, Any]]]) -> Source:
    return Source(section.name, rows, section.columns, section.instructions, section.symmetric)


def _e5_sources(section: E5Source, where: str) -> list[Source]:
    by_name = {_stem(file): file for file in _files(section.path, _JSON_SUFFIXES, where)}
    for name in section.only or ():
        if name not in by_name:
            raise ConfigError(f"{where}: no source '{name}' in {section.path}{did_you_mean(name, by_name)}")
    for name in (*section.instructions, *section.symmetric):
        if name not in by_name:
            raise ConfigError(
                f"{where}: traits for '{name}', which is not in {section.path}{did_you_mean(name, by_name)}"
            )
    sources = []
    for name in section.only if section.only is not None else sorted(by_name):
        preset = E5_TRAITS.get(name)
        instructions = section.instructions.get(name, preset.instructions if preset else None)
        if instructions is None:
            raise ConfigError(
                f"{where}: source '{name}' has no instruction in the E5 preset; give sources.N.instructions.{name} "
                f"([] for none){did_you_mean(name, E5_TRAITS) if name not in E5_TRAITS else ''}"
            )
        symmetric = name in section.symmetric or (preset is not None and preset.symmetric)
        file = by_name[name]
        columns = Columns(negatives=("negative",))
        sources.append(Source(name, lambda file=file: _chain([file]), columns, instructions, symmetric))
    return sources


def _stem(file: Path) -> str:
    return file.name.split(".jsonl")[0]


def _files(path: Path, suffixes: tuple[str, ...], where: str) -> list[Path]:
    if path.is_file():
        if not path.name.endswith(suffixes):
            raise ConfigError(f"{where}: {path}: expected a file ending in {', '.join(suffixes)}")
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{where}: {path}: no such file or folder")
    files = sorted(file for file in path.iterdir() if file.name.endswith(suffixes))
    if not files:
        raise ConfigError(f"{where}: {path}: holds no file ending in {', '.join(suffixes)}")
    return files


def _chain(files: list[Path]) -> Iterator[tuple[str, Any]]:
    for file in files:
        yield from _parquet_rows(file) if file.suffix == ".parquet" else json_rows(file)


def json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """``(file:line, parsed row)`` of a JSON-lines file, gzipped or not; an unparsable line yields a DataError."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{file}:{number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    row = DataError(f"{where}: malformed JSON: {error.msg} at character {error.pos + 1}")
                except UnicodeDecodeError as error:
                    row = DataError(f"{where}: not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}")
                yield where, row
    except (OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{file}: row {number}", row
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from error


def _hub_rows(section: HubSource) -> Iterator[tuple[str, Any]]:
    import datasets  # half a second to import, and only this kind of source needs it
    from datasets.exceptions import DatasetsError

    try:
        data = datasets.load_dataset(section.dataset, section.config, split=section.split, streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"dataset {section.dataset}: cannot be loaded: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(data):
        yield f"{section.dataset}[{section.split}]: row {number}", row
