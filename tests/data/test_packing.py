"""Invariants: every pair is in exactly one pack and none exceeds the budget; the packs are as few as the rule allows;
the decode plan equals a loop over segments.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchor.data.packing import (
    answer_decode_plan,
    cu_seqlens,
    decode_plan,
    partition_longest_first,
    plan_packs,
    position_ids,
)

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Strategy for lengths, budget and multiple of a valid recipe."""
    multiple = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 60), min_size=multiple, max_size=10 * multiple))
    lengths = lengths[: len(lengths) // multiple * multiple]
    return lengths, draw(st.integers(max(lengths), 200)), multiple


@given(batches())
def test_every_pair_is_in_exactly_one_pack_within_the_budget(batch: tuple[list[int], int, int]) -> None:
    lengths, budget, multiple = batch
    packs = plan_packs(lengths, budget, multiple)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(pack and sum(lengths[i] for i in pack) <= budget for pack in packs)
    assert len(packs) % multiple == 0


@given(batches())
def test_the_number_of_packs_is_the_smallest_multiple_that_fits(batch: tuple[list[int], int, int]) -> None:
    lengths, budget, multiple = batch
    packs = plan_packs(lengths, budget, multiple)
    fits = [
        count
        for count in range(multiple, len(packs) + 1, multiple)
        if max(sum(lengths[i] for i in pack) for pack in partition_longest_first(lengths, count)) <= budget
    ]
    assert fits == [len(packs)]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 3))
def test_the_heaviest_pack_respects_grahams_bound(lengths: list[int], num_packs: int) -> None:
    packs = partition_longest_first(lengths, num_packs)
    heaviest = max(sum(lengths[i] for i in pack) for pack in packs)
    best = _optimum(lengths, num_packs)
    assert best <= heaviest <= best * (4 / 3 - 1 / (3 * num_packs)) + 1e-9


def _optimum(lengths: list[int], num_packs: int) -> int:
    loads = {(0,) * num_packs}
    for length in lengths:
        loads = {
            tuple(sorted((*load[:i], load[i] + length, *load[i + 1 :]))) for load in loads for i in range(num_packs)
        }
    return min(max(load) for load in loads)


def test_the_plan_is_a_pure_function_with_ties_to_the_lower_index() -> None:
    assert plan_packs([5, 5, 5, 5], 10, 2) == [[0, 2], [1, 3]]
    assert plan_packs([9, 1, 1, 9, 1, 1], 11, 2) == [[0, 1, 4], [2, 3, 5]]
    assert plan_packs([6, 6, 6, 1], 12, 1) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("lengths", "budget", "multiple", "expected"),
    [
        ([1, 2, 3], 10, 2, "3 pairs cannot be cut into multiples of 2 packs"),
        ([], 10, 1, "0 pairs cannot be cut into multiples of 1 packs"),
        ([4, 11], 10, 2, "a pair of 11 tokens exceeds the pack's 10"),
    ],
)
def test_an_impossible_plan_is_refused(lengths: list[int], budget: int, multiple: int, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        plan_packs(lengths, budget, multiple)
    assert str(caught.value) == expected


@given(LENGTHS)
def test_cu_seqlens_and_positions_equal_a_loop(lengths: list[int]) -> None:
    array = np.asarray(lengths, dtype=np.int32)
    boundaries, positions = cu_seqlens(array), position_ids(array)
    assert boundaries.dtype == np.int32
    assert boundaries.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert positions.dtype == np.int64
    assert positions.tolist() == [position for length in lengths for position in range(length)]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=30),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_the_decode_plan_equals_a_loop_over_segments(
    shapes: list[tuple[int, int, int]], negatives: int, before: int
) -> None:
    per_pair = 2 + negatives
    shapes = (shapes * per_pair)[: max(1, len(shapes) // per_pair) * per_pair]
    starts = np.asarray([prefix for prefix, _, _ in shapes], dtype=np.int32)
    ends = starts + np.asarray([body for _, body, _ in shapes], dtype=np.int32)
    lengths = ends + np.asarray([suffix for _, _, suffix in shapes], dtype=np.int32)
    roles = np.tile(np.arange(per_pair, dtype=np.int8), len(shapes) // per_pair)
    ids = np.random.default_rng(0).permutation(int(lengths.sum())).astype(np.int32)
    plan = decode_plan(ids, lengths, roles, starts, ends, num_decode_prefix=before)

    prefix = [len(shapes) + len(ids) + i for i in range(before)]
    body_rows, target_rows = [], []
    gather, targets, row_lengths, target_roles, pairs = [], [], [], [], []
    offset, offsets = 0, []
    for length in lengths.tolist():
        offsets.append(offset)
        offset += length
    for s, role in enumerate(roles.tolist()):
        if role > 1:
            continue
        partner = s + 1 if role == 0 else s - 1
        body = list(range(offsets[s] + int(starts[s]), offsets[s] + int(ends[s])))
        target_rows += range(len(gather) + before, len(gather) + before + 1 + len(body))
        body_rows += range(len(gather) + before + 1, len(gather) + before + 1 + len(body))
        gather += [*prefix, partner] + [len(shapes) + t for t in body]
        targets += [int(ids[t]) for t in body] + [int(ids[offsets[s] + int(lengths[s]) - 1])]
        row_lengths.append(before + 1 + len(body))
        target_roles += [role] * (len(body) + 1)
        pairs.append(s // per_pair)
    assert len(gather) >= 4
    assert plan.gather.tolist() == gather
    assert plan.targets.tolist() == targets
    assert plan.lengths.tolist() == row_lengths
    assert plan.target_roles.tolist() == target_roles
    assert plan.target_pairs.tolist() == pairs
    assert plan.target_rows.tolist() == target_rows
    assert plan.body_rows.tolist() == body_rows


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=30),
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_the_answer_decode_plan_equals_a_loop_over_positives(
    shapes: list[tuple[int, int, int]], negatives: int, num_prefix: int, before: int
) -> None:
    per_pair, end = 2 + negatives, 10**6
    shapes = (shapes * per_pair)[: max(1, len(shapes) // per_pair) * per_pair]
    starts = np.asarray([prefix for prefix, _, _ in shapes], dtype=np.int32)
    ends = starts + np.asarray([body for _, body, _ in shapes], dtype=np.int32)
    lengths = ends + np.asarray([suffix for _, _, suffix in shapes], dtype=np.int32)
    roles = np.tile(np.arange(per_pair, dtype=np.int8), len(shapes) // per_pair)
    ids = np.random.default_rng(0).permutation(int(lengths.sum())).astype(np.int32)
    plan = answer_decode_plan(
        ids, lengths, roles, starts, ends, num_prefix=num_prefix, end_token_id=end, num_decode_prefix=before
    )

    queries = len(shapes) // per_pair
    vectors = [("p", query, k) for query in range(queries) for k in range(num_prefix)]
    vectors += [("x", int(token)) for token in ids] + [("b", i) for i in range(before)]
    offset, rows, predicted = 0, [], []
    for s, (prefix, body, suffix) in enumerate(shapes):
        if s % per_pair == 1:
            tokens = ids[offset + prefix : offset + prefix + body].tolist()
            prompts = [("p", s // per_pair, k) for k in range(num_prefix)]
            rows.append([("b", i) for i in range(before)] + prompts + [("x", token) for token in tokens])
            predicted.append([*tokens, end])
        offset += prefix + body + suffix
    assert [vectors[i] for i in plan.gather] == [vector for row in rows for vector in row]
    assert plan.lengths.tolist() == [len(row) for row in rows]
    assert plan.targets.tolist() == [token for row in predicted for token in row]
    # The last body + 1 positions of each row predict.
    first = np.cumsum([0] + [len(row) for row in rows])
    expected = [
        int(first[i]) + len(row) - len(told) + k
        for i, (row, told) in enumerate(zip(rows, predicted, strict=True))
        for k in range(len(told))
    ]
    assert plan.target_rows.tolist() == expected
    assert plan.target_roles.tolist() == [1] * len(expected)
    assert plan.target_pairs.tolist() == list(range(queries))
