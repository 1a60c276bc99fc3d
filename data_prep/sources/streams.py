"""Recipe sections -> streams of rows, each with its place of origin for messages."""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from anchor.config.pack_recipe import Columns, E5Source, FilesSource, HubSource
from anchor.data.datasets_errors import differing_columns
from anchor.data.row_files import JSON_SUFFIXES, TABLE_SUFFIXES, Meter, Place, Row, raw_rows, refuse_zero_bytes
from anchor.errors import ConfigError, DataError, did_you_mean, first_line
from data_prep.sources.e5 import E5_TRAITS
from data_prep.sources.layouts import Layout, layout_of


@dataclass(frozen=True, slots=True)
class Source:
    """Source of pairs; every batch comes from a single source.

    Attributes:
        name: name in the index and in the metrics.
        rows: opens a new stream of unparsed rows, which reports the bytes read to the meter.
        files: files of the source; empty if `datasets` reads it.
        local_copy: files of a local dataset that `datasets` reads.
        layout: layout of the rows.
        positives: which positives of a row to use, ``first`` or ``each``.
        instructions: none, one, or several that alternate by row.
        symmetric: True if documents carry the instruction too.
        weight: multiplies the source's share of the mixture.
        languages: languages of the texts.
    """

    name: str
    rows: Callable[[Meter], Iterator[Row]]
    files: tuple[Path, ...]
    local_copy: tuple[Path, ...]
    layout: Layout
    positives: str
    instructions: tuple[str, ...]
    symmetric: bool
    weight: float
    languages: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the source's files; 0 if `datasets` reads it."""
        return sum(file.stat().st_size for file in self.files)

    def traits(self) -> dict[str, Any]:
        """Return the source's entry in the index, without counts."""
        return {
            "name": self.name,
            "instructions": list(self.instructions),
            "symmetric": self.symmetric,
            "weight": self.weight,
            "languages": list(self.languages),
        }


def resolve_sources(sections: tuple[E5Source | FilesSource | HubSource, ...], where: str) -> list[Source]:
    """Turn the recipe's sections into sources; an E5 folder yields one per file.

    Raises:
        ConfigError: if a path is missing, a source is unknown, two sources share a name, or a local folder is given a
            revision.
    """
    sources: list[Source] = []
    for number, section in enumerate(sections):
        here = f"{where}: sources.{number}"
        if isinstance(section, E5Source):
            sources += _e5_sources(section, here)
        elif isinstance(section, FilesSource):
            files = tuple(input_files(section.path, TABLE_SUFFIXES, here))
            sources.append(_named(section, _reader(files, section.max_rows), files))
        else:
            if section.revision is not None and Path(section.dataset).exists():
                raise ConfigError(f"{here}: {section.dataset} is a local folder, which has no revision; remove it")
            sources.append(_named(section, lambda _, section=section: islice(_hub_rows(section), section.max_rows), ()))
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{where}: two sources are called '{name}'; rename one")
    return sources


def _named(section: FilesSource | HubSource, rows: Callable[[Meter], Iterator[Row]], files: tuple[Path, ...]) -> Source:
    return Source(
        name=section.name,
        rows=rows,
        files=files,
        local_copy=_visible_below(Path(section.dataset)) if isinstance(section, HubSource) else (),
        layout=layout_of(section),
        positives=section.positives,
        instructions=section.instructions,
        symmetric=section.symmetric,
        weight=section.weight,
        languages=section.languages,
    )


def _visible_below(folder: Path) -> tuple[Path, ...]:
    """Return all files below a folder except hidden ones; empty if the folder does not exist."""
    paths = files_below(folder)
    return tuple(p for p in paths if not any(x.startswith(".") for x in p.relative_to(folder).parts))


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted by path. Follow links to folders, but enter each folder once."""
    found, entered = [], set()
    for at, folders, files in os.walk(folder, followlinks=True):
        about = Path(at).stat()
        if (about.st_dev, about.st_ino) in entered:
            folders.clear()
            continue
        entered.add((about.st_dev, about.st_ino))
        found += [Path(at) / name for name in files if (Path(at) / name).is_file()]
    return sorted(found)


def _reader(files: Sequence[Path], max_rows: int | None) -> Callable[[Meter], Iterator[Row]]:
    def rows(meter: Meter) -> Iterator[Row]:
        for file in files:
            yield from raw_rows(file, meter)

    return lambda meter: islice(rows(meter), max_rows)


def _e5_sources(section: E5Source, where: str) -> list[Source]:
    by_name = e5_files(section.path, where)
    for name in section.only or ():
        if name not in by_name:
            raise ConfigError(f"{where}: no source '{name}' in {section.path}{did_you_mean(name, by_name)}")
    for name in (*section.instructions, *section.symmetric, *section.weights, *section.languages):
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
        sources.append(
            Source(
                name=name,
                rows=_reader([by_name[name]], section.max_rows),
                files=(by_name[name],),
                local_copy=(),
                layout=Layout(Columns(negatives=("negative",)), None),
                positives="first",
                instructions=instructions,
                symmetric=section.symmetric_documents == "instruction"
                and (name in section.symmetric or (preset is not None and preset.symmetric)),
                weight=section.weights.get(name, 1.0),
                languages=section.languages.get(name, preset.languages if preset else ()),
            )
        )
    return sources


def e5_files(path: Path, where: str) -> dict[str, Path]:
    """Return the files of an E5 folder by source name, or the single file given.

    Raises:
        ConfigError: if the path does not exist, holds no JSON-lines file, or has two files for one source.
    """
    by_name: dict[str, Path] = {}
    for file in input_files(path, JSON_SUFFIXES, where):
        name = file.name.split(".jsonl")[0]
        if name in by_name:
            raise ConfigError(f"{where}: {path}: both {by_name[name].name} and {file.name} are '{name}'; remove one")
        by_name[name] = file
    return by_name


def input_files(path: Path, suffixes: tuple[str, ...], where: str) -> list[Path]:
    """Return the file, or a folder's files with the right suffixes.

    Raises:
        ConfigError: if the path does not exist, holds no such file, or one of them is a folder or a broken link.
    """
    if path.is_file():
        if not path.name.endswith(suffixes):
            raise ConfigError(f"{where}: {path}: expected a file ending in {', '.join(suffixes)}")
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{where}: {path}: no such file or folder")
    files = sorted(file for file in path.iterdir() if file.name.endswith(suffixes))
    if not files:
        raise ConfigError(f"{where}: {path}: holds no file ending in {', '.join(suffixes)}")
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{where}: {file}: a folder, or a link to a file that is not there; mend or remove it")
    return files


def _hub_rows(section: HubSource) -> Iterator[Row]:
    import datasets  # takes half a second to import; only this kind of source needs it
    from datasets.exceptions import DatasetsError

    for file in _visible_below(Path(section.dataset)):  # the library would read it as a file without rows
        refuse_zero_bytes(file)
    try:
        data = datasets.load_dataset(
            section.dataset, section.config, split=section.split, revision=section.revision, streaming=True
        )
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"dataset {section.dataset}: cannot be loaded: {first_line(error)}") from error
    rows, number = iter(data), 0
    while True:
        try:
            row = next(rows, None)
        except (
            OSError,
            EOFError,
            zlib.error,
            ValueError,
            TypeError,
            DatasetsError,
        ) as error:  # EOFError, zlib: a truncated compressed file; TypeError: files whose columns differ in type
            differing = differing_columns(error)
            advice = f"; {_files_advice(section)}" if differing else ""
            raise DataError(
                f"dataset {section.dataset}: row {number} of split {section.split} cannot be read: "
                f"{differing or first_line(error)}{advice}"
            ) from error
        if row is None:
            return
        yield Row(Place(f"{section.dataset}[{section.split}]", number, "row"), row)
        number += 1


def _files_advice(section: HubSource) -> str:
    files = f"path: {section.dataset}" if Path(section.dataset).exists() else "path: FOLDER of its downloaded files"
    return f"read it with kind: files, {files}, which takes rows of any columns"
