"""Invariants, for any texts and any shape of batches: every kept pair is in exactly one batch or counted as remainder,
whole and in one pack; packs are within the budget and balanced; every segment ends in the anchor token; the batches are
a permutation of those cut from the shuffled pairs; any number of workers writes the same bytes.
"""

import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import MakeRecipe, files_source, folder_bytes, packed

import data_prep.packing.shard_files as writing_module
import data_prep.sources.units as units_module
from anchor.data.records import text_field
from anchor.errors import DataError
from data_prep.packing.mixture import pass_order
from data_prep.packing.pack import pack

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    st.text("aé̂👩‍👩‍👧🇩🇪שלום العربية漢字かなカナ한국어ไทย \n\t.:", min_size=1, max_size=60),
    st.builds(
        lambda piece, times: piece * times, st.sampled_from(["a", "漢", "👩‍👩‍👧", "שלום ", "x y "]), st.just(30_000)
    ),
)
ROWS = st.lists(
    st.fixed_dictionaries({"query": TEXTS, "positive": TEXTS, "negative": st.lists(TEXTS, max_size=3)}),
    min_size=8,
    max_size=24,
)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    multiple = draw(st.integers(1, 3))
    negatives = draw(st.integers(0, 2))
    longest = draw(st.integers(16, 40))
    return {
        "text__max_tokens": longest,
        "text__hard_negatives": negatives,
        "batch__pairs": multiple * draw(st.integers(1, 2)),
        "batch__pack_multiple": multiple,
        "batch__pack_tokens": longest * (2 + negatives) * draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 5)),
    }


def usable(row: dict[str, Any], negatives: int) -> bool:
    def visible(text: str) -> bool:
        try:
            return bool(text_field({"text": text}, "text", ""))
        except DataError:
            return False

    # All negatives of a row are looked at, though only the first are kept.
    looked_at = row["negative"] if negatives else []
    return len(looked_at) >= negatives and all(map(visible, (row["query"], row["positive"], *looked_at)))


@settings(max_examples=25)
@given(ROWS, shapes())
def test_every_pair_is_in_one_batch_or_counted(
    make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], shape: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("properties")
    rows[0] = {"query": "always", "positive": "there", "negative": ["n", "m"]}
    negatives, size = shape["text__hard_negatives"], shape["batch__pairs"]
    good = [i for i, row in enumerate(rows) if usable(row, negatives)]
    fresh = dict.fromkeys((rows[i]["query"], rows[i]["positive"]) for i in good)
    first = {key: next(i for i in good if (rows[i]["query"], rows[i]["positive"]) == key) for key in fresh}
    kept = sorted(i for (query, positive), i in first.items() if query != positive)
    if len(kept) < size:
        return
    source = files_source(write_jsonl(folder / "x.jsonl", rows), instructions=["I"])
    recipe = make_recipe([source], on_bad_row="skip", max_skipped_fraction=1.0, **shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units_module, "UNIT_ROWS", 5)
        reader = packed(recipe)
    (summary,) = reader.index.sources
    assert (summary["kept"], summary["remainder_pairs"]) == (len(kept), len(kept) % size)
    seen: Counter[int] = Counter()
    batches = []
    for number in range(len(reader)):
        batch = reader.read(number)
        assert batch.num_pairs == size
        sizes = [one.num_tokens for one in batch.packs]
        pairs = [int(one.segment_lengths.reshape(-1, 2 + negatives).sum(axis=1).max()) for one in batch.packs]
        assert max(sizes) <= shape["batch__pack_tokens"]
        # A pack got its last pair when it was the emptiest one (Graham 1966).
        assert max(sizes) <= np.mean(sizes) + max(pairs) * (1 - 1 / len(sizes)) + 1e-9
        for one in batch.packs:
            ends = np.cumsum(one.segment_lengths) - 1
            assert (one.input_ids[ends] == reader.index.anchor_token_id).all()
            seen.update(one.pair_ids[one.roles == 0].tolist())
        batches.append(sorted(int(i) for one in batch.packs for i in one.pair_ids[one.roles == 0]))
    assert set(seen.values()) == {1}
    order = np.asarray(kept)
    pass_order(shape["seed"], "small", 0).shuffle(order)
    cut = order[: len(batches) * size].reshape(-1, size).tolist()
    assert sorted(batches) == sorted(map(sorted, cut))
    shutil.rmtree(folder)
    shutil.rmtree(recipe.parent)


@pytest.mark.slow
@settings(max_examples=6)
@given(ROWS, shapes())
def test_one_two_and_five_workers_write_the_same_bytes(
    make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], shape: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("workers")
    certain = [{"query": f"q{i}", "positive": f"p{i}", "negative": ["n", "m"]} for i in range(8)]
    sources = [files_source(write_jsonl(folder / f"{n}.jsonl", part), name=n) for n, part in cut(rows, certain)]
    recipe = make_recipe(sources, on_bad_row="skip", max_skipped_fraction=1.0, **shape)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units_module, "UNIT_ROWS", 5)
        patch.setattr(writing_module, "BATCHES_PER_SHARD", 2)
        for workers in (1, 2, 5):
            pack(str(recipe), [], workers)
            found.append(folder_bytes(recipe.parent / "shards"))
            shutil.rmtree(recipe.parent / "shards")
    assert "00000.arrow" in found[0]
    assert found[0] == found[1] == found[2]
    shutil.rmtree(folder)
    shutil.rmtree(recipe.parent)


def cut(rows: list[dict[str, Any]], certain: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Two sources of unequal size, each with enough rows for a batch."""
    return [("a", rows[: len(rows) // 3] + certain), ("b", certain + rows[len(rows) // 3 :])]
