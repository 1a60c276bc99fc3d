"""Invariants: InfoNCE equals its definition; the pool and its order do not depend on the ranks; known false
negatives are masked by text identity, and only they."""

import math

import numpy as np
import pytest
import torch

from anchor.data.shards import Pack, make_batch
from anchor.objectives.contrastive import info_nce, pool_layout


def unit(rows: list[list[float]]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows), dim=1)


def test_info_nce_equals_a_hand_computed_case():
    query, pool = unit([[1.0, 0.0]]), unit([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    loss = info_nce(query, pool, torch.tensor([0]), torch.ones(1, 3, dtype=torch.bool), temperature=0.5)
    expected = -math.log(math.exp(2) / (math.exp(2) + math.exp(0) + math.exp(-2)))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_info_nce_leaves_out_masked_documents():
    query, pool = unit([[1.0, 0.0]]), unit([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])
    keep = torch.tensor([[True, False, True]])
    loss = info_nce(query, pool, torch.tensor([0]), keep, temperature=0.5)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-4)), rel=1e-5)


def test_info_nce_refuses_a_temperature_that_is_not_positive():
    rows = unit([[1.0, 0.0]])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        info_nce(rows, rows, torch.tensor([0]), torch.ones(1, 1, dtype=torch.bool), temperature=0.0)


def make_pack(texts: list[tuple[int, ...]]) -> Pack:
    """A pack of pairs whose segments have one token; the numbers are text identities."""
    flat = np.asarray([text for pair in texts for text in pair], dtype=np.int64)
    ones = np.ones(len(flat), dtype=np.int32)
    roles = np.concatenate([np.arange(len(pair)) for pair in texts]).astype(np.int8)
    return Pack(ones, ones, 0 * ones, ones, roles, flat, flat)


PACKS = [
    make_pack([(1, 11, 21)]),
    make_pack([(2, 12, 22), (3, 13, 23)]),
    make_pack([(4, 14, 24)]),
    make_pack([(5, 15, 25)]),
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_query_finds_its_positive_in_the_pool_of_all_ranks(world_size):
    batch = make_batch(PACKS, "x")
    pool = [t for pack in PACKS for t, role in zip(pack.text_ids, pack.roles, strict=True) if role > 0]
    found = []
    for rank in range(world_size):
        layout = pool_layout(batch, rank, world_size)
        assert sum(layout.documents_per_rank) == len(pool)
        assert len(layout.local_documents) == layout.documents_per_rank[rank]
        assert layout.num_queries == 5
        assert layout.keep.all()
        found += [pool[t] for t in layout.target]
    assert found == [11, 12, 13, 14, 15]


def kept(pairs: list[tuple[int, ...]]) -> list[list[bool]]:
    return pool_layout(make_batch([make_pack(pairs)], "x"), 0, 1).keep.tolist()


def test_a_positive_that_occurs_twice_is_no_negative_of_the_other_query():
    assert kept([(1, 11), (2, 11), (3, 13)]) == [[True, False, True], [False, True, True], [True, True, True]]


def test_positives_of_the_same_query_are_no_negatives_of_one_another():
    assert kept([(1, 11), (1, 12), (3, 13)]) == [[True, False, True], [False, True, True], [True, True, True]]


def test_a_document_equal_to_the_query_is_no_negative():
    assert kept([(1, 11), (2, 1)]) == [[True, False], [True, True]]


def test_every_copy_of_a_known_positive_is_masked_and_other_hard_negatives_stay():
    pool_of_two = kept([(1, 11, 11), (1, 12, 22)])  # the pool is 11, 11, 12, 22
    assert pool_of_two == [[True, False, False, True], [False, False, True, True]]
