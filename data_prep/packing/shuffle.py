"""Deduplication of a source's pairs, and their order in each pass, through index files for any number of pairs.

1. Distribute the keys of all pairs (the text ids of query and positive) over bucket files by hash. Equal pairs meet in
   one bucket, which is small enough to sort in memory. Keep only the first of equal pairs.
2. Write the numbers of the kept pairs to a file. Each pass is a copy of that file, shuffled in place (Fisher-Yates)
   through a memory map whose pages the system can reclaim.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.packing.gathered import Gathered
from data_prep.packing.mixture import pass_order

BUCKET_PAIRS = 1 << 18
_MAX_BUCKETS = 512
_COPY_BYTES = 1 << 24
_KEY = np.dtype([("keys", "<i8", (2,)), ("pair", "<i8")])


@dataclass(frozen=True, slots=True)
class Kept:
    """Kept pairs of a source.

    Attributes:
        file: file of the pairs' numbers, int64, ascending.
        pairs: number of pairs.
        tokens: tokens in all their segments.
        truncated_texts: number of their texts that were truncated.
    """

    file: Path
    pairs: int
    tokens: int
    truncated_texts: int


def first_of_equals(keys: np.ndarray) -> np.ndarray:
    """Return the indices, ascending, of the first row in each set of equal rows (``n x 2``)."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal rows keep their order
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    return np.sort(order[fresh])


def keep_first(gathered: Gathered, source: str, folder: Path, name: str) -> Kept:
    """Drop all but the first of equal pairs.

    Args:
        gathered: all pairs.
        source: name of the source.
        folder: folder for the files.
        name: prefix of this source's file names.
    """
    total = gathered.sources[source].num_pairs
    equal = folder / f"{name}.equal"
    _empty(equal, total)
    flags = np.memmap(equal, dtype=np.uint8, mode="r+") if total else np.empty(0, np.uint8)
    for keys in _buckets(gathered, source, folder / f"{name}.bucket"):
        twice = np.ones(len(keys), dtype=bool)
        twice[first_of_equals(keys["keys"])] = False
        flags[keys["pair"][twice]] = 1
    pairs = tokens = truncated = 0
    file = folder / f"{name}.kept"
    with file.open("wb") as out:
        for first, records in gathered.scan(source):
            fresh = np.flatnonzero(flags[first : first + len(records)] == 0)
            out.write((first + fresh).astype("<i8").tobytes())
            pairs += len(fresh)
            tokens += int(records["lengths"][fresh].sum(dtype=np.int64))
            truncated += int(records["truncated"][fresh].sum())
    del flags
    equal.unlink()
    return Kept(file, pairs, tokens, truncated)


def _buckets(gathered: Gathered, source: str, beside: Path) -> Iterator[np.ndarray]:
    number = min(_MAX_BUCKETS, 1 + gathered.sources[source].num_pairs // BUCKET_PAIRS)
    files = [beside.with_name(f"{beside.name}{i}") for i in range(number)]
    with ExitStack() as stack:
        outs = [stack.enter_context(file.open("wb")) for file in files]
        for first, records in gathered.scan(source):
            keys = np.empty(len(records), _KEY)
            keys["keys"] = records["text_ids"][:, :2]
            keys["pair"] = first + np.arange(len(records))
            bucket = (keys["keys"][:, 0] ^ keys["keys"][:, 1]).view(np.uint64) % np.uint64(number)
            for i in range(number) if number > 1 else ():
                outs[i].write(keys[bucket == i].tobytes())
            if number == 1:
                outs[0].write(keys.tobytes())
    for file in files:
        yield np.fromfile(file, _KEY)
        file.unlink()


def shuffled(kept: Kept, seed: int, source: str, number: int) -> Path:
    """Write the numbers of the kept pairs in the order of a pass; return the file."""
    file = kept.file.with_suffix(f".pass{number}")
    with kept.file.open("rb") as read, file.open("wb") as out:
        while data := read.read(_COPY_BYTES):
            out.write(data)
    # View the memory map as a plain array: numpy shuffles those at once, subclasses element by element.
    order = np.asarray(np.memmap(file, dtype="<i8", mode="r+"))
    pass_order(seed, source, number).shuffle(order)
    return file


def read_batch(file: Path, batch: int, pairs: int) -> np.ndarray:
    """Return the pair numbers of one batch of a pass, int64."""
    return np.fromfile(file, "<i8", pairs, offset=batch * pairs * 8)


def _empty(file: Path, size: int) -> None:
    file.touch()
    os.truncate(file, 0)
    os.truncate(file, size)
