"""Tokenised pairs of one source on disk, so that shuffling and packing never hold them in memory.

``tokens.bin`` is a flat int32 run of all segments; the other files have one row per kept pair: ``starts.npy`` where
its tokens begin there, ``segments.npy`` length, body start, body end and truncated of each of its segments,
``texts.npy`` their hashes, ``pairs.npy`` its row number. Every pair has
the same number of segments. ``done.json`` is written last; a spool without it is made again.
"""

import json
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from anchor.data.records import FIRST_NEGATIVE
from anchor.data.shards import Pack
from data_prep.checking import Tokenised

DUPLICATE = "equal to an earlier pair"
"""Why :meth:`SpoolWriter.finish` drops a pair."""


def first_of_equals(keys: np.ndarray) -> np.ndarray:
    """Indices, ascending, of the first of each set of equal rows (``n x 2``)."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable, so equal rows stay in their order
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    return np.sort(order[fresh])


class SpoolWriter:
    """Appends tokenised pairs; :meth:`finish` makes the spool readable."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._tokens = (folder / "tokens.bin").open("wb")
        # Flat arrays of machine integers: lists of tuples would take ten times the memory on 10 million pairs.
        self._segments = array("i")
        self._pairs = array("q")
        self._texts = array("q")

    def add(self, row: int, pair: Tokenised) -> None:
        self._tokens.write(pair.tokens.tobytes())
        self._segments.extend(pair.segments)
        self._pairs.append(row)
        self._texts.extend(pair.text_ids)

    def close(self) -> None:
        self._tokens.close()

    def finish(self, summary: dict[str, Any]) -> None:
        """Leave out equal pairs, count, and make the spool readable.

        Args:
            summary: ``rows_read`` and ``dropped``; what is kept is counted here.
        """
        self.close()
        pairs = np.asarray(self._pairs, dtype=np.int64)
        shape = (len(pairs), len(self._texts) // len(pairs)) if len(pairs) else (0, FIRST_NEGATIVE)
        texts = np.asarray(self._texts, dtype=np.int64).reshape(shape)
        segments = np.asarray(self._segments, dtype=np.int32).reshape(*shape, 4)
        starts = np.cumsum(segments[:, :, 0].sum(axis=1, dtype=np.int64))
        kept = first_of_equals(texts[:, :2])
        duplicates = {DUPLICATE: len(pairs) - len(kept)} if len(kept) < len(pairs) else {}
        summary = summary | {
            "dropped": dict(sorted({**summary["dropped"], **duplicates}.items())),
            "truncated_texts": int(segments[kept, :, 3].sum()),
            "tokens": int(segments[kept, :, 0].sum(dtype=np.int64)),
        }
        np.save(self.folder / "segments.npy", segments[kept])
        np.save(self.folder / "starts.npy", (starts - segments[:, :, 0].sum(axis=1))[kept])
        np.save(self.folder / "pairs.npy", pairs[kept])
        np.save(self.folder / "texts.npy", texts[kept])
        beside = self.folder / "done.json.tmp"
        beside.write_text(json.dumps(summary), encoding="utf-8")
        os.replace(beside, self.folder / "done.json")


class Spool:
    """A finished spool.

    Attributes:
        summary: counts of the reading.
        num_pairs: pairs held.
        pair_tokens: tokens of each pair, int64.
    """

    def __init__(self, folder: Path) -> None:
        self.summary: dict[str, Any] = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        self._segments = np.load(folder / "segments.npy")
        self._starts = np.load(folder / "starts.npy")
        self._rows = np.load(folder / "pairs.npy")
        self._texts = np.load(folder / "texts.npy")
        self.num_pairs = len(self._rows)
        self.pair_tokens = self._segments[:, :, 0].sum(axis=1, dtype=np.int64)
        empty = self.num_pairs == 0
        self._tokens = np.empty(0, np.int32) if empty else np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")

    def pack(self, pairs: np.ndarray) -> Pack:
        """The pack of some pairs, in the order given."""
        segments = self._segments[pairs]
        per_pair = segments.shape[1]
        flat = segments.reshape(-1, 4)
        spans = zip(self._starts[pairs], self._starts[pairs] + self.pair_tokens[pairs], strict=True)
        return Pack(
            input_ids=np.concatenate([self._tokens[start:end] for start, end in spans]),
            segment_lengths=flat[:, 0],
            body_starts=flat[:, 1],
            body_ends=flat[:, 2],
            roles=np.tile(np.arange(per_pair, dtype=np.int8), len(pairs)),
            pair_ids=np.repeat(self._rows[pairs], per_pair),
            text_ids=self._texts[pairs].reshape(-1),
        )
