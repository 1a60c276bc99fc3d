"""Invariants: the report counts what is in the shards; every broken promise of the format is refused by file and batch;
examples show the text with its body marked.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import english_pairs
from PIL import Image

from anchor.data.shards import Batch, Pack, ShardReader, ShardWriter
from anchor.errors import ShardError
from data_prep.__main__ import main
from data_prep.inspection.inspect import examples, summarise
from data_prep.inspection.verify import verify

MakeShards = Callable[..., Path]


@pytest.fixture(scope="module")
def shards(make_shards: MakeShards) -> Path:
    return make_shards(num_rows=70)


def rewritten(folder: Path, change: Callable[[list[Batch]], list[Batch]]) -> ShardReader:
    """Rewrite the folder with changed batches; its files and checksums are valid."""
    reader = ShardReader(folder)
    # Not in place: the batches are views of the old file.
    beside = folder / "beside"
    beside.mkdir()
    writer = ShardWriter(beside)
    for batch in change([reader.read(i) for i in range(len(reader))]):
        writer.write(batch)
    writer.close()
    (beside / "00000.arrow").replace(folder / "00000.arrow")
    dataclasses.replace(reader.index, shards=writer.shards).write(folder)
    return ShardReader(folder)


def with_first_pack(batches: list[Batch], **changes: Any) -> list[Batch]:
    """Replace arrays in the second batch's first pack."""
    batch = batches[1]
    first = dataclasses.replace(batch.packs[0], **changes)
    return [batches[0], dataclasses.replace(batch, packs=(first, *batch.packs[1:])), *batches[2:]]


def altered(array: np.ndarray, position: int, value: int) -> np.ndarray:
    copy = array.copy()
    copy[position] = value
    return copy


def refusal(reader: ShardReader) -> str:
    with pytest.raises(ShardError) as caught:
        verify(reader)
    return str(caught.value)


def test_the_report_counts_what_is_in_the_shards(shards: Path) -> None:
    reader = ShardReader(shards)
    report = summarise(reader)
    packs = [pack for i in range(len(reader)) for pack in reader.read(i).packs]
    lengths = np.concatenate([pack.segment_lengths for pack in packs])
    assert len(lengths) == 64 * 3
    (source,) = report["sources"]
    assert source.pop("tokens") > lengths.sum()  # with the remainder
    assert source.pop("truncated_texts") > 0
    assert source == {
        "name": "small",
        "rows_read": 70,
        "kept": 70,
        "dropped": {},
        "batches": 4,
        "remainder_pairs": 6,
        "instructions": ["Answer it"],
        "symmetric": False,
        "languages": [],
        "weight": 1.0,
        "segment_tokens": report["segment_tokens"],  # of the only source
    }
    histogram = report["segments_by_tokens"]["small"]
    assert [number for *_, number in histogram] == [
        int(((lengths >= first) & (lengths <= last)).sum()) for first, last, _ in histogram
    ]
    assert (histogram[0][0], histogram[-1][1], len(histogram)) == (1, 64, 16)
    assert (report["batches"], report["packs"], report["tokens"]) == (4, len(packs), lengths.sum())
    assert report["pack_fill"] == pytest.approx(lengths.sum() / (len(packs) * 512))
    expected = {f"p{p}": int(np.percentile(lengths, p, method="inverted_cdf")) for p in (5, 25, 50, 75, 95)}
    assert report["segment_tokens"] == expected | {"max": lengths.max()}
    ratios = []
    for i in range(4):
        sizes = [pack.num_tokens for pack in reader.read(i).packs]
        ratios.append(max(sizes) / np.mean(sizes))
    assert report["balance"] == pytest.approx({"mean": np.mean(ratios), "max": max(ratios)})
    assert 1.0 <= report["balance"]["mean"] < 1.5


def test_sound_shards_are_verified(shards: Path, make_shards: MakeShards) -> None:
    verify(ShardReader(shards))
    verify(ShardReader(make_shards(hard_negatives=0, pack_multiple=1, pairs=5)))
    largest = ShardReader(make_shards(hard_negatives=2, pack_multiple=8))
    verify(largest)
    assert len(largest) == 4  # there was something to verify


def first_body(batch: Batch) -> int:
    return int(batch.packs[0].body_starts[0])


PROMISES: list[tuple[Callable[[list[Batch]], list[Batch]], str]] = [
    (
        lambda b: with_first_pack(b, body_ends=altered(b[1].packs[0].body_ends, 2, 10_000)),
        "batch 1: pack 0: the body of segment 2 is empty or not inside the segment",
    ),
    (
        lambda b: with_first_pack(b, body_ends=altered(b[1].packs[0].body_ends, 1, b[1].packs[0].body_starts[1])),
        "batch 1: pack 0: the body of segment 1 is empty or not inside the segment",
    ),
    (
        lambda b: with_first_pack(b, input_ids=altered(b[1].packs[0].input_ids, -1, 7)),
        "batch 1: pack 0: segment {last} does not end in the anchor token",
    ),
    (
        lambda b: with_first_pack(b, roles=altered(b[1].packs[0].roles, 0, 1)),
        "batch 1: 15 pairs, the recipe says 16",
    ),
    (
        lambda b: with_first_pack(b, roles=altered(b[1].packs[0].roles, 1, 2)),
        "batch 1: pack 0: a pair's segments do not stand together as query, positive, hard negatives",
    ),
    (
        lambda b: with_first_pack(b, pair_ids=altered(b[1].packs[0].pair_ids, 1, 69)),
        "batch 1: pack 0: the segments of a pair are of different rows",
    ),
    (
        lambda b: with_first_pack(b, segment_lengths=altered(b[1].packs[0].segment_lengths, 0, 1)),
        "batch 1: pack 0: segment lengths do not add up to its {tokens} tokens",
    ),
    (
        lambda b: [b[0], dataclasses.replace(b[1], query_target_tokens=5), *b[2:]],
        "batch 1: query_target_tokens is 5, counted are {query_target}",
    ),
    (
        lambda b: [b[0], dataclasses.replace(b[1], document_target_tokens=6), *b[2:]],
        "batch 1: document_target_tokens is 6, counted are {document_target}",
    ),
    (lambda b: [*b[:3], b[0]], "batch 3: pack 0: row {row} of the source is packed twice"),
    (
        lambda b: with_first_pack(b, pair_ids=b[1].packs[0].pair_ids * 0 + b[1].packs[0].pair_ids[0]),
        "batch 1: pack 0: row {row1} of the source is packed twice",
    ),
    (
        lambda b: with_first_pack(b, pair_ids=b[1].packs[0].pair_ids + 1000),
        "batch 1: pack 0: a pair of a row that the source does not have (it has 70)",
    ),
    (
        lambda b: [b[0], dataclasses.replace(b[1], source="other"), *b[2:]],
        "batch 1: source 'other' is not in the index",
    ),
    (
        lambda b: [b[0], dataclasses.replace(b[1], packs=_halved(b[1].packs)), *b[2:]],
        "batch 1: {more} packs are no multiple of pack_multiple (4)",
    ),
]


def _halved(packs: tuple[Pack, ...]) -> tuple[Pack, ...]:
    """Return the same pairs in one more pack."""
    pack = packs[0]
    first = np.arange(len(pack.roles)) < 3
    return (pack.select(first), pack.select(~first), *packs[1:])


@pytest.mark.parametrize(("change", "expected"), PROMISES)
def test_a_broken_promise_is_refused_by_file_and_batch(
    make_shards: MakeShards, change: Callable[[list[Batch]], list[Batch]], expected: str
) -> None:
    folder = make_shards(num_rows=70)
    reader = ShardReader(folder)
    verify(reader)
    batch = reader.read(1)
    facts = {
        "last": len(batch.packs[0].roles) - 1,
        "tokens": batch.packs[0].num_tokens,
        "query_target": batch.query_target_tokens,
        "document_target": batch.document_target_tokens,
        "row": int(reader.read(0).packs[0].pair_ids[0]),
        "row1": int(batch.packs[0].pair_ids[0]),
        "more": len(batch.packs) + 1,
    }
    message = refusal(rewritten(folder, change))
    assert message == f"{folder}/00000.arrow: {expected.format(**facts)}; pack again into an empty folder"


def test_segments_and_packs_over_the_limits_are_refused(make_shards: MakeShards) -> None:
    folder = make_shards()
    reader = ShardReader(folder)
    for section, key, expected in (
        ("batch", "pack_tokens", "tokens, more than pack_tokens (20)"),
        ("text", "max_tokens", "tokens, more than text.max_tokens (20)"),
    ):
        recipe = reader.index.recipe | {section: reader.index.recipe[section] | {key: 20}}
        dataclasses.replace(reader.index, recipe=recipe).write(folder)
        assert expected in refusal(ShardReader(folder))


def test_a_missing_batch_is_noticed(make_shards: MakeShards) -> None:
    folder = make_shards()
    assert refusal(rewritten(folder, lambda batches: batches[:3])) == (
        f"{folder}: source 'small' has 3 batches, the index says 4; pack again into an empty folder"
    )


def test_an_index_that_does_not_add_up_is_refused(make_shards: MakeShards) -> None:
    folder = make_shards(num_rows=70)
    reader = ShardReader(folder)
    (source,) = reader.index.sources
    for change, expected in (
        ({"rows_read": 71}, "source 'small' has 71 rows, but 70 kept and 0 dropped"),
        (
            {"kept": 69, "dropped": {"x": 1}},
            "source 'small' kept 69 pairs, but has 4 batches a pass of 16 and 6 left over",
        ),
    ):
        dataclasses.replace(reader.index, sources=[source | change]).write(folder)
        message = refusal(ShardReader(folder))
        assert message == f"{folder}/index.json: {expected}; pack again into an empty folder"


def test_an_epoch_with_a_batch_twice_is_refused(make_shards: MakeShards) -> None:
    folder = make_shards(epochs=2)  # 4 batches, twice
    verify(ShardReader(folder))
    swapped = rewritten(folder, lambda b: [*b[:3], b[0], *b[4:]])
    row = int(swapped.read(0).packs[0].pair_ids[0])
    assert refusal(swapped) == (
        f"{folder}/00000.arrow: batch 3: pack 0: row {row} of the source is packed twice; pack again into an empty "
        "folder"
    )


def test_an_altered_file_or_tokenizer_is_refused(make_shards: MakeShards) -> None:
    folder = make_shards()
    file = folder / "00000.arrow"
    good = file.read_bytes()
    index = (folder / "index.json").read_text()
    assert hashlib.sha256(good).hexdigest() in index
    (folder / "index.json").write_text(index.replace(hashlib.sha256(good).hexdigest(), "0" * 64))
    assert refusal(ShardReader(folder)) == f"{file}: sha256 differs; delete it and run `python -m data_prep pack` again"
    (folder / "index.json").write_text(index)
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert refusal(ShardReader(folder)) == (
        f"{folder}/tokenizer: missing or not the tokenizer that the shards were made with; pack again"
    )


def test_examples_show_whole_pairs_with_the_body_marked(shards: Path) -> None:
    rows = english_pairs(70)
    shown = examples(ShardReader(shards), 6)
    assert len(shown) == 6
    assert len({example["row"] for example in shown}) == 6
    for example in shown:
        assert example["source"] == "small"
        row = rows[example["row"]]
        segments = example["segments"]
        assert list(segments) == ["query", "positive", "hard negative 1"]
        assert segments["query"] == f"<|im_start|>user\nAnswer it: ⟦{row['query']}⟧<|im_end|>"
        body = segments["positive"].removeprefix("<|im_start|>user\n⟦").removesuffix("⟧<|im_end|>")
        assert body
        assert row["positive"].startswith(body)
    assert len(examples(ShardReader(shards), 1000)) == 64
    assert examples(ShardReader(shards), 0) == []


def test_the_tables_are_plain_text_away_from_a_terminal(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(shards), "--verify", "--show", "1"])
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "source rows read kept dropped batches remainder truncated tokens segment tokens"
    assert lines[1].startswith("small 70 70 0 4 6 ")
    assert "batches 4 of 16 pairs" in lines
    assert "verified yes" in lines
    assert any(line.startswith("pack fill ") and line.endswith(" of 512 tokens") for line in lines)
    assert "query: <|im_start|>user\\nAnswer it: ⟦question" in out
    assert "│" not in out
    drawn = [line for line in out.splitlines() if "#" in line]
    assert len(drawn) > 5
    assert max(line.count("#") for line in drawn) == 40
    counted = [line.split()[-1] for line in out.split("segments by tokens\n")[1].split("\n\n")[0].splitlines()]
    assert sum(map(int, counted)) == 64 * 3


def test_the_picture_is_a_png_with_ink_and_other_files_are_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(shards), "--png", str(tmp_path / "lengths.png")])
    with Image.open(tmp_path / "lengths.png") as image:
        colours = image.convert("RGB").getcolors(1 << 24) or []
    assert image.size[0] > 900
    assert max(number for number, colour in colours if colour == (42, 92, 138)) > 2000
    capsys.readouterr()
    for name, expected in (("lengths.nonsense", "Format 'nonsense' is not supported"), ("no/x.png", "[Errno 2]")):
        with pytest.raises(SystemExit) as stop:
            main(["inspect", str(shards), "--png", str(tmp_path / name)])
        assert stop.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"error: --png {tmp_path / name}: cannot be written: {expected}")


def test_a_picture_is_not_written_over_another_file(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.png").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(shards), "--png", str(tmp_path / "precious.png")])
    assert stop.value.code == 2
    assert capsys.readouterr() == (
        "",
        f"error: --png {tmp_path}/precious.png: already exists and is not written over; delete it or choose another "
        "name\n",
    )
    assert (tmp_path / "precious.png").read_text() == "mine"


def test_json_is_one_object(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(shards), "--json", "--show", "2"])
    report = json.loads(capsys.readouterr().out)
    assert (report["batches"], report["verified"], len(report["examples"])) == (4, False, 2)


def test_a_wrong_folder_exits_2_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr() == (
        "",
        f"error: {tmp_path}: unfinished, it has no index.json; run `python -m data_prep pack` again\n",
    )


def test_a_picture_without_a_suffix_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # matplotlib adds `.png` by itself, and wrote over a file that was there.
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(shards), "--png", str(tmp_path / "hist")])
    assert stop.value.code == 2
    expected = f"error: --png {tmp_path}/hist: has no suffix that names a kind of picture; give {tmp_path}/hist.png\n"
    assert capsys.readouterr().err == expected
