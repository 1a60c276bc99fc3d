"""Tokenised pairs of one source on disk, so that shuffling and packing never hold them in memory.

``tokens.bin`` is a flat int32 run of all segments; ``segments.npy`` has one row per segment: length, body start,
body end, truncated; ``pairs.npy`` the row number of each pair; ``texts.npy`` one hash per segment. Every pair has
the same number of segments. ``done.json`` is written last; a spool without it is made again.
"""

import json
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from anchor.data.shards import Pack
from anchor.data.tokenization import Segment


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

    def add(self, row: int, segments: list[Segment], text_ids: list[int]) -> None:
        for segment in segments:
            self._tokens.write(segment.input_ids.tobytes())
            self._segments.extend((len(segment.input_ids), segment.body_start, segment.body_end, segment.truncated))
        self._pairs.append(row)
        self._texts.extend(text_ids)

    def close(self) -> None:
        self._tokens.close()

    def finish(self, summary: dict[str, Any]) -> None:
        self.close()
        np.save(self.folder / "segments.npy", np.asarray(self._segments, dtype=np.int32).reshape(-1, 4))
        np.save(self.folder / "pairs.npy", np.asarray(self._pairs, dtype=np.int64))
        np.save(self.folder / "texts.npy", np.asarray(self._texts, dtype=np.int64))
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
        segments = np.load(folder / "segments.npy")
        self._rows = np.load(folder / "pairs.npy")
        self.num_pairs = len(self._rows)
        per_pair = len(segments) // max(1, self.num_pairs)
        self._segments = segments.reshape(self.num_pairs, per_pair, 4)
        self._texts = np.load(folder / "texts.npy").reshape(self.num_pairs, per_pair)
        self.pair_tokens = self._segments[:, :, 0].sum(axis=1, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.pair_tokens)])
        empty = self.num_pairs == 0
        self._tokens = np.empty(0, np.int32) if empty else np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")

    def pack(self, pairs: np.ndarray) -> Pack:
        """The pack of some pairs, in the order given."""
        segments = self._segments[pairs]
        per_pair = segments.shape[1]
        flat = segments.reshape(-1, 4)
        return Pack(
            input_ids=np.concatenate([self._tokens[self._starts[i] : self._starts[i + 1]] for i in pairs]),
            segment_lengths=flat[:, 0],
            body_starts=flat[:, 1],
            body_ends=flat[:, 2],
            roles=np.tile(np.arange(per_pair, dtype=np.int8), len(pairs)),
            pair_ids=np.repeat(self._rows[pairs], per_pair),
            text_ids=self._texts[pairs].reshape(-1),
        )
