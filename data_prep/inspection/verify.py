"""Checks of every promise of the shard format, batch by batch; the first broken one is a :class:`ShardError`.

1. Index: the rows read are those kept and dropped, and the batches match the passes and epochs.
2. Files: sizes, sha256, the tokenizer.
3. Batches: checksums, number of pairs and packs, spans, anchor or special tokens, order of segments, target counts, the
   teacher's vectors.
4. Coverage: no pair appears in an epoch more often than the epoch has passes. No kept pair is left out, except the
   remainder of a pass. With one epoch of a proportional mixture, every such pair is in exactly one batch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from anchor.data.records import FIRST_NEGATIVE, QUERY
from anchor.data.shards import Batch, Pack, ShardReader, make_batch
from anchor.data.templates import Template, special_token_names
from anchor.data.tokenization import end_token_id
from anchor.data.tokenizer_files import shards_tokenizer
from anchor.errors import ShardError
from anchor.progress import tracked


def batches_of(reader: ShardReader, description: str) -> Iterator[tuple[int, Batch]]:
    """Yield (number, batch) for all batches, with progress."""
    for number in tracked(range(len(reader)), description, len(reader), unit=" batches"):
        yield number, reader.read(number)


UNIT_TOLERANCE = 1e-2
"""Largest deviation from 1 of the length of a unit vector in float16."""


class _Coverage:
    """Counts of how often each row of a source appears in batches.

    Args:
        source: the source's entry in the index.
        pairs: pairs in a batch.
        epochs: epochs in the folder.
    """

    def __init__(self, source: dict[str, Any], pairs: int, epochs: int) -> None:
        self.batches = 0
        self._pairs = pairs
        self._per_epoch = source["batches"] // epochs
        # Absent in shards packed by a version that knew only one pass.
        self._per_pass = source.get("batches_per_pass", source["batches"])
        self._expected = source["batches"]
        self._in_epoch = np.zeros(source["rows_read"], dtype=np.uint16)
        self._ever = np.zeros(source["rows_read"], dtype=bool)

    def next_epoch(self) -> None:
        self._in_epoch[:] = 0

    def take(self, packs: tuple[Pack, ...], epoch: int) -> str | None:
        """Count a batch's rows; return what is wrong with them and in which pack, or None."""
        first = epoch * self._per_epoch
        walks = (first + self._per_epoch - 1) // self._per_pass - first // self._per_pass + 1 if self._per_pass else 1
        self.batches += 1
        before: set[int] = set()
        for number, pack in enumerate(packs):
            rows = pack.pair_ids[pack.roles == QUERY]
            if rows.min() < 0 or rows.max() >= len(self._ever):
                return f"pack {number}: a pair of a row that the source does not have (it has {len(self._ever)})"
            np.add.at(self._in_epoch, rows, 1)
            if len(often := rows[self._in_epoch[rows] > walks]):
                times = "twice" if walks == 1 else f"more than {walks} times in an epoch"
                return f"pack {number}: row {often[0]} of the source is packed {times}"
            for row in rows.tolist():
                if row in before:
                    return f"pack {number}: row {row} of the source is twice in the batch"
                before.add(row)
            self._ever[rows] = True
        return None

    def problem(self, name: str) -> str | None:
        """Return what is wrong with the source as a whole, or None."""
        if self.batches != self._expected:
            return f"source '{name}' has {self.batches} batches, the index says {self._expected}"
        least = min(self._expected, self._per_pass) * self._pairs
        if (found := int(self._ever.sum())) < least:
            return f"{found} pairs of source '{name}' are in batches, {least} should be"
        return None


def verify(reader: ShardReader) -> None:
    """Check all promises.

    Raises:
        ShardError: at the first broken promise; the message names file and batch.
    """
    index = reader.index
    tokenizer = shards_tokenizer(reader.folder, index.tokenizer_sha256)
    _check_counts(reader)
    special = _special_ids(reader, tokenizer)
    reader.verify_files()
    pairs = index.recipe["batch"]["pairs"]
    coverage = {source["name"]: _Coverage(source, pairs, index.num_epochs) for source in index.sources}
    for number, batch in batches_of(reader, "verifying"):
        if number % index.batches_per_epoch == 0:
            for source in coverage.values():
                source.next_epoch()
        problem = _broken_promise(batch, reader, coverage, number // index.batches_per_epoch, special)
        if problem is not None:
            raise ShardError(f"{reader.where(number)}: {problem}; pack again into an empty folder")
    for name, source in coverage.items():
        problem = source.problem(name)
        if problem is not None:
            raise ShardError(f"{reader.folder}: {problem}; pack again into an empty folder")


def _check_counts(reader: ShardReader) -> None:
    index = reader.index
    size = index.recipe["batch"]["pairs"]
    for source in index.sources:
        name, per_pass = source["name"], source.get("batches_per_pass", source["batches"])
        if source["rows_read"] != source["kept"] + sum(source["dropped"].values()):
            raise ShardError(
                f"{reader.folder}/index.json: source '{name}' has {source['rows_read']} rows, but "
                f"{source['kept']} kept and {sum(source['dropped'].values())} dropped; pack again into an empty folder"
            )
        if source["kept"] != per_pass * size + source["remainder_pairs"]:
            raise ShardError(
                f"{reader.folder}/index.json: source '{name}' kept {source['kept']} pairs, but has {per_pass} batches "
                f"a pass of {size} and {source['remainder_pairs']} left over; pack again into an empty folder"
            )


def _special_ids(reader: ShardReader, backend: Tokenizer) -> np.ndarray:
    """Return the ids that every segment ends in: the trained special tokens, or the anchor token alone.

    Raises:
        ShardError: if the end token or the special tokens differ from the tokenizer's.
    """
    index = reader.index
    template = Template(**index.template)
    if not template.special_tokens:
        return np.asarray([index.anchor_token_id])
    found = [backend.token_to_id(name) for name in special_token_names(template.special_tokens)]
    first = index.anchor_token_id - template.special_tokens + 1
    if found != list(range(first, index.anchor_token_id + 1)):
        raise ShardError(f"{reader.folder}/index.json: special tokens are {found} in the tokenizer; pack again")
    if (end := end_token_id(backend, template, str(reader.folder))) != index.end_token_id:
        raise ShardError(
            f"{reader.folder}/index.json: end_token_id is {index.end_token_id}, {template.end!r} is {end}; pack again"
        )
    return np.asarray(found)


def _broken_promise(
    batch: Batch, reader: ShardReader, coverage: dict[str, _Coverage], epoch: int, special: np.ndarray
) -> str | None:
    shape, limits = reader.index.recipe["batch"], reader.index.recipe["text"]
    if batch.source not in coverage:
        return f"source '{batch.source}' is not in the index"
    if batch.num_pairs != shape["pairs"]:
        return f"{batch.num_pairs} pairs, the recipe says {shape['pairs']}"
    if len(batch.packs) % shape["pack_multiple"]:
        return f"{len(batch.packs)} packs are no multiple of pack_multiple ({shape['pack_multiple']})"
    for number, pack in enumerate(batch.packs):
        problem = _broken_pack(pack, shape["pack_tokens"], limits, special) or _broken_teacher(
            pack, reader.index.teacher
        )
        if problem is not None:
            return f"pack {number}: {problem}"
    problem = coverage[batch.source].take(batch.packs, epoch)
    if problem is not None:
        return problem
    counted = make_batch(batch.packs, batch.source)
    for name in ("query_target_tokens", "document_target_tokens"):
        if getattr(counted, name) != getattr(batch, name):
            return f"{name} is {getattr(batch, name)}, counted are {getattr(counted, name)}"
    return None


def _broken_teacher(pack: Pack, teacher: dict[str, Any] | None) -> str | None:
    if teacher is None or pack.teacher is None:
        return None
    if len(pack.teacher) != pack.num_pairs:
        return f"{len(pack.teacher)} vectors of the teacher for {pack.num_pairs} pairs"
    norms = np.linalg.norm(pack.teacher.astype(np.float32), axis=1)
    if not np.isfinite(norms).all():
        return f"the teacher's vector of pair {int(np.argmin(np.isfinite(norms)))} is not finite"
    if teacher["normalized"] and (np.abs(norms - 1.0) > UNIT_TOLERANCE).any():
        return f"the teacher's vector of pair {int(np.argmax(np.abs(norms - 1.0)))} is no unit vector"
    return None


def _broken_pack(pack: Pack, pack_tokens: int, limits: dict[str, int], special: np.ndarray) -> str | None:
    lengths = pack.segment_lengths
    per_pair = FIRST_NEGATIVE + limits["hard_negatives"]
    if len(lengths) == 0 or lengths.min() < 1 or lengths.sum() != pack.num_tokens:
        return f"segment lengths do not add up to its {pack.num_tokens} tokens"
    if pack.num_tokens > pack_tokens:
        return f"{pack.num_tokens} tokens, more than pack_tokens ({pack_tokens})"
    if lengths.max() > limits["max_tokens"]:
        return f"a segment of {lengths.max()} tokens, more than text.max_tokens ({limits['max_tokens']})"
    ends = np.cumsum(lengths) - 1
    if (pack.input_ids[ends] != special[-1]).any():
        return f"segment {int(np.argmax(pack.input_ids[ends] != special[-1]))} does not end in the anchor token"
    # The anchor token follows the body, so a body ends before the segment's last token.
    inside = (pack.body_starts >= 0) & (pack.body_starts < pack.body_ends) & (pack.body_ends < lengths)
    if not inside.all():
        return f"the body of segment {int(np.argmin(inside))} is empty or not inside the segment"
    # If there are several special tokens, all of them follow the body.
    behind = lengths - pack.body_ends >= len(special)
    if not behind.all() or (pack.input_ids[ends[:, None] - np.arange(len(special))[::-1]] != special).any():
        return f"a segment does not end in its {len(special)} special tokens"
    if len(lengths) % per_pair or (pack.roles.reshape(-1, per_pair) != np.arange(per_pair)).any():
        return "a pair's segments do not stand together as query, positive, hard negatives"
    if (np.ptp(pack.pair_ids.reshape(-1, per_pair), axis=1) != 0).any():
        return "the segments of a pair are of different rows"
    return None
