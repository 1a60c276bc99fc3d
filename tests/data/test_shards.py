"""Invariants: a batch comes back bit for bit; an altered, truncated or unfinished folder is refused by name; the files
are ordinary Arrow that others can read.
"""

import dataclasses
import errno
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import anchor.data.shards as shards_module
from anchor.data.index import FORMAT_VERSION, Index, read_index
from anchor.data.shards import Batch, Pack, ShardReader, ShardWriter, make_batch, text_id
from anchor.errors import ShardError

FIELDS = [field.name for field in dataclasses.fields(Pack) if field.name != "teacher"]


def random_pack(draw: np.random.Generator, pairs: int, negatives: int = 1) -> Pack:
    segments = pairs * (2 + negatives)
    starts = draw.integers(0, 4, segments)
    ends = starts + draw.integers(1, 9, segments)
    lengths = ends + draw.integers(1, 3, segments)
    return Pack(
        input_ids=draw.integers(0, 2**31 - 1, lengths.sum(), dtype=np.int32),
        segment_lengths=lengths.astype(np.int32),
        body_starts=starts.astype(np.int32),
        body_ends=ends.astype(np.int32),
        roles=np.tile(np.arange(2 + negatives, dtype=np.int8), pairs),
        pair_ids=np.repeat(draw.integers(0, 2**62, pairs), 2 + negatives),
        text_ids=draw.integers(-(2**63), 2**63 - 1, segments),
    )


def random_batches(seed: int, number: int) -> list[Batch]:
    draw = np.random.default_rng(seed)
    return [
        make_batch([random_pack(draw, int(n)) for n in draw.integers(1, 5, 4)], f"source {i}") for i in range(number)
    ]


def write_folder(folder: Path, batches: list[Batch], batches_per_shard: int = 3) -> Path:
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, batches_per_shard)
    for batch in batches:
        writer.write(batch)
    writer.close()
    recipe = {"batch": {"pack_multiple": 4}}
    Index(FORMAT_VERSION, "", 0, {}, recipe, [], {}, writer.shards).write(folder)
    return folder


def equal(a: Batch, b: Batch) -> bool:
    """Return whether every value and every dtype is equal."""
    same = len(a.packs) == len(b.packs) and dataclasses.replace(a, packs=()) == dataclasses.replace(b, packs=())
    return same and all(
        getattr(x, name).dtype == getattr(y, name).dtype and np.array_equal(getattr(x, name), getattr(y, name))
        for x, y in zip(a.packs, b.packs, strict=True)
        for name in FIELDS
    )


def refusal(folder: Path, batch: int = 0) -> str:
    with pytest.raises(ShardError) as caught:
        ShardReader(folder).read(batch)
    return str(caught.value)


@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(1, 4))
def test_batches_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, number: int, batches_per_shard: int
) -> None:
    batches = random_batches(seed, number)
    folder = write_folder(tmp_path_factory.mktemp("shards") / "s", batches, batches_per_shard)
    reader = ShardReader(folder)
    assert len(reader) == number
    assert len(reader.index.shards) == -(-number // batches_per_shard)
    for i in reversed(range(number)):
        assert equal(reader.read(i), batches[i])
    assert not equal(reader.read(0), random_batches(seed + 1, 1)[0])
    reader.verify_files()
    shutil.rmtree(folder)


def test_target_tokens_are_body_tokens_plus_one_per_segment() -> None:
    batch = random_batches(0, 1)[0]
    expected = [0, 0]
    for pack in batch.packs:
        for role, start, end in zip(pack.roles, pack.body_starts, pack.body_ends, strict=True):
            if role < 2:
                expected[role] += int(end - start) + 1
    assert [batch.query_target_tokens, batch.document_target_tokens] == expected
    assert min(expected) > 0
    assert batch.num_pairs == sum(pack.num_pairs for pack in batch.packs) > 0


def test_select_keeps_whole_segments() -> None:
    pack = random_pack(np.random.default_rng(0), 3)
    kept = pack.select(pack.roles == 1)
    bounds = np.concatenate([[0], np.cumsum(pack.segment_lengths)])
    expected = [pack.input_ids[bounds[s] : bounds[s + 1]] for s in (1, 4, 7)]
    assert kept.input_ids.tolist() == np.concatenate(expected).tolist()
    assert kept.pair_ids.tolist() == pack.pair_ids[[1, 4, 7]].tolist()
    assert kept.segment_lengths.tolist() == pack.segment_lengths[[1, 4, 7]].tolist()
    assert pack.select(np.ones(9, dtype=bool)) is pack


def test_a_flipped_byte_anywhere_is_refused_by_name_or_changes_nothing(tmp_path: Path) -> None:
    batches = random_batches(1, 3)
    folder = write_folder(tmp_path / "s", batches)
    file = folder / "00000.arrow"
    good = file.read_bytes()
    draw = random.Random(0)
    # Every byte of the footer, of the schema and of the first batch's metadata, and many others.
    positions = sorted({*range(0, 1200, 3), *range(len(good) - 800, len(good), 3), *draw.sample(range(len(good)), 300)})
    refused = unchanged = 0
    for position in positions:
        bad = bytearray(good)
        bad[position] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        try:
            reader = ShardReader(folder)
            read = [reader.read(i) for i in range(3)]
        except ShardError as error:
            refused += 1
            assert str(error).startswith(f"{file}: batch ")
            assert str(error).endswith("; delete the file and run `python -m data_prep pack` again")
        else:
            assert all(equal(a, b) for a, b in zip(read, batches, strict=True)), f"byte {position} changed the data"
            unchanged += 1
            with pytest.raises(ShardError) as caught:  # padding: harmless, but not what was written
                reader.verify_files()
            assert str(caught.value) == (f"{file}: sha256 differs; delete it and run `python -m data_prep pack` again")
    assert refused > 200
    file.write_bytes(good)
    assert all(equal(ShardReader(folder).read(i), batches[i]) for i in range(3))


def test_an_altered_token_is_refused_by_its_checksum(tmp_path: Path) -> None:
    batches = random_batches(2, 3)
    folder = write_folder(tmp_path / "s", batches)
    file = folder / "00000.arrow"
    data = file.read_bytes()
    tokens = batches[1].packs[0].input_ids.tobytes()
    assert data.count(tokens) == 1
    file.write_bytes(data.replace(tokens, tokens[::-1]))
    assert refusal(folder, 1) == (
        f"{file}: batch 1: checksum differs; delete the file and run `python -m data_prep pack` again"
    )
    assert equal(ShardReader(folder).read(0), batches[0])


def test_a_file_of_other_column_types_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "s", random_batches(3, 1))
    file = folder / "00000.arrow"
    with pa.ipc.open_file(file.read_bytes()) as reader:
        record, custom = reader.get_batch_with_custom_metadata(0)
    arrays = [column.cast(pa.list_(pa.uint32())) if i == 1 else column for i, column in enumerate(record.columns)]
    other = pa.RecordBatch.from_arrays(arrays, names=record.schema.names)
    with pa.ipc.new_file(str(file), other.schema) as writer:
        writer.write_batch(other, custom_metadata=custom)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["bytes"] = file.stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    assert refusal(folder) == (
        f"{file}: batch 0: unreadable (ArrowInvalid); delete the file and run `python -m data_prep pack` again"
    )


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_or_missing_file_is_refused(tmp_path: Path, keep: int) -> None:
    folder = write_folder(tmp_path / "s", random_batches(4, 2))
    file = folder / "00000.arrow"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    expected = f"{file}: missing or not {len(data)} bytes long; delete it and run `python -m data_prep pack` again"
    assert refusal(folder) == expected
    file.unlink()
    assert refusal(folder) == expected
    with pytest.raises(ShardError) as caught:
        ShardReader(folder).verify_files()
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: shutil.rmtree(f), "{f}: no such folder of shards; run `python -m data_prep pack` first"),
        (
            lambda f: (f / "index.json").unlink(),
            "{f}: unfinished, it has no index.json; run `python -m data_prep pack` again",
        ),
        (
            lambda f: (f / "index.json").write_text('{"version": 3}'),
            "{f}/index.json: format version 3, this program reads 1 and 2; pack again",
        ),
        (
            lambda f: (f / "index.json").write_text('{"version": 1'),
            "{f}/index.json: not a readable index (Expecting ',' delimiter: line 1 column 14 (char 13)); pack again",
        ),
        (
            lambda f: (f / "index.json").write_text("{}"),
            "{f}/index.json: not a readable index ('version'); pack again",
        ),
    ],
)
def test_a_folder_without_a_good_index_is_refused(tmp_path: Path, change: Callable[[Path], Any], expected: str) -> None:
    folder = write_folder(tmp_path / "s", random_batches(5, 1))
    assert read_index(folder).num_batches == 1
    change(folder)
    assert refusal(folder) == expected.format(f=folder)


def test_other_programs_can_read_the_files(tmp_path: Path) -> None:
    import datasets

    batches = random_batches(6, 4)
    folder = write_folder(tmp_path / "s", batches, batches_per_shard=2)
    packs = [pack for batch in batches for pack in batch.packs]
    files = sorted(folder.glob("*.arrow"))
    assert len(files) == 2
    rows = [row for file in files for row in pa.ipc.open_file(str(file)).read_all().to_pylist()]
    assert rows == [{name: getattr(pack, name).tolist() for name in FIELDS} for pack in packs]
    # `datasets` takes Arrow files of any kind by name.
    loaded = datasets.load_dataset(
        "arrow", data_files=[str(file) for file in files], split="train", cache_dir=str(tmp_path / "cache")
    )
    assert list(loaded) == rows
    assert len(rows) == 16


def test_the_writer_cuts_files_and_the_index_counts_them(tmp_path: Path) -> None:
    batches = random_batches(7, 7)
    shards = ShardReader(write_folder(tmp_path / "s", batches, batches_per_shard=3)).index.shards
    assert [shard["file"] for shard in shards] == ["00000.arrow", "00001.arrow", "00002.arrow"]
    assert [shard["batches"] for shard in shards] == [3, 3, 1]
    assert [shard["packs"] for shard in shards] == [12, 12, 4]
    assert sum(shard["tokens"] for shard in shards) == sum(p.num_tokens for b in batches for p in b.packs)
    assert all((tmp_path / "s" / shard["file"]).stat().st_size == shard["bytes"] for shard in shards)


def test_text_ids_are_equal_for_equal_texts_only() -> None:
    texts = ["", "a", "b", "é", "漢字"]
    assert len({text_id(text) for text in texts}) == len(texts)
    assert text_id("漢字") == text_id("漢" + "字")
    assert all(-(2**63) <= text_id(text) < 2**63 for text in texts)


def test_more_files_than_may_be_open_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_MAX_OPEN", 2)
    batches = random_batches(8, 6)
    reader = ShardReader(write_folder(tmp_path / "s", batches, batches_per_shard=1))
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    kept = []
    for number in (0, 3, 1, 0, 5, 4, 2, 3):
        read = reader.read(number)
        assert equal(read, batches[number])
        kept.append((number, read))
        del read
    assert all(equal(read, batches[number]) for number, read in kept)  # closed files leave what was read
    kept.clear()
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before + 2


def test_a_systems_refusal_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # "delete the file" was advised where only too many files were open.
    folder = write_folder(tmp_path / "s", random_batches(9, 2), batches_per_shard=1)

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(shards_module.mmap, "mmap", refused)
    assert refusal(folder, 1) == (
        f"{folder}/00001.arrow: batch 1: cannot be read: Too many open files; mend that and start again"
    )
