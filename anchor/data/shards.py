"""On-disk format of packed batches: Arrow IPC files and ``index.json``. This module owns the format.

A folder of shards holds

* ``NNNNN.arrow``: Arrow IPC files, read by memory map. **One Arrow record batch is one training batch, one row
  is one pack.** Columns per row: ``input_ids: list<int32>`` (all segments of the pack, concatenated),
  ``segment_lengths``, ``body_starts``, ``body_ends: list<int32>`` (per segment; bodies relative to it),
  ``roles: list<int8>`` (0 query, 1 positive, 2... hard negatives), ``pair_ids: list<int64>`` (row in the source)
  and ``text_ids: list<int64>`` (xxh3 of the text), both per segment. Shards from `data_prep teach` (format version 2)
  have one more column, ``teacher: list<float16>``: the teacher's embeddings of the pairs' positives, concatenated in
  the order of the queries.
* The custom metadata of each record batch, key ``anchor``: JSON with ``source``, ``pairs``, ``query_target_tokens``,
  ``document_target_tokens`` and ``xxh3`` (of the other four and of all columns; checked at every read).
* ``tokenizer/``: the tokenizer with the template in its post-processor.
* ``index.json`` (:mod:`anchor.data.index`), written last and atomically: a folder without it is unfinished.

The writer starts a new file every ``batches_per_shard`` batches.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from anchor.data.index import FORMAT_VERSION, INDEX_NAME, TEACHER_VERSION, Index, index_hash, read_index
from anchor.data.packing import cu_seqlens
from anchor.data.records import QUERY
from anchor.errors import ShardError
from anchor.recent import Recent

__all__ = [
    "FORMAT_VERSION",
    "INDEX_NAME",
    "TEACHER_VERSION",
    "Batch",
    "Index",
    "Pack",
    "ShardReader",
    "ShardWriter",
    "index_hash",
    "make_batch",
    "read_index",
    "text_id",
]

BATCHES_PER_SHARD = 256
_RESIDENT_BYTES = 1 << 24
_MAX_OPEN = 256
"""Most files mapped at a time."""
_COLUMNS: dict[str, Any] = {
    "input_ids": np.int32,
    "segment_lengths": np.int32,
    "body_starts": np.int32,
    "body_ends": np.int32,
    "roles": np.int8,
    "pair_ids": np.int64,
    "text_ids": np.int64,
}
_TEACHER_COLUMNS: dict[str, Any] = {**_COLUMNS, "teacher": np.float16}


def _schema(columns: dict[str, Any]) -> pa.Schema:
    return pa.schema([(name, pa.list_(pa.from_numpy_dtype(dtype))) for name, dtype in columns.items()])


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward pass: the segments of whole pairs, flat.

    Attributes:
        input_ids: int32 ``T``.
        segment_lengths: int32 ``S``.
        body_starts, body_ends: int32 ``S``; span of the bare text, relative to the segment.
        roles: int8 ``S``.
        pair_ids: int64 ``S``; row of the pair in its source.
        text_ids: int64 ``S``; equal for equal texts.
        teacher: float16 ``N H_t``; the teacher's embedding of each pair's positive, in the order of the queries. None
            if the shards have no teacher.
    """

    input_ids: np.ndarray
    segment_lengths: np.ndarray
    body_starts: np.ndarray
    body_ends: np.ndarray
    roles: np.ndarray
    pair_ids: np.ndarray
    text_ids: np.ndarray
    teacher: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_pairs(self) -> int:
        return int((self.roles == QUERY).sum())

    def select(self, keep: np.ndarray) -> "Pack":
        """Return the pack with only the segments where ``keep`` (bool ``S``) is True.

        A teacher row is kept if its query is.
        """
        if keep.all():
            return self
        tokens = np.repeat(keep, self.segment_lengths)
        rest = {name: getattr(self, name)[keep] for name in _COLUMNS if name != "input_ids"}
        teacher = None if self.teacher is None else self.teacher[keep[self.roles == QUERY]]
        return Pack(input_ids=self.input_ids[tokens], teacher=teacher, **rest)


@dataclass(frozen=True, slots=True)
class Batch:
    """One optimiser step of pairs of one source.

    Attributes:
        packs: all packs of the batch, over all ranks.
        source: name of the source.
        query_target_tokens, document_target_tokens: body tokens + 1 per segment, summed over the batch; the
            normalisers of the reconstruction loss.
    """

    packs: tuple[Pack, ...]
    source: str
    query_target_tokens: int
    document_target_tokens: int

    @property
    def num_pairs(self) -> int:
        return sum(pack.num_pairs for pack in self.packs)


def make_batch(packs: Sequence[Pack], source: str) -> Batch:
    """Return a batch of ``packs`` with its target-token counts."""
    counts = {0: 0, 1: 0}
    for pack in packs:
        target = pack.body_ends - pack.body_starts + 1
        for role in counts:
            counts[role] += int(target[pack.roles == role].sum())
    return Batch(tuple(packs), source, counts[0], counts[1])


def _checksum(meta: dict[str, Any], columns: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    digest = xxhash.xxh3_64(json.dumps(meta, sort_keys=True).encode())
    for name, (offsets, values) in columns.items():
        digest.update(f"{name}:{len(offsets)}:{len(values)}".encode())
        digest.update(offsets.tobytes())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


class ShardWriter:
    """Writer of batches to numbered files in a folder.

    Args:
        folder: folder for the files; must exist.
        batches_per_shard: batches per file.
        first_shard: number of the first file, for several writers that share a folder.
        teacher: True if the batches have a teacher's embeddings.
    """

    def __init__(
        self,
        folder: Path,
        batches_per_shard: int = BATCHES_PER_SHARD,
        first_shard: int = 0,
        *,
        teacher: bool = False,
    ) -> None:
        self.folder = folder
        self._columns = _TEACHER_COLUMNS if teacher else _COLUMNS
        self._schema = _schema(self._columns)
        self.first_shard = first_shard
        self.batches_per_shard = batches_per_shard
        self.shards: list[dict[str, Any]] = []
        self._writer: pa.RecordBatchFileWriter | None = None
        self._counts = {"batches": 0, "packs": 0, "tokens": 0}

    def write(self, batch: Batch) -> None:
        """Append one batch."""
        if self._writer is None:
            self._path = self.folder / f"{self.first_shard + len(self.shards):05d}.arrow"
            # Write to a temporary file, then rename: a process that still maps an older file of this name keeps it.
            self._writer = pa.ipc.new_file(f"{self._path}.tmp", self._schema)
        arrays, columns = [], {}
        for name, dtype in self._columns.items():
            parts = [np.ascontiguousarray(getattr(pack, name), dtype=dtype).reshape(-1) for pack in batch.packs]
            offsets, values = cu_seqlens(np.asarray([len(p) for p in parts])), np.concatenate(parts)
            columns[name] = (offsets, values)
            arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)))
        meta = {
            "source": batch.source,
            "pairs": batch.num_pairs,
            "query_target_tokens": batch.query_target_tokens,
            "document_target_tokens": batch.document_target_tokens,
        }
        meta["xxh3"] = _checksum(meta, columns)
        record = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        self._writer.write_batch(record, custom_metadata={"anchor": json.dumps(meta)})
        self._counts["batches"] += 1
        self._counts["packs"] += len(batch.packs)
        self._counts["tokens"] += sum(pack.num_tokens for pack in batch.packs)
        if self._counts["batches"] == self.batches_per_shard:
            self.close()

    def close(self) -> None:
        """Finish the current file."""
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        os.replace(f"{self._path}.tmp", self._path)
        with self._path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = self._path.stat().st_size
        self.shards.append({"file": self._path.name, "bytes": size, "sha256": sha256, **self._counts})
        self._counts = dict.fromkeys(self._counts, 0)


class ShardReader:
    """Random access to the batches of a folder by memory map. Files are opened on first use.

    Args:
        folder: folder written by ``data_prep pack`` or ``data_prep teach``.

    Raises:
        ShardError: the folder is missing or unfinished, or its index is not readable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self._columns = _COLUMNS if self.index.teacher is None else _TEACHER_COLUMNS
        self._schema = _schema(self._columns)
        self._program = f"`python -m data_prep {'pack' if self.index.teacher is None else 'teach'}`"
        self._first = np.cumsum([0] + [shard["batches"] for shard in self.index.shards])
        # Batches already read keep the memory map of an evicted file alive.
        self._files: Recent[int, tuple[pa.RecordBatchFileReader, mmap.mmap]] = Recent(_MAX_OPEN)
        self._resident_bytes = 0

    def __len__(self) -> int:
        return int(self._first[-1])

    def where(self, batch: int) -> str:
        """Return ``FILE: batch N``, the beginning of every message about a batch."""
        return f"{self.folder / self.index.shards[self._shard_of(batch)]['file']}: batch {batch}"

    def read(self, batch: int) -> Batch:
        """Read a batch and check its checksum; arrays are views of the memory map.

        Raises:
            ShardError: the file is missing, truncated or altered.
        """
        shard, where = self._shard_of(batch), self.where(batch)
        mend = f"delete the file and run {self._program} again"
        local = batch - int(self._first[shard])
        try:
            file, _ = self._files.get(shard, partial(self._open, shard))
            record, custom = file.get_batch_with_custom_metadata(local)
            record.validate()  # check lengths and buffers: reading an altered file could leave the memory map
            meta = json.loads(custom[b"anchor"])
            stored = meta.pop("xxh3")
            columns = {name: _views(record.column(name)) for name in self._columns}
            intact = _checksum(meta, columns) == stored
            self._release(record.nbytes)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # a system error does not mean a bad file
                raise ShardError(f"{where}: cannot be read: {error.strerror}; mend that and start again") from error
            raise ShardError(f"{where}: unreadable ({type(error).__name__}); {mend}") from error
        if not intact:
            raise ShardError(f"{where}: checksum differs; {mend}")
        expected = 0 if self.index.teacher is None else meta["pairs"] * self.index.teacher["dimension"]
        if expected and len(columns["teacher"][1]) != expected:
            raise ShardError(
                f"{where}: {len(columns['teacher'][1])} numbers of the teacher, expected {expected} by {INDEX_NAME}; "
                f"run {self._program} again"
            )
        packs = tuple(self._pack(columns, row) for row in range(record.num_rows))
        return Batch(packs, meta["source"], meta["query_target_tokens"], meta["document_target_tokens"])

    def _pack(self, columns: dict[str, tuple[np.ndarray, np.ndarray]], row: int) -> Pack:
        arrays = {name: values[offsets[row] : offsets[row + 1]] for name, (offsets, values) in columns.items()}
        if self.index.teacher is not None:
            arrays["teacher"] = arrays["teacher"].reshape(-1, self.index.teacher["dimension"])
        return Pack(**arrays)

    def _shard_of(self, batch: int) -> int:
        return int(np.searchsorted(self._first, batch, side="right")) - 1

    def _open(self, shard: int) -> tuple[pa.RecordBatchFileReader, mmap.mmap]:
        with self._path(shard).open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        file = pa.ipc.open_file(pa.py_buffer(pages))
        if not file.schema.equals(self._schema):  # the checksum covers the bytes, not their types
            raise pa.ArrowInvalid("schema differs")
        return file, pages

    def _release(self, num_bytes: int) -> None:
        """Return read pages to the page cache now and then; a view that still needs one reads it again.

        Otherwise every page ever read counts as this process's memory.
        """
        self._resident_bytes += num_bytes
        if self._resident_bytes > _RESIDENT_BYTES:
            self._resident_bytes = 0
            for _, pages in self._files.values():
                pages.madvise(mmap.MADV_DONTNEED)

    def _path(self, shard: int) -> Path:
        expected = self.index.shards[shard]
        path = self.folder / expected["file"]
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise ShardError(
                f"{path}: missing or not {expected['bytes']} bytes long; delete it and run {self._program} again"
            )
        return path

    def verify_files(self) -> None:
        """Compare every file's sha256 with the index.

        Raises:
            ShardError: a file differs. The message names the first one.
        """
        for number, shard in enumerate(self.index.shards):
            path = self._path(number)
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise ShardError(f"{path}: sha256 differs; delete it and run {self._program} again")


def _views(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets and values of a list column, without copying."""
    return column.offsets.to_numpy(), column.values.to_numpy()


def text_id(text: str) -> int:
    """Return the signed 64-bit xxh3 of a text."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) - (1 << 63)
