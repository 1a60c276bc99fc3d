"""Invariants: the order is a permutation and a pure function; ranks' packs are disjoint and complete; a run resumes at
the exact batch, on any number of ranks; a large index opens without touching a shard.
"""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anchor.data.batches import (
    batch_order,
    batch_stream,
    check_ranks,
    rank_packs,
    to_tensors,
)
from anchor.data.index import FORMAT_VERSION, Index
from anchor.data.shards import Batch, Pack, ShardReader
from anchor.errors import ShardError


@pytest.fixture(scope="module")
def reader(make_shards: Callable[..., Path]) -> ShardReader:
    reader = ShardReader(make_shards(pairs=8, num_rows=64))
    assert len(reader) == 8
    return reader


def identity(batch: Batch) -> tuple[int, ...]:
    return tuple(int(i) for pack in batch.packs for i in pack.pair_ids)


@given(st.integers(1, 200), st.integers(0, 2**31), st.integers(0, 50))
def test_the_order_is_a_permutation_and_a_pure_function(size: int, seed: int, epoch: int) -> None:
    order = batch_order(size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))
    assert order.tolist() == batch_order(size, seed, epoch).tolist()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(batch_order(50, seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 9


@given(st.integers(1, 8), st.integers(1, 6))
def test_ranks_share_packs_without_overlap(world_size: int, share: int) -> None:
    parts = [list(rank_packs(world_size * share, rank, world_size)) for rank in range(world_size)]
    assert [i for part in parts for i in part] == list(range(world_size * share))
    assert {len(part) for part in parts} == {share}


def test_ranks_that_do_not_divide_the_packs_are_a_bug() -> None:
    with pytest.raises(ValueError, match=r"^3 ranks do not divide 8 packs$"):
        rank_packs(8, 0, 3)


@pytest.mark.parametrize(
    ("multiple", "ranks", "expected"),
    [
        (
            8,
            12,
            "x.yaml: 12 ranks do not divide pack_multiple (8) of data/s; use 1, 2, 4 or 8 ranks, or pack again with "
            "batch.pack_multiple=12",
        ),
        (
            1,
            2,
            "x.yaml: 2 ranks do not divide pack_multiple (1) of data/s; use 1 rank, or pack again with "
            "batch.pack_multiple=2",
        ),
    ],
)
def test_a_wrong_number_of_ranks_is_refused_with_the_right_ones(multiple: int, ranks: int, expected: str) -> None:
    with pytest.raises(ShardError) as caught:
        check_ranks(multiple, ranks, Path("data/s"), "x.yaml")
    assert str(caught.value) == expected
    for divisor in (1, multiple):
        check_ranks(multiple, divisor, Path("data/s"), "x.yaml")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_is_composed_alike_on_any_number_of_ranks(reader: ShardReader, world_size: int) -> None:
    num_packs = len(reader.read(3).packs)
    shares = [list(rank_packs(num_packs, rank, world_size)) for rank in range(world_size)]
    assert num_packs >= world_size
    assert [pack for share in shares for pack in share] == list(range(num_packs))
    assert {len(share) for share in shares} == {num_packs // world_size}


def test_an_epoch_has_every_batch_once(reader: ShardReader) -> None:
    for epoch in range(2):
        steps = list(batch_stream(reader, 5, epoch * 8, epoch * 8 + 8))
        assert [step for step, _ in steps] == list(range(epoch * 8, epoch * 8 + 8))
        assert sorted(identity(batch) for _, batch in steps) == sorted(identity(reader.read(i)) for i in range(8))
        rows = [i for _, batch in steps for i in identity(batch)]
        assert sorted(set(rows)) == list(range(64))


def test_shards_of_several_epochs_are_walked_through_in_turn(make_shards: Callable[..., Path]) -> None:
    reader = ShardReader(make_shards(num_rows=64, epochs=2))
    size = len(reader) // 2
    assert size == 4
    epochs = [
        [identity(batch) for _, batch in batch_stream(reader, 5, epoch * size, (epoch + 1) * size)]
        for epoch in range(3)
    ]
    written = [[identity(reader.read(e * size + i)) for i in range(size)] for e in range(2)]
    assert sorted(written[0]) != sorted(written[1])
    assert [sorted(epoch) for epoch in epochs] == [sorted(written[e % 2]) for e in range(3)]


@pytest.mark.parametrize("first", [0, 1, 7, 8, 13])
def test_a_run_resumes_at_the_exact_batch(reader: ShardReader, first: int) -> None:
    whole = [(step, identity(batch)) for step, batch in batch_stream(reader, 3, 0, 20)]
    resumed = [(step, identity(batch)) for step, batch in batch_stream(reader, 3, first, 20)]
    assert len(whole) == 20
    assert resumed == whole[first:]


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_no_more_batches_are_read_ahead_than_asked(
    reader: ShardReader, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    reads, lock = [], threading.Lock()
    original = reader.read

    def counted(batch: int) -> Batch:
        with lock:
            reads.append(batch)
        return original(batch)

    monkeypatch.setattr(reader, "read", counted)
    stream = batch_stream(reader, 0, 0, 8, ahead=ahead)
    for taken in range(1, 4):
        next(stream)
        assert taken <= len(reads) <= taken + ahead
    stream.close()
    assert len(reads) < 8


def test_an_error_while_reading_ahead_reaches_the_caller(reader: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(batch: int) -> Batch:
        raise ShardError(f"batch {batch} is broken")

    monkeypatch.setattr(reader, "read", broken)
    with pytest.raises(ShardError, match=r"is broken$"):
        next(batch_stream(reader, 0, 0, 8))


def test_tensors_hold_what_the_pack_holds(reader: ShardReader) -> None:
    pack = reader.read(0).packs[0]
    tensors = to_tensors(pack, torch.device("cpu"))
    assert tensors.input_ids.dtype == tensors.position_ids.dtype == torch.int64
    assert tensors.cu_seqlens.dtype == torch.int32
    assert tensors.input_ids.tolist() == pack.input_ids.tolist()
    assert tensors.cu_seqlens.tolist() == [0, *np.cumsum(pack.segment_lengths).tolist()]
    assert tensors.position_ids[tensors.cu_seqlens[:-1].long()].eq(0).all()
    assert tensors.max_length == pack.segment_lengths.max() > 1
    assert {field.name for field in dataclasses.fields(Pack)} == {
        field.name for field in dataclasses.fields(tensors.pack)
    }


def test_an_index_of_100000_batches_opens_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [
        {"file": f"{i:05d}.arrow", "bytes": 1, "sha256": "0" * 64, "batches": 256, "packs": 256, "tokens": 1}
        for i in range(391)
    ]
    Index(FORMAT_VERSION, "", 0, {}, {"batch": {"pack_multiple": 1}}, [], {}, shards).write(tmp_path)

    def opened(*_: object) -> None:
        raise AssertionError("a shard was opened")

    monkeypatch.setattr(pa, "memory_map", opened)
    reader = ShardReader(tmp_path)
    assert len(reader) == 391 * 256 > 100_000
    # None of the files exists: only reading one of their batches says so.
    with pytest.raises(ShardError) as caught:
        reader.read(99_999)
    assert str(caught.value) == (
        f"{tmp_path / '00390.arrow'}: missing or not 1 bytes long; delete it and run `python -m data_prep pack` again"
    )
