"""``python -m data_prep pack`` and ``merge``: raw pairs -> packed shards.

1. Read, check and tokenise the input into ``work/part-III-of-NNN`` (:mod:`data_prep.packing.parts`). ``--part i/n``
   handles one of n parts, so that up to n machines share the work.
2. Combine all parts (:mod:`data_prep.packing.gathered`), drop duplicate pairs, shuffle each source
   (:mod:`data_prep.packing.shuffle`) and plan the epochs (:mod:`data_prep.packing.mixture`).
3. Write the batches (:mod:`data_prep.packing.shard_files`), then the tokenizer, then ``index.json``.
   :mod:`data_prep.packing.assemble` holds steps 2 and 3.

``pack`` runs all three steps, ``pack --part`` the first, ``merge`` the other two. The result is a pure function of the
recipe and the inputs, for any number of worker processes and parts. After an interruption, the next run keeps finished
units of step 1 and finished files of step 3. The units also survive a change to recipe keys that only steps 2 and 3
read. A lock beside ``work`` limits each part, and steps 2 and 3, to one process at a time.
"""

import hashlib
import logging
import shutil
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import Any

from anchor.config.load import load_recipe, validate
from anchor.config.pack_recipe import PackRecipe
from anchor.data.index import INDEX_NAME, Index, read_index
from anchor.data.positions import check_positions_of_folder
from anchor.data.templates import Template, resolve_template
from anchor.data.tokenization import SegmentTokenizer, prepare_tokenizer
from anchor.data.tokenizer_files import load_tokenizer
from anchor.errors import ConfigError, DataError
from anchor.locks import locked
from data_prep.packing.assemble import PLAN, WORK, PackRun, make_shards
from data_prep.packing.gathered import Gathered, find_parts, fingerprint
from data_prep.packing.parts import read_part
from data_prep.packing.shard_files import missing_files
from data_prep.packing.spool import PART, part_name, read_json, write_json
from data_prep.sources.streams import Source, resolve_sources
from data_prep.sources.units import UNIT_BYTES, UNIT_ROWS

log = logging.getLogger(__name__)

_INPUTS, _LOCK = "inputs.json", ".lock"
_PARTS, _MERGE = "part-*-of-*", "merge"
_READ = ("tokenizer", "template", "sources", "text", "on_bad_row")
"""Recipe keys that step 1 depends on; all parts of a run must agree on them."""


def pack(recipe_path: str, overrides: list[str], workers: int = 1, part: tuple[int, int] | None = None) -> Index | None:
    """Run the recipe, or step 1 for one of its parts.

    Args:
        recipe_path: YAML file.
        overrides: ``section.key=value`` strings.
        workers: number of processes; the shards do not depend on it.
        part: (part number from 0, number of parts); None runs everything.

    Returns:
        The new index, or the existing one if the folder is already finished with this recipe; None for a part.

    Raises:
        AnchorError: if the recipe is bad, a row is bad under ``on_bad_row: fail``, no pair is left, the folder belongs
            to another recipe, or another process is writing it.
    """
    recipe = load_recipe(recipe_path, PackRecipe, overrides)
    found = _finished(recipe)
    if found is not None and not (missing := missing_files(recipe.output_dir, found)):
        _refuse_other_input(recipe, recipe_path)
        return _complete(recipe.output_dir, found)
    sources = resolve_sources(recipe.sources, recipe_path)
    run = _run(recipe_path, recipe)
    number, parts = part or (0, 1)
    folder = _open_part(run, sources, number, parts)
    with _locked(run, folder.name):
        if found is None and (run.folder / INDEX_NAME).is_file():
            raise DataError(_busy(run))  # another process has just finished
        if found is not None:
            log.warning("%s: %s missing or of another size; packing again", run.folder, ", ".join(missing))
            (run.folder / INDEX_NAME).unlink(missing_ok=True)
        read_part(folder, sources, recipe, run.segmenter, part=number, parts=parts, workers=workers)
        if part is not None:
            log.info("%s: part %d of %d is finished; when all are, run `merge`", run.folder, number, parts)
            return None
        return _finish(run, workers)


def merge(recipe_path: str, overrides: list[str], workers: int = 1) -> Index:
    """Make shards from the parts that ``pack --part`` wrote, without reading the inputs again.

    Raises:
        AnchorError: if a part is missing, unfinished or duplicated, parts belong to different recipes, no pair is left,
            or another process is writing the folder.
    """
    recipe = load_recipe(recipe_path, PackRecipe, overrides)
    found = _finished(recipe)
    if found is not None and not missing_files(recipe.output_dir, found):
        return _complete(recipe.output_dir, found)
    return _finish(_run(recipe_path, recipe), workers)


def _run(path: str, recipe: PackRecipe) -> PackRun:
    check_positions_of_folder(recipe.tokenizer, recipe.text.max_tokens, f"{path}: text.max_tokens")
    tokenizer = load_tokenizer(recipe.tokenizer)
    template = _kept_template(recipe) or resolve_template(recipe.template, tokenizer, f"{path}: template")
    prepare_tokenizer(tokenizer, template, recipe.tokenizer)
    segmenter = SegmentTokenizer(tokenizer, template, recipe.text.max_tokens)
    return PackRun(path, recipe, recipe.model_dump(mode="json"), tokenizer, template, segmenter)


def _kept_template(recipe: PackRecipe) -> Template | None:
    """Return the template stored by a part of this recipe, if any: some chat templates contain the date."""
    for part in sorted((recipe.output_dir / WORK).glob(f"{_PARTS}/{PART}")):
        content = read_json(part)
        if content["recipe"] == _read_by(recipe.model_dump(mode="json")):
            return Template(**content["template"])
    return None


def _read_by(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe values that step 1 reads."""
    return {name: resolved[name] for name in _READ}


def _identity(run: PackRun) -> dict[str, Any]:
    """Return what all parts of a run share, apart from their input."""
    return {
        "recipe": _read_by(run.resolved),
        "template": run.template.to_json(),
        "tokenizer_sha256": hashlib.sha256(run.segmenter.backend.to_str().encode()).hexdigest(),
        "units": [UNIT_ROWS, UNIT_BYTES],
    }


def _finished(recipe: PackRecipe) -> Index | None:
    """Return the index of a folder that already has one, or None.

    Raises:
        DataError: if the folder belongs to another recipe.
    """
    if not (recipe.output_dir / INDEX_NAME).is_file():
        return None
    index = read_index(recipe.output_dir)
    if not _same_recipe(index.recipe, recipe):
        raise DataError(
            f"{recipe.output_dir}: already holds shards of another recipe; choose another output_dir or delete it"
        )
    return index


def _same_recipe(stored: dict[str, Any], recipe: PackRecipe) -> bool:
    """Return whether an index was made from this recipe; fields unknown to its version take their defaults."""
    with suppress(ConfigError):
        return validate(stored, PackRecipe, INDEX_NAME).model_dump(mode="json") == recipe.model_dump(mode="json")
    return False


def _inputs(sources: list[Source]) -> list[tuple[str, int]]:
    return [(str(file), file.stat().st_size) for source in sources for file in (*source.files, *source.local_copy)]


def _refuse_other_input(recipe: PackRecipe, recipe_path: str) -> None:
    """Refuse shards if input files were added or changed size since; deleted files do not matter."""
    kept = recipe.output_dir / _INPUTS
    if not kept.is_file():
        return
    with suppress(ConfigError):
        now = dict(_inputs(resolve_sources(recipe.sources, recipe_path)))
        before: dict[str, int] = dict(read_json(kept))
        for name in sorted({*now, *before}):
            if now.get(name) != before.get(name) and Path(name).is_file():
                was = f"had {before[name]:,} bytes" if name in before else "was not there"
                raise DataError(
                    f"{recipe.output_dir}: packed from other input: {name} {was}, has {Path(name).stat().st_size:,} "
                    "now; delete the folder or choose another output_dir"
                )


def _complete(folder: Path, index: Index) -> Index:
    _clear(folder)  # left by a run interrupted after its last file
    for lock in (*folder.glob(f"{_PARTS}{_LOCK}"), folder / f"{_MERGE}{_LOCK}"):
        lock.unlink(missing_ok=True)
    log.info("%s: already complete, %d batches", folder, index.num_batches)
    return index


def _clear(folder: Path) -> None:
    """Remove a run's work, and nothing else."""
    work = folder / WORK
    for made in (*work.glob(_PARTS), work / PLAN):
        shutil.rmtree(made, ignore_errors=True)
    with suppress(OSError):
        work.rmdir()


def _strange(folder: Path) -> list[Path]:
    """Return the paths in a folder that no run leaves there before its first part begins."""
    if not folder.is_dir():
        return []
    work = folder / WORK
    mine = {work, *folder.glob(f"{_PARTS}{_LOCK}"), folder / f"{_MERGE}{_LOCK}"}
    made = {*work.glob(_PARTS), work / PLAN}
    return [path for path in (*folder.iterdir(), *work.glob("*")) if path not in mine | made]


def _open_part(run: PackRun, sources: list[Source], part: int, parts: int) -> Path:
    """Return the folder of a part: an interrupted run's, if recipe and input are the same, or a new one."""
    content = {
        **_identity(run),
        "sources": [source.traits() for source in sources],
        "inputs": [list(one) for one in _inputs(sources)],
    }
    folder = run.work / part_name(part, parts)
    others = sorted(other for other in run.work.glob(_PARTS) if (other / PART).is_file())
    if not others and not (run.folder / INDEX_NAME).is_file():
        strange = _strange(run.folder)
        if strange:
            raise DataError(
                f"{run.folder}: not empty and not an unfinished run, it holds {strange[0].name}; choose another "
                "output_dir or delete it"
            )
    for other in others:
        found = read_json(other / PART)
        if found["recipe"] != content["recipe"]:
            raise DataError(
                f"{run.folder}: holds an unfinished run of another recipe, {_differing(found, content)}; delete it or "
                "choose another output_dir"
            )
        if found != content:
            raise DataError(f"{other}: its input, tokenizer or program is another than now; delete it and run again")
        if other.name.rpartition("-")[2] != folder.name.rpartition("-")[2]:
            raise DataError(
                f"{run.folder}: holds {other.name}, this run is part {part} of {parts}; finish that array of parts "
                f"with `merge`, or delete {run.work}"
            )
    if folder not in others:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PART, content)
    return folder


def _differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    names = [name for name in _READ if one["recipe"].get(name) != other["recipe"].get(name)]
    return f"{', '.join(names)} {'differs' if len(names) == 1 else 'differ'}"


def _locked(run: PackRun, name: str) -> AbstractContextManager[None]:
    # Beside `work`, because `work` is removed while the lock is held.
    return locked(run.folder / f"{name}{_LOCK}", _busy(run))


def _busy(run: PackRun) -> str:
    return f"{run.folder}: another process is packing it; wait for it or choose another output_dir"


def _finish(run: PackRun, workers: int) -> Index:
    """Run steps 2 and 3."""
    parts = find_parts(run.work, f"python -m data_prep pack {run.path}")
    made = read_json(parts[0] / PART)
    now = _identity(run)
    if made["recipe"] != now["recipe"]:
        raise DataError(
            f"{run.work}: holds parts of another recipe, {_differing(made, now)}; give merge the recipe and overrides "
            "of the parts"
        )
    wrong = [key for key in now if made.get(key) != now[key]]
    if wrong:
        raise DataError(
            f"{run.work}: its parts were made with another {wrong[0].partition('_')[0]} than {run.recipe.tokenizer} "
            f"and this program give now; put back what was there, or delete {run.work} and pack again"
        )
    with _locked(run, _MERGE):
        if not parts[0].is_dir():
            raise DataError(_busy(run))  # another process has just finished
        with closing(Gathered(parts, run.recipe.text.hard_negatives)) as gathered:
            write_json(run.folder / _INPUTS, made["inputs"])
            index = make_shards(run, gathered, made["sources"], fingerprint(parts, run.resolved), workers)
        _clear(run.folder)
    size = run.recipe.batch.pairs
    log.info("%s: %d batches of %d pairs in %d files", run.folder, index.num_batches, size, len(index.shards))
    return index
