"""``python -m data_prep inspect``: what a folder of shards holds, and whether all of it is sound.

1. :func:`summarise`: counts from the index; segment lengths and balance from the shards themselves.
2. :func:`verify`: every promise of the format, batch by batch; the first broken one is a :class:`ShardError`.
3. :func:`examples`: pairs turned back into text, with the body marked.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from anchor.data.records import FIRST_NEGATIVE, POSITIVE, QUERY
from anchor.data.shards import Batch, Pack, ShardReader, make_batch
from anchor.data.tokenization import tokenizer_fingerprint
from anchor.errors import ShardError
from data_prep.progress import tracked
from data_prep.tables import print_table

PERCENTILES = (5, 25, 50, 75, 95, 100)
BODY_MARKS = "⟦⟧"


def inspect(folder: Path, *, verify_all: bool, show: int, as_json: bool) -> None:
    """Write the report of a folder of shards to stdout.

    Args:
        folder: written by ``data_prep pack``.
        verify_all: check every promise of the format first.
        show: number of pairs to decode.
        as_json: one JSON object instead of tables.

    Raises:
        ShardError: unfinished or altered folder, or a broken promise, by file and batch.
    """
    reader = ShardReader(folder)
    report = summarise(reader)
    if verify_all:
        verify(reader)
    report["verified"] = verify_all
    shown = examples(reader, show)
    if as_json:
        sys.stdout.write(json.dumps(report | {"examples": shown}, ensure_ascii=False) + "\n")
        return
    _print_tables(report)
    for example in shown:
        sys.stdout.write(f"\n{example['source']}, row {example['row']}\n")
        sys.stdout.writelines(f"  {role}: {_escaped(text)}\n" for role, text in example["segments"].items())


# 1. Counts.


def summarise(reader: ShardReader) -> dict[str, Any]:
    """Counts of the index, and lengths and balance read from the shards."""
    index = reader.index
    packs, tokens = (sum(shard[key] for shard in index.shards) for key in ("packs", "tokens"))
    pack_tokens = index.recipe["batch"]["pack_tokens"]
    counts = np.zeros(index.recipe["text"]["max_tokens"] + 1, dtype=np.int64)
    balance = []
    for _, batch in _batches(reader, "reading lengths"):
        for pack in batch.packs:
            seen = np.bincount(pack.segment_lengths)
            if len(seen) > len(counts):  # longer than the recipe allows: counted all the same, refused by `verify`
                counts = np.pad(counts, (0, len(seen) - len(counts)))
            counts[: len(seen)] += seen
        sizes = [pack.num_tokens for pack in batch.packs]
        balance.append(max(sizes) * len(sizes) / sum(sizes))
    return {
        "folder": str(reader.folder),
        "sources": [
            {
                "name": source["name"],
                "rows_read": source["rows_read"],
                "kept": source["kept"],
                "dropped": source["dropped"],
                "batches": source["batches"],
                "remainder_pairs": source["remainder_pairs"],
                "truncated_texts": source["truncated_texts"],
                "tokens": source["tokens"],
            }
            for source in index.sources
        ],
        "batches": len(reader),
        "pairs_per_batch": index.recipe["batch"]["pairs"],
        "packs": packs,
        "pack_multiple": index.pack_multiple,
        "tokens": tokens,
        "pack_tokens": pack_tokens,
        "pack_fill": tokens / (packs * pack_tokens),
        "segment_tokens": {f"p{p}" if p < 100 else "max": _percentile(counts, p) for p in PERCENTILES},
        "balance": {"mean": float(np.mean(balance)), "max": float(np.max(balance))},
    }


def _batches(reader: ShardReader, description: str) -> Iterator[tuple[int, Batch]]:
    for number in tracked(range(len(reader)), description, len(reader)):
        yield number, reader.read(number)


def _percentile(counts: np.ndarray, percent: int) -> int:
    """Smallest length that at least ``percent`` of the segments do not exceed."""
    return int(np.searchsorted(np.cumsum(counts), counts.sum() * percent / 100))


# 2. Promises.


def verify(reader: ShardReader) -> None:
    """Check files, checksums, spans, anchor tokens, order of segments, target counts, and that no pair is twice.

    Raises:
        ShardError: the first broken promise, by file and batch.
    """
    index = reader.index
    tokenizer = reader.folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file() or tokenizer_fingerprint(tokenizer) != index.tokenizer_sha256:
        raise ShardError(f"{tokenizer}: missing or not the tokenizer that the shards were made with; pack again")
    reader.verify_files()
    seen = {source["name"]: np.zeros(source["rows_read"], dtype=bool) for source in index.sources}
    batches = dict.fromkeys(seen, 0)
    for number, batch in _batches(reader, "verifying"):
        problem = _broken_promise(batch, reader, seen)
        if problem is not None:
            raise ShardError(f"{reader.where(number)}: {problem}; pack again into an empty folder")
        batches[batch.source] += 1
    for source in index.sources:
        if batches[source["name"]] != source["batches"]:
            raise ShardError(
                f"{reader.folder}: source '{source['name']}' has {batches[source['name']]} batches, the index says "
                f"{source['batches']}; pack again into an empty folder"
            )


def _broken_promise(batch: Batch, reader: ShardReader, seen: dict[str, np.ndarray]) -> str | None:
    shape, limits = reader.index.recipe["batch"], reader.index.recipe["text"]
    if batch.source not in seen:
        return f"source '{batch.source}' is not in the index"
    if batch.num_pairs != shape["pairs"]:
        return f"{batch.num_pairs} pairs, the recipe says {shape['pairs']}"
    if len(batch.packs) % shape["pack_multiple"]:
        return f"{len(batch.packs)} packs are no multiple of pack_multiple ({shape['pack_multiple']})"
    for number, pack in enumerate(batch.packs):
        problem = _broken_pack(pack, shape["pack_tokens"], limits, reader.index.anchor_token_id)
        if problem is not None:
            return f"pack {number}: {problem}"
        rows = pack.pair_ids[pack.roles == QUERY]
        problem = _take_rows(rows, seen[batch.source])
        if problem is not None:
            return f"pack {number}: {problem}"
    counted = make_batch(batch.packs, batch.source)
    for name in ("query_target_tokens", "document_target_tokens"):
        if getattr(counted, name) != getattr(batch, name):
            return f"{name} is {getattr(batch, name)}, counted are {getattr(counted, name)}"
    return None


def _broken_pack(pack: Pack, pack_tokens: int, limits: dict[str, int], anchor_token_id: int) -> str | None:
    lengths = pack.segment_lengths
    per_pair = FIRST_NEGATIVE + limits["hard_negatives"]
    if len(lengths) == 0 or lengths.min() < 1 or lengths.sum() != pack.num_tokens:
        return f"segment lengths do not add up to its {pack.num_tokens} tokens"
    if pack.num_tokens > pack_tokens:
        return f"{pack.num_tokens} tokens, more than pack_tokens ({pack_tokens})"
    if lengths.max() > limits["max_tokens"]:
        return f"a segment of {lengths.max()} tokens, more than text.max_tokens ({limits['max_tokens']})"
    ends = np.cumsum(lengths) - 1
    if (pack.input_ids[ends] != anchor_token_id).any():
        return f"segment {int(np.argmax(pack.input_ids[ends] != anchor_token_id))} does not end in the anchor token"
    # The anchor token is behind the body, so a body ends before the segment's last token.
    inside = (pack.body_starts >= 0) & (pack.body_starts < pack.body_ends) & (pack.body_ends < lengths)
    if not inside.all():
        return f"the body of segment {int(np.argmin(inside))} is empty or not inside the segment"
    if len(lengths) % per_pair or (pack.roles.reshape(-1, per_pair) != np.arange(per_pair)).any():
        return "a pair's segments do not stand together as query, positive, hard negatives"
    if (np.ptp(pack.pair_ids.reshape(-1, per_pair), axis=1) != 0).any():
        return "the segments of a pair are of different rows"
    return None


def _take_rows(rows: np.ndarray, seen: np.ndarray) -> str | None:
    if rows.min() < 0 or rows.max() >= len(seen):
        return f"a pair of a row that the source does not have (it has {len(seen)})"
    twice = rows[seen[rows]]
    if not len(twice) and len(np.unique(rows)) < len(rows):
        values, counts = np.unique(rows, return_counts=True)
        twice = values[counts > 1]
    if len(twice):
        return f"row {int(twice[0])} of the source is packed twice"
    seen[rows] = True
    return None


# 3. Examples.


def examples(reader: ShardReader, number: int) -> list[dict[str, Any]]:
    """Decoded pairs, spread evenly over the batches.

    Returns:
        Per pair: source, row, and text per role with the body between the marks.
    """
    if number < 1:
        return []
    tokenizer = Tokenizer.from_file(str(reader.folder / "tokenizer" / "tokenizer.json"))
    out = []
    for k in range(min(number, len(reader) * reader.index.recipe["batch"]["pairs"])):
        position = k * len(reader) / number
        batch = reader.read(int(position))
        pairs = [(pack, start) for pack in batch.packs for start in np.flatnonzero(pack.roles == QUERY)]
        pack, start = pairs[int(position % 1 * len(pairs))]
        out.append(_example(tokenizer, batch.source, pack, int(start)))
    return out


def _example(tokenizer: Tokenizer, source: str, pack: Pack, query: int) -> dict[str, Any]:
    following = np.flatnonzero(pack.roles[query + 1 :] == QUERY)
    end = query + 1 + int(following[0]) if len(following) else len(pack.roles)
    starts = np.cumsum(pack.segment_lengths) - pack.segment_lengths
    segments = {}
    for s in range(query, end):
        ids = pack.input_ids[starts[s] : starts[s] + pack.segment_lengths[s]].tolist()
        first, last = int(pack.body_starts[s]), int(pack.body_ends[s])
        head, body, tail = (
            tokenizer.decode(part, skip_special_tokens=False) for part in (ids[:first], ids[first:last], ids[last:])
        )
        segments[_role_name(int(pack.roles[s]))] = f"{head}{BODY_MARKS[0]}{body}{BODY_MARKS[1]}{tail}"
    return {"source": source, "row": int(pack.pair_ids[query]), "segments": segments}


def _role_name(role: int) -> str:
    return {QUERY: "query", POSITIVE: "positive"}.get(role, f"hard negative {role - FIRST_NEGATIVE + 1}")


def _escaped(text: str) -> str:
    return text.replace("\n", "\\n")


# Tables.


def _print_tables(report: dict[str, Any]) -> None:
    columns = ("source", "rows read", "kept", "dropped", "batches", "remainder", "truncated", "tokens")
    rows = [
        (
            source["name"],
            *(f"{source[key]:,}" for key in ("rows_read", "kept")),
            ", ".join(f"{reason}: {count:,}" for reason, count in source["dropped"].items()) or "0",
            *(f"{source[key]:,}" for key in ("batches", "remainder_pairs", "truncated_texts", "tokens")),
        )
        for source in report["sources"]
    ]
    print_table(columns, rows)
    lengths, balance = report["segment_tokens"], report["balance"]
    facts = (
        ("batches", f"{report['batches']:,} of {report['pairs_per_batch']:,} pairs"),
        ("packs", f"{report['packs']:,}, a multiple of {report['pack_multiple']} per batch"),
        ("tokens", f"{report['tokens']:,}"),
        ("pack fill", f"{report['pack_fill']:.1%} of {report['pack_tokens']:,} tokens"),
        ("segment tokens", ", ".join(f"{name} {value:,}" for name, value in lengths.items())),
        (
            "balance",
            f"largest pack / mean pack of a batch: {balance['mean']:.3f} on average, {balance['max']:.3f} at most",
        ),
        ("verified", "yes" if report["verified"] else "no; add --verify"),
    )
    sys.stdout.write("\n")
    print_table(("", report["folder"]), facts)
