"""Recipe sections -> streams of rows, each with the place it came from for messages."""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from anchor.config.schema import Columns, E5Source, FilesSource, HubSource
from anchor.data.datasets_errors import differing_columns
from anchor.data.row_files import JSON_SUFFIXES, TABLE_SUFFIXES, Meter, Place, Row, raw_rows, refuse_zero_bytes
from anchor.errors import ConfigError, DataError, did_you_mean, first_line
from data_prep.e5 import E5_TRAITS
from data_prep.layouts import Layout, layout_of


@dataclass(frozen=True, slots=True)
class Source:
    """One source of pairs: every batch comes from one of these.

    Attributes:
        name: name in the index and in the metrics.
        rows: opens a fresh stream of rows that are not yet parsed; the meter is told how far it is.
        files: its files; none where `datasets` reads.
        local_copy: files of a local dataset that `datasets` reads.
        layout: of its rows.
        positives: which of several positives of a row are used, ``first`` or ``each``.
        instructions: none, one, or several that alternate by row.
        symmetric: whether documents carry the instruction too.
        weight: multiplies its share of the mixture.
        languages: of its texts.
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
        """Bytes of its files; 0 where `datasets` reads."""
        return sum(file.stat().st_size for file in self.files)

    def traits(self) -> dict[str, Any]:
        """What the index says of it beside counts."""
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
        ConfigError: missing path, unknown source, two sources of one name, a local folder's revision.
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
    """All but hidden ones; none of a folder that is not there."""
    paths = files_below(folder)
    return tuple(p for p in paths if not any(x.startswith(".") for x in p.relative_to(folder).parts))


def files_below(folder: Path) -> list[Path]:
    """All files of a folder at any depth, in the order of their names; linked folders are entered, each once."""
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
    """The files of an E5 folder by the names of their sources; of one file, itself.

    Raises:
        ConfigError: no such path, no JSON-lines file there, or two files of one source.
    """
    by_name: dict[str, Path] = {}
    for file in input_files(path, JSON_SUFFIXES, where):
        name = file.name.split(".jsonl")[0]
        if name in by_name:
            raise ConfigError(f"{where}: {path}: both {by_name[name].name} and {file.name} are '{name}'; remove one")
        by_name[name] = file
    return by_name


def input_files(path: Path, suffixes: tuple[str, ...], where: str) -> list[Path]:
    """A file, or those of a folder, whose names end as they should.

    Raises:
        ConfigError: no such path, no such file there, or one that is a folder or a link to nothing.
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
    import datasets  # half a second to import, and only this kind of source needs it
    from datasets.exceptions import DatasetsError

    for file in _visible_below(Path(section.dataset)):  # the library takes one for a file without rows
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
        ) as error:  # EOFError, zlib: a compressed file that is cut; TypeError: files whose columns differ in type
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
