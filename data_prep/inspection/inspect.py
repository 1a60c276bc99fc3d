"""``python -m data_prep inspect``: report on a folder of shards, and verify it.

1. :func:`summarise`: take counts from the index, segment lengths and balance from the shards themselves.
2. :func:`data_prep.inspection.verify.verify`: check every promise of the format, batch by batch.
3. :func:`examples`: decode pairs back into text, with the body marked.
4. Print tables and the histogram of lengths (:mod:`data_prep.inspection.histogram`).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from anchor.data.records import FIRST_NEGATIVE, POSITIVE, QUERY
from anchor.data.shards import Pack, ShardReader
from anchor.data.tokenizer_files import shards_tokenizer
from anchor.errors import ConfigError, DataError
from data_prep.inspection.histogram import bars, bins, draw
from data_prep.inspection.verify import batches_of, verify
from data_prep.tables import print_table

_OF_SOURCE = (
    *("name", "rows_read", "kept", "dropped", "batches", "remainder_pairs", "truncated_texts", "tokens"),
    *("instructions", "symmetric", "languages", "weight"),
)
PERCENTILES = (5, 25, 50, 75, 95, 100)
BODY_MARKS = "⟦⟧"


def inspect(folder: Path, *, verify_all: bool, show: int, as_json: bool, png: Path | None = None) -> None:
    """Write a report on a folder of shards to stdout.

    Args:
        folder: folder written by ``data_prep pack``.
        verify_all: check every promise of the format before reporting.
        show: number of pairs to decode.
        as_json: write one JSON object instead of tables.
        png: new image file for the histogram of lengths.

    Raises:
        ConfigError: if the image has no suffix or cannot be written.
        DataError: if the image exists.
        ShardError: if the folder is unfinished or altered, or breaks a promise; the message names file and batch.
    """
    if png is not None and not png.suffix:
        raise ConfigError(f"--png {png}: has no suffix that names a kind of picture; give {png}.png")
    if png is not None and png.exists():
        raise DataError(f"--png {png}: already exists and is not written over; delete it or choose another name")
    reader = ShardReader(folder)
    report = summarise(reader)
    if verify_all:
        verify(reader)
    report["verified"] = verify_all
    shown = examples(reader, show)
    if png is not None:
        draw(report["segments_by_tokens"], png)
    if as_json:
        sys.stdout.write(json.dumps(report | {"examples": shown}, ensure_ascii=False) + "\n")
        return
    _print_tables(report)
    for example in shown:
        sys.stdout.write(f"\n{example['source']}, row {example['row']}\n")
        sys.stdout.writelines(f"  {role}: {_escaped(text)}\n" for role, text in example["segments"].items())


# 1. Counts.


def summarise(reader: ShardReader) -> dict[str, Any]:
    """Return counts from the index, and lengths and balance read from the shards."""
    index = reader.index
    packs, tokens = (sum(shard[key] for shard in index.shards) for key in ("packs", "tokens"))
    pack_tokens = index.recipe["batch"]["pack_tokens"]
    counts = {
        source["name"]: np.zeros(index.recipe["text"]["max_tokens"] + 1, dtype=np.int64) for source in index.sources
    }
    balance = []
    for _, batch in batches_of(reader, "reading lengths"):
        for pack in batch.packs:
            counts[batch.source] = _added(counts[batch.source], np.bincount(pack.segment_lengths))
        sizes = [pack.num_tokens for pack in batch.packs]
        balance.append(max(sizes) * len(sizes) / sum(sizes))
    everything = np.zeros(0, dtype=np.int64)
    for one in counts.values():
        everything = _added(everything, one)
    return {
        "folder": str(reader.folder),
        "sources": [
            {name: source.get(name) for name in _OF_SOURCE} | {"segment_tokens": _percentiles(counts[source["name"]])}
            for source in index.sources
        ],
        "epochs": index.num_epochs,
        "batches": len(reader),
        "pairs_per_batch": index.recipe["batch"]["pairs"],
        "packs": packs,
        "pack_multiple": index.pack_multiple,
        "tokens": tokens,
        "pack_tokens": pack_tokens,
        "pack_fill": tokens / (packs * pack_tokens),
        "segment_tokens": _percentiles(everything),
        "segments_by_tokens": {name: bins(one) for name, one in counts.items()},
        "balance": {"mean": float(np.mean(balance)), "max": float(np.max(balance))},
        "special_tokens": index.template.get("special_tokens", 0),
        "end_token": index.template.get("end"),
        "teacher": index.teacher,
    }


def _added(counts: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Return the sum of two counts by length, as long as the longer one."""
    # Count segments longer than the recipe allows, too; `verify` refuses them.
    out = np.zeros(max(len(counts), len(more)), dtype=np.int64)
    out[: len(counts)] += counts
    out[: len(more)] += more
    return out


def _percentiles(counts: np.ndarray) -> dict[str, int]:
    return {f"p{p}" if p < 100 else "max": _percentile(counts, p) for p in PERCENTILES} if counts.any() else {}


def _percentile(counts: np.ndarray, percent: int) -> int:
    """Return the smallest length that at least ``percent`` % of the segments do not exceed."""
    return int(np.searchsorted(np.cumsum(counts), counts.sum() * percent / 100))


# 2. Examples.


def examples(reader: ShardReader, number: int) -> list[dict[str, Any]]:
    """Decode some pairs, spread evenly over the batches.

    Returns:
        For each pair its source, its row, and its texts by role, with the body between the marks.
    """
    if number < 1:
        return []
    tokenizer = shards_tokenizer(reader.folder, reader.index.tokenizer_sha256)
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


# 3. Tables.


def _print_tables(report: dict[str, Any]) -> None:
    columns = (
        "source",
        "rows read",
        "kept",
        "dropped",
        "batches",
        "remainder",
        "truncated",
        "tokens",
        "segment tokens",
    )
    rows = [
        (
            source["name"],
            *(f"{source[key]:,}" for key in ("rows_read", "kept")),
            ", ".join(f"{reason}: {count:,}" for reason, count in source["dropped"].items()) or "0",
            *(f"{source[key]:,}" for key in ("batches", "remainder_pairs", "truncated_texts", "tokens")),
            _named(source["segment_tokens"]),
        )
        for source in report["sources"]
    ]
    print_table(columns, rows)
    lengths, balance = report["segment_tokens"], report["balance"]
    facts = (
        ("epochs", f"{report['epochs']:,}"),
        ("batches", f"{report['batches']:,} of {report['pairs_per_batch']:,} pairs"),
        ("packs", f"{report['packs']:,}, a multiple of {report['pack_multiple']} per batch"),
        ("tokens", f"{report['tokens']:,}"),
        ("pack fill", f"{report['pack_fill']:.1%} of {report['pack_tokens']:,} tokens"),
        ("segment tokens", _named(lengths)),
        (
            "balance",
            f"largest pack / mean pack of a batch: {balance['mean']:.3f} on average, {balance['max']:.3f} at most",
        ),
        *_self_supervised(report),
        ("verified", "yes" if report["verified"] else "no; add --verify"),
    )
    sys.stdout.write("\n")
    print_table(("", report["folder"]), facts)
    sys.stdout.write("\nsegments by tokens\n")
    sys.stdout.writelines(f"{line}\n" for line in bars(report["segments_by_tokens"]))


def _self_supervised(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the facts that only shards with trained special tokens have."""
    facts = []
    if report["special_tokens"]:
        facts += [
            ("special tokens", f"{report['special_tokens']} behind every segment"),
            ("end of an answer", report["end_token"]),
            ("teacher", "none; add one with `python -m data_prep teach`"),
        ]
    if report["teacher"] is not None:
        teacher = report["teacher"]
        kind = "unit vectors" if teacher["normalized"] else "not normalised"
        prompt = f", prompt {teacher['prompt']!r}" if teacher["prompt"] else ""
        facts[-1:] = [("teacher", f"{teacher['model']}, {teacher['dimension']} dimensions, {kind}{prompt}")]
    return facts


def _named(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())
