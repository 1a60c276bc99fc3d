"""Make a study's data once, in ``data/`` of its working folder. The folder keeps its settings and refuses others.

1. ``retrieval/``: the retrieval task, made of the first paragraphs of a source that is never trained on, and questions
   on them.
2. ``clean/``: the training pairs without those that repeat an evaluation text (``data_prep decontaminate``).
3. ``split/``: ``train/`` and ``heldout/`` from :func:`split_pairs`, and ``decoded.jsonl`` drawn from the held-out
   pairs. They appear together.
4. ``shards/``, ``heldout_shards/``: both parts packed (``data_prep pack``).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor.config.load import load_recipe
from anchor.config.pack_recipe import E5Source, PackRecipe
from anchor.errors import ConfigError, DataError
from bench.study.programs import locked, run
from bench.study.recipe import StudyRecipe
from bench.study.settings import keep_settings
from data_prep.documentation.retrieval_task import write_jsonl, write_retrieval_task
from data_prep.new_folder import new_folder
from data_prep.sources.e5_rows import SIDES, negatives_of, read_lines
from data_prep.sources.streams import e5_files
from eval.embedding.vectors import file_xxh3

log = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StudyData:
    """Paths of a study's data.

    Attributes:
        folder: the working folder's ``data``.
    """

    folder: Path

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def heldout_shards(self) -> Path:
        return self.folder / "heldout_shards"

    @property
    def retrieval(self) -> Path:
        return self.folder / "retrieval"

    @property
    def decoded(self) -> Path:
        return self.folder / "split/decoded.jsonl"


def pack_recipe(study: StudyRecipe) -> PackRecipe:
    """Return the pack recipe of a scale; its folders are still those of the file.

    Raises:
        ConfigError: the recipe is unusable, or does not have exactly one source in the E5 layout that names its files.
    """
    path = study.recipes / "pack.yaml"
    recipe = load_recipe(path, PackRecipe, [*study.pack, f"tokenizer={study.base}"])
    source = recipe.sources[0]
    if len(recipe.sources) != 1 or not isinstance(source, E5Source) or source.only is None:
        raise ConfigError(f"{path}: sources: expected one of kind e5 that names its files in only")
    return recipe


def prepare(study: StudyRecipe) -> StudyData:
    """Make the data that is missing.

    Raises:
        AnchorError: data is missing or unusable, or a command failed.
    """
    data = StudyData(study.work_dir / "data")
    with locked(data.folder) as lock:
        recipe = pack_recipe(study)
        if study.heldout_pairs < recipe.batch.pairs:
            raise ConfigError(
                f"heldout_pairs is {study.heldout_pairs}, expected at least the {recipe.batch.pairs} pairs of a batch "
                "(pack: batch.pairs), better some more: a pair without tokens makes none"
            )
        keep_settings(data.folder, data_settings(study, recipe))
        if not data.retrieval.exists():
            _retrieval_task(study, data)
        if not (data.folder / "split").exists():
            _split(study, data, recipe, lock)
        for name, shards in (("train", data.shards), ("heldout", data.heldout_shards)):
            _pack(study, data, recipe, name, shards, lock)
    return data


def data_settings(study: StudyRecipe, recipe: PackRecipe) -> dict[str, Any]:
    """Return all settings that decide a study's data, with each input file's hash."""
    source = recipe.sources[0]
    files = e5_files(study.pairs, str(study.pairs))
    used = (*(source.only or ()), study.retrieval_source) if isinstance(source, E5Source) else ()
    section = study.evaluation
    return {
        "base": study.base,
        "pack": recipe.model_dump(mode="json", exclude={"output_dir", "tokenizer", "sources"}),
        "source": source.model_dump(mode="json", exclude={"path"}),
        "pairs": {name: file_xxh3(files[name]) for name in used if name in files},
        "mteb": [path.name for path in _tasks(study)],
        "heldout_pairs": study.heldout_pairs,
        "retrieval_source": study.retrieval_source,
        "retrieval_queries": section.retrieval_queries,
        "retrieval_documents": section.retrieval_documents,
        "decoded_pairs": section.decoded_pairs,
    }


def _tasks(study: StudyRecipe) -> list[Path]:
    return sorted(path for path in (study.mteb / "mteb").glob("*") if path.is_dir())


def _retrieval_task(study: StudyRecipe, data: StudyData) -> None:
    files = e5_files(study.pairs, str(study.pairs))
    if study.retrieval_source not in files:
        raise DataError(f"{study.pairs}: no {study.retrieval_source}.jsonl[.gz]; the retrieval task is made of it")
    section = study.evaluation
    documents: dict[str, str] = {}
    answerable: list[tuple[str, str]] = []
    for row in _rows(files[study.retrieval_source]):
        if row["positive"] not in documents and len(documents) < section.retrieval_documents:
            documents[row["positive"]] = f"d{len(documents)}"
        if row["positive"] in documents:
            answerable.append((row["query"], documents[row["positive"]]))
    chosen = answerable[:: max(1, len(answerable) // section.retrieval_queries)][: section.retrieval_queries]
    queries = {f"q{i}": query for i, (query, _) in enumerate(chosen)}
    relevant = {f"q{i}": document for i, (_, document) in enumerate(chosen)}
    with new_folder(data.retrieval) as folder:
        write_retrieval_task(folder, {i: text for text, i in documents.items()}, queries, relevant)


def _split(study: StudyRecipe, data: StudyData, recipe: PackRecipe, lock: int) -> None:
    source = recipe.sources[0]
    only = source.only or () if isinstance(source, E5Source) else ()
    if study.retrieval_source in only:
        raise ConfigError(f"{study.recipes / 'pack.yaml'}: trains on {study.retrieval_source}, the retrieval task")
    clean = data.folder / "clean"
    if not clean.exists():
        command = ["python", "-m", "data_prep", "decontaminate", str(study.pairs), "--output", str(clean), "--against"]
        run([*command, *map(str, [*_tasks(study), data.retrieval])], study.work_dir / "logs/prepare.log", lock)
    files = e5_files(clean, str(clean))
    if absent := [name for name in only if name not in files]:
        raise DataError(f"{study.pairs}: no {absent[0]}.jsonl[.gz]")
    parts = split_pairs({name: _rows(files[name]) for name in only}, study.heldout_pairs)
    decoded: list[Row] = []
    with new_folder(data.folder / "split") as folder:
        for part in ("train", "heldout"):
            (folder / part).mkdir()
        for name, (training, heldout) in parts.items():
            write_jsonl(folder / "train" / f"{name}.jsonl", training)
            write_jsonl(folder / "heldout" / f"{name}.jsonl", heldout)
            decoded += _evenly(heldout, -(-study.evaluation.decoded_pairs // len(only)))
        write_jsonl(folder / data.decoded.name, _evenly(decoded, study.evaluation.decoded_pairs))


def split_pairs(sources: Mapping[str, Sequence[Row]], heldout_pairs: int) -> dict[str, tuple[list[Row], list[Row]]]:
    """Split every source into training pairs and held-out pairs; the last ones are held out.

    A pair of any source that holds a held-out query or positive, as query, positive or negative, is in neither.

    Raises:
        DataError: a source has no training pair left.
    """
    heldout = {name: list(rows[-heldout_pairs:]) for name, rows in sources.items()}
    texts = {_words(row[side]) for rows in heldout.values() for row in rows for side in SIDES}
    out = {}
    for name, rows in sources.items():
        rest = rows[:-heldout_pairs]
        training = [row for row in rest if texts.isdisjoint(map(_words, (row[s] for s in SIDES)))]
        training = [row for row in training if texts.isdisjoint(map(_words, negatives_of(row)))]
        log.info(
            "%s: %d of %d training pairs hold a held-out text, left out", name, len(rest) - len(training), len(rest)
        )
        if not training:
            raise DataError(
                f"{name}: {len(rows)} pairs, of which {len(heldout[name])} are held out; none of the others is without "
                "a text of those; lower heldout_pairs"
            )
        out[name] = (training, heldout[name])
    return out


def _words(text: str) -> str:
    """Return the words of a text in lower case with single spaces; texts with equal words count as the same."""
    return " ".join(text.lower().split())


def _rows(file: Path) -> list[Row]:
    return [line.row for line in read_lines(file, f"reading {file.name}") if line.row is not None]


def _evenly(rows: list[Row], number: int) -> list[Row]:
    """Return ``number`` of the rows, spread evenly."""
    return [rows[i * len(rows) // number] for i in range(min(number, len(rows)))]


def _pack(study: StudyRecipe, data: StudyData, recipe: PackRecipe, name: str, shards: Path, lock: int) -> None:
    if (shards / "index.json").is_file():
        return
    source = recipe.sources[0].model_dump(mode="json", exclude_defaults=True)
    sources = json.dumps([source | {"kind": "e5", "path": str(data.folder / "split" / name)}])
    overrides = [*study.pack, f"tokenizer={study.base}", f"output_dir={shards}", f"sources={sources}"]
    run(
        ["python", "-m", "data_prep", "pack", str(study.recipes / "pack.yaml"), *overrides],
        study.work_dir / "logs/prepare.log",
        lock,
    )
