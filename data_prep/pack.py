"""``python -m data_prep pack``: raw pairs -> packed shards.

1. Per source: read rows, check, tokenise in chunks, append to a spool on disk (:mod:`data_prep.reading`).
2. Per source: shuffle the pairs, cut them into batches of ``batch.pairs``, drop the remainder, cut each batch
   into packs.
3. Shuffle the batches of all sources, write them, then the tokenizer, then ``index.json``.

Everything is a pure function of the recipe and the inputs, for any number of worker processes. What was finished in
step 1 is kept when the program is run again after an interruption.
"""

import json
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from anchor.config.load import load_recipe
from anchor.config.schema import PackRecipe
from anchor.data.packing import plan_packs
from anchor.data.shards import (
    FORMAT_VERSION,
    INDEX_NAME,
    Index,
    ShardWriter,
    make_batch,
    read_index,
)
from anchor.data.templates import Template, resolve_template
from anchor.data.tokenization import (
    SegmentTokenizer,
    load_tokenizer,
    prepare_tokenizer,
    tokenizer_fingerprint,
)
from anchor.errors import DataError
from data_prep.checking import open_workers
from data_prep.progress import tracked
from data_prep.reading import spool_source
from data_prep.sources import Source, resolve_sources
from data_prep.spool import Spool

log = logging.getLogger(__name__)

_WORK, _MARK = "work", "recipe.json"


def pack(recipe_path: str, overrides: list[str], workers: int = 1) -> Index:
    """Run the recipe.

    Args:
        recipe_path: YAML file.
        overrides: ``section.key=value``.
        workers: processes that check and tokenise; the shards do not depend on it.

    Returns:
        The index written, or the one found when the folder is finished and of the same recipe.

    Raises:
        AnchorError: bad recipe, bad row under ``on_bad_row: fail``, no pair left, folder of another recipe.
    """
    recipe = load_recipe(recipe_path, PackRecipe, overrides)
    resolved = recipe.model_dump(mode="json")
    folder = recipe.output_dir
    if (folder / INDEX_NAME).is_file():
        index = read_index(folder)
        if index.recipe != resolved:
            raise DataError(f"{folder}: already holds shards of another recipe; choose another output_dir or delete it")
        missing = _missing_files(folder, index)
        if not missing:
            shutil.rmtree(folder / _WORK, ignore_errors=True)  # of a run that was interrupted after its last file
            log.info("%s: already complete, %d batches", folder, index.num_batches)
            return index
        log.warning("%s: %s missing or of another size; packing again", folder, ", ".join(missing))
        _begin(folder / _WORK, resolved)
        (folder / INDEX_NAME).unlink()
    sources = resolve_sources(recipe.sources, recipe_path)
    tokenizer = load_tokenizer(recipe.tokenizer)
    template = resolve_template(recipe.template, tokenizer, f"{recipe_path}: template")
    prepare_tokenizer(tokenizer, template, recipe.tokenizer)
    segmenter = SegmentTokenizer(tokenizer, template, recipe.text.max_tokens)
    work = _open_work_folder(folder, resolved)

    # 1. Read and tokenise.
    with open_workers(workers, segmenter) as worker:
        spools = {source.name: spool_source(source, recipe, worker, work) for source in sources}

    # 2. Plan batches.
    plan, summaries = _plan_batches(sources, spools, recipe)
    if not plan:
        counts = ", ".join(f"{name} {spool.num_pairs}" for name, spool in spools.items())
        raise DataError(
            f"{recipe_path}: no batch can be made: batch.pairs is {recipe.batch.pairs}, pairs left per source are "
            f"{counts}; lower batch.pairs or add data"
        )

    # 3. Write.
    index = _write(folder, plan, spools, recipe, resolved, template, segmenter, tokenizer, summaries)
    shutil.rmtree(work)
    log.info("%s: %d batches of %d pairs in %d files", folder, index.num_batches, recipe.batch.pairs, len(index.shards))
    return index


def _missing_files(folder: Path, index: Index) -> list[str]:
    names = {shard["file"]: shard["bytes"] for shard in index.shards}
    gone = [n for n, size in names.items() if not (folder / n).is_file() or (folder / n).stat().st_size != size]
    return gone + ["tokenizer"] * (not (folder / "tokenizer" / "tokenizer.json").is_file())


def _begin(work: Path, resolved: dict[str, Any]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    (work / _MARK).write_text(json.dumps(resolved), encoding="utf-8")


def _open_work_folder(folder: Path, resolved: dict[str, Any]) -> Path:
    """The folder of spools; kept from an interrupted run of the same recipe, else made anew."""
    work = folder / _WORK
    mark = work / _MARK
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == resolved:
        log.info("%s: continuing an interrupted run", folder)
        return work
    if folder.is_dir() and any(folder.iterdir()) and not mark.is_file():
        raise DataError(f"{folder}: not empty and not an unfinished run; choose another output_dir or delete it")
    if work.exists():
        raise DataError(f"{folder}: holds an unfinished run of another recipe; delete it or choose another output_dir")
    _begin(work, resolved)
    return work


def _plan_batches(
    sources: list[Source], spools: dict[str, Spool], recipe: PackRecipe
) -> tuple[list[tuple[str, np.ndarray]], list[dict[str, Any]]]:
    """Batches as (source, pairs), in the order in which they are written, and the per-source summaries."""
    plan: list[tuple[str, np.ndarray]] = []
    summaries = []
    for source in sources:
        spool = spools[source.name]
        # Seeded by name, so that adding a source does not reshuffle the others.
        order = np.random.default_rng([recipe.seed, zlib.crc32(source.name.encode())]).permutation(spool.num_pairs)
        batches = spool.num_pairs // recipe.batch.pairs
        plan += [
            (source.name, batch) for batch in order[: batches * recipe.batch.pairs].reshape(batches, recipe.batch.pairs)
        ]
        summaries.append(
            {
                "name": source.name,
                "instructions": list(source.instructions),
                "symmetric": source.symmetric,
                **spool.summary,
                "kept": spool.num_pairs,
                "batches": batches,
                "remainder_pairs": spool.num_pairs - batches * recipe.batch.pairs,
            }
        )
    shuffled = np.random.default_rng([recipe.seed]).permutation(len(plan))
    return [plan[i] for i in shuffled], summaries


def _write(
    folder: Path,
    plan: list[tuple[str, np.ndarray]],
    spools: dict[str, Spool],
    recipe: PackRecipe,
    resolved: dict[str, Any],
    template: Template,
    segmenter: SegmentTokenizer,
    tokenizer: Any,
    summaries: list[dict[str, Any]],
) -> Index:
    writer = ShardWriter(folder)
    shape = recipe.batch
    for name, pairs in tracked(plan, "packing batches", len(plan)):
        spool = spools[name]
        members = plan_packs(spool.pair_tokens[pairs].tolist(), shape.pack_tokens, shape.pack_multiple)
        writer.write(make_batch([spool.pack(pairs[np.asarray(m)]) for m in members], name))
    writer.close()
    tokenizer.save_pretrained(folder / "tokenizer")
    index = Index(
        version=FORMAT_VERSION,
        tokenizer_sha256=tokenizer_fingerprint(folder / "tokenizer"),
        anchor_token_id=segmenter.anchor_token_id,
        template=template.to_json(),
        recipe=resolved,
        sources=summaries,
        prompts=_prompts(template, summaries, recipe.prompts),
        shards=writer.shards,
    )
    index.write(folder)
    return index


def _prompts(template: Template, summaries: list[dict[str, Any]], instructions: dict[str, str]) -> dict[str, str]:
    """Prompts of an exported model: `document` is bare, `query` the largest source's unless the recipe says."""
    largest = max(summaries, key=lambda s: s["kept"])["instructions"]
    default = {"query": template.instruction_head(largest[0]) if largest else "", "document": ""}
    return default | {name: template.instruction_head(text) for name, text in instructions.items()}
