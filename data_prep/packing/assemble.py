"""Assemble gathered parts into shard files, tokenizer, quarantines and ``index.json`` (steps 2 and 3 of ``pack``)."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor.config.pack_recipe import PackRecipe
from anchor.data.index import FORMAT_VERSION, Index
from anchor.data.templates import Template
from anchor.data.tokenization import SegmentTokenizer, end_token_id
from anchor.data.tokenizer_files import tokenizer_fingerprint
from anchor.errors import DataError
from data_prep.packing.gathered import Gathered, SourceUnits
from data_prep.packing.mixture import Share, shares
from data_prep.packing.shard_files import make_plan, write_shards
from data_prep.packing.shuffle import Kept, keep_first
from data_prep.packing.spool import read_json, write_json

log = logging.getLogger(__name__)

WORK = "work"
"""Folder for unfinished work, inside the folder of shards."""
PLAN = "plan"
"""Folder for the plan, inside the work folder."""
_MARK = "parts.json"
DUPLICATE = "equal to an earlier pair"
"""Reason for dropping a pair that :func:`data_prep.packing.shuffle.keep_first` leaves out."""


@dataclass(frozen=True, slots=True)
class PackRun:
    """Recipe and the objects built from it.

    Attributes:
        path: path of the recipe, for messages.
        recipe: validated recipe.
        resolved: recipe with all defaults, as stored in the index.
        tokenizer: tokenizer with the template in its post-processor.
        template: text around every text.
        segmenter: turns texts into segments.
    """

    path: str
    recipe: PackRecipe
    resolved: dict[str, Any]
    tokenizer: Any
    template: Template
    segmenter: SegmentTokenizer

    @property
    def folder(self) -> Path:
        return self.recipe.output_dir

    @property
    def work(self) -> Path:
        return self.recipe.output_dir / WORK


def make_shards(run: PackRun, gathered: Gathered, traits: list[dict[str, Any]], parts: str, workers: int) -> Index:
    """Plan and write a complete folder of shards.

    Args:
        run: recipe and what is built from it.
        gathered: parts of the folder.
        traits: traits of every source, for the index.
        parts: fingerprint of the parts and the recipe; a plan with another fingerprint is made again.
        workers: number of processes.

    Raises:
        DataError: if too many rows are unusable, no batch can be made, or the disk is too full.
    """
    folder = _open_plan(run.work / PLAN, parts)
    for name, units in gathered.sources.items():
        _quarantine(run, gathered, name, units)
    kept = {name: keep_first(gathered, name, folder, f"source{i}") for i, name in enumerate(gathered.sources)}
    for name, found in kept.items():
        _log_source(name, gathered.sources[name], found)
    weights = {one["name"]: one["weight"] for one in traits}
    mixed = shares({name: found.pairs for name, found in kept.items()}, weights, run.recipe)
    if not any(share.per_epoch for share in mixed.values()):
        counts = ", ".join(f"{name} {found.pairs}" for name, found in kept.items())
        raise DataError(
            f"{run.path}: no batch can be made: batch.pairs is {run.recipe.batch.pairs}, pairs left per source are "
            f"{counts}; lower batch.pairs or add data"
        )
    _refuse_full_disk(run, kept, mixed)
    shards = write_shards(make_plan(gathered, kept, mixed, run.recipe, run.folder, folder), workers)
    summaries = [
        _summary(one, gathered.sources[one["name"]], kept[one["name"]], mixed[one["name"]], run.recipe)
        for one in traits
    ]
    return _write_index(run, summaries, shards)


def _open_plan(folder: Path, parts: str) -> Path:
    """Return the folder of the plan, emptied unless it was made from these parts."""
    mark = folder / _MARK
    if not mark.is_file() or read_json(mark) != parts:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_json(mark, parts)
    return folder


def _quarantine(run: PackRun, gathered: Gathered, name: str, units: SourceUnits) -> None:
    """Write a source's unusable rows to a file, and refuse the source if there are too many.

    Raises:
        DataError: if their share is above ``max_skipped_fraction``.
    """
    aside = run.folder / f"quarantine-{name}.jsonl"
    aside.unlink(missing_ok=True)
    lines = 0
    if units.quarantine:
        with aside.open("wb") as file:
            for block in gathered.quarantine(name):
                file.write(block)
                lines += block.count(b"\n")
    allowed = run.recipe.max_skipped_fraction
    if lines > allowed * units.num_rows:
        raise DataError(
            f"{aside}: {lines} of {units.num_rows} rows of source '{name}' cannot be used, more than "
            f"max_skipped_fraction ({allowed:g}); mend the source or raise max_skipped_fraction"
        )


def _refuse_full_disk(run: PackRun, kept: dict[str, Kept], mixed: dict[str, Share]) -> None:
    """Refuse epochs and weights whose token ids do not fit on the free disk, before planning them."""
    passes = {name: share.per_epoch * run.recipe.epochs / (share.per_pass or 1) for name, share in mixed.items()}
    needed = sum(4 * found.tokens * passes[name] for name, found in kept.items())
    free = shutil.disk_usage(run.folder).free + sum(file.stat().st_size for file in run.folder.glob("*.arrow"))
    if needed > free:
        raise DataError(
            f"{run.folder}: the shards need {needed / 2**30:,.1f} GiB, {free / 2**30:,.1f} GiB are free; free some "
            f"disk, or lower epochs ({run.recipe.epochs}) or the sources' weights"
        )


def _dropped(units: SourceUnits, kept: Kept) -> dict[str, int]:
    equal = units.num_pairs - kept.pairs
    return dict(sorted({**units.dropped, **({DUPLICATE: equal} if equal else {})}.items()))


def _log_source(name: str, units: SourceUnits, kept: Kept) -> None:
    dropped = ", ".join(f"{reason}: {count}" for reason, count in _dropped(units, kept).items())
    log.info(
        "%s: %d rows read, %d pairs kept%s", name, units.num_rows, kept.pairs, f", dropped {dropped}" * bool(dropped)
    )


def _summary(
    traits: dict[str, Any], units: SourceUnits, kept: Kept, share: Share, recipe: PackRecipe
) -> dict[str, Any]:
    return {
        **traits,
        "rows_read": units.num_rows,
        "dropped": _dropped(units, kept),
        "unused_positives": units.unused_positives,
        "truncated_texts": kept.truncated_texts,
        "tokens": kept.tokens,
        "kept": kept.pairs,
        "batches": share.per_epoch * recipe.epochs,
        "batches_per_pass": share.per_pass,
        "remainder_pairs": share.remainder_pairs,
    }


def _write_index(run: PackRun, summaries: list[dict[str, Any]], shards: list[dict[str, Any]]) -> Index:
    run.tokenizer.save_pretrained(run.folder / "tokenizer")
    index = Index(
        version=FORMAT_VERSION,
        tokenizer_sha256=tokenizer_fingerprint(run.folder / "tokenizer"),
        anchor_token_id=run.segmenter.anchor_token_id,
        template=run.template.to_json(),
        recipe=run.resolved,
        sources=summaries,
        prompts=_prompts(run.template, summaries, run.recipe.prompts),
        shards=shards,
        end_token_id=_end_token_id(run),
    )
    index.write(run.folder)
    return index


def _end_token_id(run: PackRun) -> int | None:
    if not run.template.special_tokens:
        return None
    return end_token_id(run.segmenter.backend, run.template, run.recipe.tokenizer)


def _prompts(template: Template, summaries: list[dict[str, Any]], instructions: dict[str, str]) -> dict[str, str]:
    """Return the prompts of an exported model.

    `document` is bare and `query` is the prompt of the largest source, unless the recipe sets them.
    """
    largest = max(summaries, key=lambda s: s["kept"])["instructions"]
    default = {"query": template.instruction_head(largest[0]) if largest else "", "document": ""}
    return default | {name: template.instruction_head(text) for name, text in instructions.items()}
