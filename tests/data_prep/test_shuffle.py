"""Invariants: the first of equal pairs is kept, whatever the number of buckets; a pass is a permutation of the kept
pairs, another one for every source, pass and seed, and the same as numpy's own.
"""

import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import english_pairs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from packs import MakeRecipe, files_source, folder_bytes, packed

import data_prep.packing.shuffle as shuffle_module
import data_prep.sources.units as units_module
from data_prep.packing.shuffle import Kept, first_of_equals, read_batch, shuffled


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=20))
def test_the_first_of_equal_keys_is_found(keys: list[tuple[int, int]]) -> None:
    array = np.asarray(keys, dtype=np.int64).reshape(-1, 2)
    assert first_of_equals(array).tolist() == sorted(keys.index(key) for key in set(keys))


@pytest.mark.parametrize("bucket_pairs", [1, 9, 1 << 18])
def test_the_number_of_buckets_changes_no_byte(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, bucket_pairs: int
) -> None:
    monkeypatch.setattr(units_module, "UNIT_ROWS", 7)
    rows = english_pairs(60)
    rows[50:] = rows[:10]
    recipe = make_recipe([files_source(write_jsonl(tmp_path / "x.jsonl", rows))], batch__pairs=4)
    reader = packed(recipe)
    assert reader.index.sources[0]["dropped"] == {"equal to an earlier pair": 10}
    kept = {int(i) for n in range(len(reader)) for one in reader.read(n).packs for i in one.pair_ids}
    assert max(kept) < 50  # the first ones
    expected = folder_bytes(reader.folder)
    shutil.rmtree(reader.folder)
    monkeypatch.setattr(shuffle_module, "BUCKET_PAIRS", bucket_pairs)
    assert folder_bytes(packed(recipe).folder) == expected


def test_a_pass_is_a_permutation_of_its_own(tmp_path: Path) -> None:
    numbers = np.arange(1000, dtype=np.int64) * 3
    numbers.tofile(tmp_path / "s.kept")
    kept = Kept(tmp_path / "s.kept", len(numbers), 0, 0)
    orders = {}
    for seed, source, walk in ((0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0)):
        file = shuffled(kept, seed, source, walk)
        orders[seed, source, walk] = order = np.fromfile(file, np.int64)
        assert sorted(order.tolist()) == numbers.tolist()
        draw = np.random.default_rng([seed, zlib.crc32(source.encode()), walk])
        assert order.tolist() == numbers[draw.permutation(len(numbers))].tolist()
        assert read_batch(file, 7, 16).tolist() == order[112:128].tolist()
    assert len({tuple(order) for order in orders.values()}) == 4
    assert np.fromfile(tmp_path / "s.kept", np.int64).tolist() == numbers.tolist()
