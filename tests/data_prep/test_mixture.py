"""Invariants: the batches of an epoch are a permutation, those of each source follow one another through its passes,
and their numbers are what the mixture says; no pair comes twice in a pass; every epoch has batches of its own.
"""

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import english_pairs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from packs import MakeRecipe, files_source, packed

from anchor.config.load import validate
from anchor.config.pack_recipe import PackRecipe
from anchor.errors import ConfigError
from data_prep.packing.mixture import Share, epoch_batches, shares

PROPORTIONAL = {"kind": "proportional"}


def recipe_of(mixture: dict[str, Any], epochs: int = 1, pairs: int = 10) -> PackRecipe:
    source = {"kind": "files", "name": "s", "path": "x", "instructions": []}
    raw = {
        "output_dir": "x",
        "seed": 0,
        "tokenizer": "x",
        "template": {"kind": "preset", "name": "plain"},
        "sources": [source],
        "text": {"max_tokens": 8, "hard_negatives": 0},
        "batch": {"pairs": pairs, "pack_tokens": 64, "pack_multiple": 1},
        "mixture": mixture,
        "epochs": epochs,
    }
    return validate(raw, PackRecipe, "recipe")


@pytest.mark.parametrize(
    ("mixture", "weights", "expected"),
    [
        (PROPORTIONAL, {}, {"large": 100, "small": 4, "tiny": 1, "none": 0}),
        (PROPORTIONAL, {"large": 0.5, "small": 3.0}, {"large": 50, "small": 12, "tiny": 1, "none": 0}),
        ({"kind": "capped", "max_pairs": 205}, {}, {"large": 20, "small": 4, "tiny": 1, "none": 0}),
        ({"kind": "capped", "max_pairs": 10}, {"small": 2.0}, {"large": 1, "small": 1, "tiny": 1, "none": 0}),
        ({"kind": "temperature", "exponent": 1.0}, {}, {"large": 100, "small": 4, "tiny": 1, "none": 0}),
        ({"kind": "temperature", "exponent": 0.0}, {}, {"large": 35, "small": 35, "tiny": 35, "none": 0}),
        # 1000 : 40 : 10 to the power of one half is 31.6 : 6.3 : 3.2.
        ({"kind": "temperature", "exponent": 0.5}, {}, {"large": 81, "small": 16, "tiny": 8, "none": 0}),
    ],
)
def test_the_mixture_says_how_many_batches_an_epoch_has(
    mixture: dict[str, Any], weights: dict[str, float], expected: dict[str, int]
) -> None:
    pairs = {"large": 1000, "small": 40, "tiny": 10, "none": 9}
    found = shares(pairs, dict.fromkeys(pairs, 1.0) | weights, recipe_of(mixture))
    assert {name: share.per_epoch for name, share in found.items()} == expected
    assert {name: share.per_pass for name, share in found.items()} == {"large": 100, "small": 4, "tiny": 1, "none": 0}
    assert found["none"].remainder_pairs == 9


SHARES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), min_size=1, max_size=5)


@given(SHARES, st.integers(0, 2**32), st.integers(1, 4))
def test_epochs_go_through_all_passes_and_are_permutations(
    shapes: list[tuple[int, int]], seed: int, epochs: int
) -> None:
    mixed = [Share(b * 10, b, q if b else 0, 0, 0) for b, q in shapes]
    found = [epoch_batches(mixed, seed, epoch) for epoch in range(epochs)]
    for source, share in enumerate(mixed):
        numbers = [sorted(batches[batches[:, 0] == source, 1].tolist()) for batches in found]
        assert list(chain.from_iterable(numbers)) == list(range(epochs * share.per_epoch))
    assert all(np.array_equal(a, epoch_batches(mixed, seed, e)) for e, a in enumerate(found))
    assert all(len(batches) == sum(share.per_epoch for share in mixed) for batches in found)


def test_a_cap_below_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_of({"kind": "capped", "max_pairs": 9})
    assert str(caught.value) == (
        "recipe: mixture.max_pairs (9) is less than batch.pairs (10), so that no source has a batch; raise it"
    )


def epochs_of(recipe: Path) -> tuple[list[Counter[tuple[str, int]]], Any]:
    """Count how often each pair occurs in each epoch."""
    reader = packed(recipe)
    size = reader.index.batches_per_epoch
    assert size * reader.index.num_epochs == len(reader)
    counts: list[Counter[tuple[str, int]]] = [Counter() for _ in range(reader.index.num_epochs)]
    for number in range(len(reader)):
        batch = reader.read(number)
        for one in batch.packs:
            counts[number // size].update((batch.source, row) for row in one.pair_ids[one.roles == 0].tolist())
    return counts, reader.index


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    sizes = {"large": 100, "small": 20}
    return [
        files_source(write_jsonl(tmp_path / f"{name}.jsonl", english_pairs(size)), name=name, languages=["en"])
        for name, size in sizes.items()
    ]


def test_every_epoch_has_every_pair_once_in_other_batches(
    make_recipe: MakeRecipe, sources: list[dict[str, Any]]
) -> None:
    shape = {"batch__pairs": 4, "batch__pack_multiple": 1}
    counts, index = epochs_of(make_recipe(sources, epochs=3, **shape))
    everything = {(name, row) for name, size in (("large", 100), ("small", 20)) for row in range(size)}
    assert all(set(one) == everything and set(one.values()) == {1} for one in counts)
    assert [s["batches"] for s in index.sources] == [75, 15]
    assert index.sources[0]["languages"] == ["en"]
    reader = packed(make_recipe(sources, epochs=2, **shape))
    batches = [frozenset(map(int, one.pair_ids)) for n in range(len(reader)) for one in reader.read(n).packs]
    assert len(set(batches)) == len(batches) >= 60  # fresh batches, not old ones in another order


def test_what_a_capped_epoch_leaves_out_comes_in_the_next(
    make_recipe: MakeRecipe, sources: list[dict[str, Any]]
) -> None:
    shape = {"batch__pairs": 4, "batch__pack_multiple": 1}
    counts, index = epochs_of(make_recipe(sources, mixture={"kind": "capped", "max_pairs": 50}, epochs=2, **shape))
    assert [sum(count for (name, _), count in one.items() if name == "large") for one in counts] == [48, 48]
    assert set(counts[0] + counts[1]) >= {("small", row) for row in range(20)}
    assert {count for (name, _), count in (counts[0] + counts[1]).items() if name == "large"} == {1}
    assert [s["batches"] for s in index.sources] == [24, 10]


def test_a_small_source_repeats_by_temperature_and_each_pass_is_complete(
    make_recipe: MakeRecipe, sources: list[dict[str, Any]]
) -> None:
    shape = {"batch__pairs": 4, "batch__pack_multiple": 1}
    (counts,), index = epochs_of(make_recipe(sources, mixture={"kind": "temperature", "exponent": 0.0}, **shape))
    assert [s["batches"] for s in index.sources] == [15, 15]
    assert {counts["small", row] for row in range(20)} == {3}
    assert max(count for (name, _), count in counts.items() if name == "large") == 1
