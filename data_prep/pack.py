"""``python -m data_prep pack``: raw pairs -> packed shards.

1. Per source: read rows, check, tokenise in chunks, append to a spool on disk.
2. Per source: shuffle the pairs, cut them into batches of ``batch.pairs``, drop the remainder, cut each batch
   into packs.
3. Shuffle the batches of all sources, write them, then the tokenizer, then ``index.json``.

Everything is a pure function of the recipe and the inputs. What was finished in step 1 is kept when the program
is run again after an interruption.
"""

import json
import logging
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from anchor.config.load import load_recipe
from anchor.config.schema import PackRecipe
from anchor.data.packing import plan_packs
from anchor.data.records import Pair, pair_from_row
from anchor.data.shards import (
    FORMAT_VERSION,
    INDEX_NAME,
    Index,
    ShardWriter,
    make_batch,
    read_index,
    text_id,
)
from anchor.data.templates import Template, resolve_template
from anchor.data.tokenization import (
    SegmentTokenizer,
    load_tokenizer,
    prepare_tokenizer,
    tokenizer_fingerprint,
)
from anchor.errors import DataError
from data_prep.progress import tracked
from data_prep.sources import Source, resolve_sources
from data_prep.spool import Spool, SpoolWriter

log = logging.getLogger(__name__)

_CHUNK_ROWS = 1024
_WORK, _MARK = "work", "recipe.json"


@dataclass(slots=True)
class _Reading:
    """Counts of one source while it is read."""

    rows_read: int
    dropped: Counter[str]
    truncated: int
    tokens: int


def pack(recipe_path: str, overrides: list[str]) -> Index:
    """Run the recipe.

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
    spools = {source.name: _spool_source(source, recipe, segmenter, work) for source in sources}

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


def _spool_source(source: Source, recipe: PackRecipe, segmenter: SegmentTokenizer, work: Path) -> Spool:
    folder = work / source.name
    if not (folder / "done.json").is_file():
        reading = _Reading(0, Counter(), 0, 0)
        aside = work.parent / f"quarantine-{source.name}.jsonl"
        with closing(SpoolWriter(folder)) as writer, aside.open("w", encoding="utf-8") as quarantine:
            for chunk in _chunks(source, recipe, reading, quarantine):
                _tokenise(chunk, segmenter, writer, reading, recipe, quarantine)
        if not reading.dropped:
            aside.unlink()
        writer.finish(
            {
                "rows_read": reading.rows_read,
                "dropped": dict(sorted(reading.dropped.items())),
                "truncated_texts": reading.truncated,
                "tokens": reading.tokens,
            }
        )
        log.info("%s: %d rows read, %d dropped", source.name, reading.rows_read, sum(reading.dropped.values()))
    return Spool(folder)


def _chunks(
    source: Source, recipe: PackRecipe, reading: _Reading, quarantine: TextIO
) -> Iterator[list[tuple[str, Pair]]]:
    chunk: list[tuple[str, Pair]] = []
    for number, (where, row) in enumerate(tracked(source.rows(), f"reading {source.name}", None)):
        reading.rows_read += 1
        try:
            if isinstance(row, DataError):
                raise row
            pair = pair_from_row(
                row,
                where=where,
                number=number,
                source=source.name,
                columns=source.columns,
                instructions=source.instructions,
                symmetric=source.symmetric,
                hard_negatives=recipe.text.hard_negatives,
            )
        except DataError as error:
            _refuse(error, where, recipe, reading, quarantine)
            continue
        chunk.append((where, pair))
        if len(chunk) == _CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _tokenise(
    chunk: list[tuple[str, Pair]],
    segmenter: SegmentTokenizer,
    writer: SpoolWriter,
    reading: _Reading,
    recipe: PackRecipe,
    quarantine: TextIO,
) -> None:
    for (where, pair), segments in zip(chunk, segmenter.pairs([pair for _, pair in chunk]), strict=True):
        if isinstance(segments, DataError):
            _refuse(DataError(f"{where}: {segments}"), where, recipe, reading, quarantine)
            continue
        reading.truncated += sum(segment.truncated for segment in segments)
        reading.tokens += sum(len(segment.input_ids) for segment in segments)
        writer.add(pair.row, segments, [text_id(text) for text in pair.texts()])


def _refuse(error: DataError, where: str, recipe: PackRecipe, reading: _Reading, quarantine: TextIO) -> None:
    if recipe.on_bad_row == "fail":
        raise error
    reason = str(error).removeprefix(f"{where}: ")
    reading.dropped[reason.split(";")[0].split(":")[0]] += 1
    quarantine.write(json.dumps({"where": where, "reason": reason}, ensure_ascii=False) + "\n")


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
