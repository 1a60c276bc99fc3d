"""Reading of batches: opening many, fetching one, and the memory that stays resident.

    python bench/loader.py [--batches 100000 --gigabytes 10 --folder /tmp] [--json PATH]

1. ``open``: open a folder of ``batches`` small batches and read the first step's batch.
2. ``warm`` and ``cold``: read one 32k-token batch, with its pages in the page cache and after dropping them. ``arrow``:
   read the same record batch with pyarrow alone, without checksum.
3. ``read all``: read ``gigabytes`` of shards from end to end, and measure the growth of resident memory.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))

from anchor.data.batches import batch_stream
from anchor.data.index import FORMAT_VERSION, Index
from anchor.data.shards import Batch, Pack, ShardReader, ShardWriter, make_batch
from anchor.errors import exit_on_user_error
from bench.harness import alternate, arguments, report

VOCABULARY = 128_000
PACK_TOKENS = 32_768


def random_batch(tokens: int, pairs: int, draw: np.random.Generator) -> Batch:
    """Return a batch of one pack of ``tokens`` tokens: pairs of a query (a quarter of the tokens) and a document."""
    per_pair = tokens // pairs
    lengths = np.tile(np.array([per_pair // 4, per_pair - per_pair // 4], dtype=np.int32), pairs)
    pack = Pack(
        input_ids=draw.integers(VOCABULARY, size=int(lengths.sum()), dtype=np.int32),
        segment_lengths=lengths,
        body_starts=np.zeros_like(lengths),
        body_ends=lengths - 1,
        roles=np.tile(np.array([0, 1], dtype=np.int8), pairs),
        pair_ids=np.repeat(np.arange(pairs, dtype=np.int64), 2),
        text_ids=draw.integers(1 << 62, size=2 * pairs, dtype=np.int64),
    )
    return make_batch([pack], "made")


def write_shards(folder: Path, batches: int, tokens: int, pairs: int) -> int:
    """Write batches (ten different ones, over and over) and the index; return the bytes written."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    made = [random_batch(tokens, pairs, draw) for _ in range(10)]
    writer = ShardWriter(folder)
    for number in range(batches):
        writer.write(made[number % 10])
    writer.close()
    recipe = {"batch": {"pairs": pairs, "pack_tokens": tokens, "pack_multiple": 1}, "text": {"max_tokens": tokens}}
    Index(FORMAT_VERSION, "", 0, {}, recipe, [], {}, writer.shards).write(folder)
    return sum(shard["bytes"] for shard in writer.shards)


def drop_pages(folder: Path) -> None:
    """Ask the kernel to drop the files' pages from the page cache."""
    for path in folder.glob("*.arrow"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    options = arguments(__doc__ or "", batches=100_000, gigabytes=10.0, folder=tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        rows = measure(folder, options)
    finally:
        shutil.rmtree(folder)
    by_name = {row["contestant"]: row for row in rows}
    ratios = {"speed": by_name["arrow"]["seconds"] / by_name["warm"]["seconds"]}
    report("loader", rows, ratios, options)


def measure(folder: Path, options) -> list[dict]:
    many, large = folder / "many", folder / "large"
    write_shards(many, options.batches, 64, 2)
    one = write_shards(large, 1, PACK_TOKENS, 128)
    shutil.rmtree(large)
    write_shards(large, int(options.gigabytes * 2**30 / one) + 1, PACK_TOKENS, 128)
    warm, at = ShardReader(large), np.random.default_rng(1)

    def open_many() -> dict[str, float]:
        reader = ShardReader(many)
        next(iter(batch_stream(reader, 0, 0, len(reader))))
        return {"batches": len(reader)}

    file = pa.ipc.open_file(pa.memory_map(str(large / "00000.arrow")))

    def arrow_alone() -> dict[str, float]:
        return {"tokens": len(file.get_batch(0).column("input_ids").values)}

    def fetch(reader: ShardReader, batch: int) -> dict[str, float]:
        return {"tokens": sum(len(pack.input_ids) for pack in reader.read(batch).packs)}

    def fetch_cold() -> dict[str, float]:
        return fetch(ShardReader(large), int(at.integers(len(warm))))

    rows = alternate({"open": open_many}, options.turns)
    rows += alternate({"warm": lambda: fetch(warm, 0), "arrow": arrow_alone}, options.turns)
    drop_pages(large)
    rows += alternate({"cold": fetch_cold}, options.turns)
    return [*rows, read_all(large)]


def read_all(folder: Path) -> dict:
    """Read everything once as the trainer does, and return the growth of resident memory."""
    process = psutil.Process()
    reader = ShardReader(folder)
    total = sum(shard["bytes"] for shard in reader.index.shards)
    before, start = process.memory_info().rss, os.times().elapsed
    most = before
    for step, batch in batch_stream(reader, 0, 0, len(reader)):
        if step % 100 == 0:
            most = max(most, process.memory_info().rss)
        del batch
    seconds = os.times().elapsed - start
    grown = {"read_gib": total / 2**30, "grown_mb": (most - before) / 1e6}
    return {"contestant": "read all", "seconds": seconds, "peak_gib": most / 2**30, **grown}


if __name__ == "__main__":
    with exit_on_user_error():
        main()
