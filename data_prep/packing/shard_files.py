"""Plan of a folder of shards, and its writer. Each file is a pure function of the plan and the file's number."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anchor.config.pack_recipe import BatchShape, PackRecipe
from anchor.data.index import Index
from anchor.data.packing import plan_packs
from anchor.data.shards import BATCHES_PER_SHARD, Batch, ShardWriter, make_batch
from anchor.progress import tracked
from data_prep.packing.gathered import Gathered
from data_prep.packing.mixture import Share, epoch_batches
from data_prep.packing.shuffle import Kept, read_batch, shuffled
from data_prep.packing.spool import read_json, write_json
from data_prep.packing.workers import open_workers


@dataclass(frozen=True, slots=True)
class Plan:
    """All batches of a folder, in the order they are written.

    Attributes:
        gathered: tokenised pairs.
        names: names of the sources.
        per_pass: batches in a pass, by source.
        passes: files of each source's passes.
        batches: int64 ``batches x 2``: source, and number of the batch within the source.
        shape: shape of a batch.
        folder: folder of the shards.
        written: folder of the finished files' index entries, one JSON file each.
        batches_per_shard: batches in a file.
    """

    gathered: Gathered
    names: list[str]
    per_pass: list[int]
    passes: list[list[Path]]
    batches: np.ndarray
    shape: BatchShape
    folder: Path
    written: Path
    batches_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.batches) // self.batches_per_shard)

    def entry(self, shard: int) -> Path:
        return self.written / f"{shard:05d}.json"


def missing_files(folder: Path, index: Index) -> list[str]:
    """Return the names of shards that are missing or of the wrong size in a finished folder.

    The list includes ``tokenizer`` if the folder has none.
    """
    names = {shard["file"]: shard["bytes"] for shard in index.shards}
    gone = [n for n, size in names.items() if not (folder / n).is_file() or (folder / n).stat().st_size != size]
    return gone + ["tokenizer"] * (not (folder / "tokenizer" / "tokenizer.json").is_file())


def make_plan(
    gathered: Gathered, kept: dict[str, Kept], shares: dict[str, Share], recipe: PackRecipe, folder: Path, work: Path
) -> Plan:
    """Shuffle the passes and the batches."""
    names = list(shares)
    passes = [[shuffled(kept[name], recipe.seed, name, p) for p in range(shares[name].passes)] for name in names]
    per_epoch = list(shares.values())
    return Plan(
        gathered=gathered,
        names=names,
        per_pass=[share.per_pass for share in per_epoch],
        passes=passes,
        batches=np.concatenate([epoch_batches(per_epoch, recipe.seed, epoch) for epoch in range(recipe.epochs)]),
        shape=recipe.batch,
        folder=folder,
        written=work,
        batches_per_shard=BATCHES_PER_SHARD,
    )


def write_shards(plan: Plan, workers: int) -> list[dict[str, Any]]:
    """Write the files that are not finished yet; return the index entries of all files."""
    missing = [shard for shard in range(plan.num_shards) if not _finished(plan, shard)]
    with open_workers(max(1, min(workers, len(missing))), partial(write_shard, plan)) as work:
        for _ in tracked(work(missing), "packing", len(missing), unit=" files"):
            pass
    return [read_json(plan.entry(shard)) for shard in range(plan.num_shards)]


def _finished(plan: Plan, shard: int) -> bool:
    if not plan.entry(shard).is_file():
        return False
    expected = read_json(plan.entry(shard))
    file = plan.folder / expected["file"]
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == expected["sha256"]


def write_shard(plan: Plan, shard: int) -> None:
    """Write one file, then its index entry."""
    size = plan.batches_per_shard
    writer = ShardWriter(plan.folder, size, shard)
    for source, number in plan.batches[shard * size : (shard + 1) * size].tolist():
        writer.write(_batch(plan, source, number))
    writer.close()
    write_json(plan.entry(shard), writer.shards[0])


def _batch(plan: Plan, source: int, number: int) -> Batch:
    walk, batch = divmod(number, plan.per_pass[source])
    pairs = read_batch(plan.passes[source][walk], batch, plan.shape.pairs)
    records, parts = plan.gathered.records(plan.names[source], pairs)
    tokens = records["lengths"].sum(axis=1, dtype=np.int64).tolist()
    packs = plan_packs(tokens, plan.shape.pack_tokens, plan.shape.pack_multiple)
    members = [np.asarray(pack) for pack in packs]
    return make_batch([plan.gathered.pack(records[m], parts[m]) for m in members], plan.names[source])
