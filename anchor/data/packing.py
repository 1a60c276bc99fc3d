"""Pure arithmetic of packs: lengths -> packs; packs -> cu_seqlens, positions and gather indices.

1. :func:`plan_packs`: longest-processing-time partition of a batch's pairs into the smallest multiple of
   ``pack_multiple`` packs that all fit the token budget.
2. :func:`cu_seqlens`, :func:`position_ids`: what packed attention and RoPE need.
3. :func:`decode_plan`: indices that turn anchor states and input embeddings into one packed decode pass.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anchor.data.records import POSITIVE, QUERY


def partition_longest_first(lengths: Sequence[int], num_packs: int) -> list[list[int]]:
    """Longest-processing-time partition (Graham 1969): each length, longest first, into the emptiest pack.

    The heaviest pack is at most 4/3 - 1/(3 num_packs) of the best possible. Ties go to the lower index, so the
    result is a pure function of its arguments. Members of a pack are in ascending order.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    heap = [(0, pack) for pack in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    for i in order:
        load, pack = heapq.heappop(heap)
        packs[pack].append(i)
        heapq.heappush(heap, (load + lengths[i], pack))
    return [sorted(pack) for pack in packs]


def plan_packs(pair_tokens: Sequence[int], pack_tokens: int, pack_multiple: int) -> list[list[int]]:
    """Cut a batch into the fewest packs, a multiple of ``pack_multiple``, none above ``pack_tokens``.

    Args:
        pair_tokens: tokens of each pair, all its segments together.
        pack_tokens: budget of a pack.
        pack_multiple: the number of packs is a multiple of it; must divide the number of pairs.

    Returns:
        For each pack the indices of its pairs; none is empty.

    Raises:
        ValueError: a pair exceeds the budget, or ``pack_multiple`` does not divide the number of pairs.
    """
    if len(pair_tokens) % pack_multiple or not pair_tokens:
        raise ValueError(f"{len(pair_tokens)} pairs cannot be cut into multiples of {pack_multiple} packs")
    if max(pair_tokens) > pack_tokens:
        raise ValueError(f"a pair of {max(pair_tokens)} tokens exceeds the pack's {pack_tokens}")
    num_packs = pack_multiple * max(1, -(-sum(pair_tokens) // (pack_tokens * pack_multiple)))
    while True:
        packs = partition_longest_first(pair_tokens, num_packs)
        if max(sum(pair_tokens[i] for i in pack) for pack in packs) <= pack_tokens:
            return packs
        num_packs += pack_multiple


def cu_seqlens(lengths: np.ndarray) -> np.ndarray:
    """Cumulative lengths with a leading zero, int32, as FlashAttention takes them."""
    out = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=out[1:])
    return out


def position_ids(lengths: np.ndarray) -> np.ndarray:
    """Position of each token in its own segment, int64."""
    starts = np.repeat(cu_seqlens(lengths)[:-1], lengths)
    return np.arange(int(lengths.sum()), dtype=np.int64) - starts


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One packed decode pass over all target segments.

    Row of target segment s with partner p: ``[anchor(p), x[body(s)]]`` predicts ``[ids[body(s)], anchor token]``.

    Attributes:
        gather: int64 ``R``; index into ``cat([anchor states (S), input embeddings (T)])`` for each decode token.
        targets: int64 ``R``; the token that each decode position predicts.
        lengths: int64 ``G``; decode tokens per target segment, body + 1.
        target_roles: int8 ``R``; role of the segment that each target belongs to.
        target_pairs: int64 ``G``; ordinal of the pair in the pack of each target segment.
    """

    gather: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    target_roles: np.ndarray
    target_pairs: np.ndarray


def decode_plan(
    input_ids: np.ndarray,
    segment_lengths: np.ndarray,
    roles: np.ndarray,
    body_starts: np.ndarray,
    body_ends: np.ndarray,
    decoded_roles: Sequence[int] = (QUERY, POSITIVE),
) -> DecodePlan:
    """Index plan of the decode pass: queries from their positives' anchors, positives from their queries'.

    Args:
        input_ids: tokens of the pack, ``T``.
        segment_lengths, roles, body_starts, body_ends: per segment, ``S``; bodies are relative to the segment.
            A pair's segments stand together, its query first, its positive second.
        decoded_roles: which sides are targets; the other has no rows.

    Returns:
        The plan; hard negatives are neither decoded nor decoded from.
    """
    num_segments = len(segment_lengths)
    starts = cu_seqlens(segment_lengths)[:-1].astype(np.int64)
    targets_of = np.flatnonzero(np.isin(roles, decoded_roles))
    # The partner of a query is the next segment, that of a positive the one before.
    partners = np.where(roles[targets_of] == QUERY, targets_of + 1, targets_of - 1)
    lengths = (body_ends - body_starts)[targets_of].astype(np.int64) + 1
    first = cu_seqlens(lengths)[:-1].astype(np.int64)
    within = position_ids(lengths)  # 0 is the anchor vector, i > 0 the (i-1)-th body token
    body = np.repeat(starts[targets_of] + body_starts[targets_of], lengths)
    gather = num_segments + body + within - 1
    gather[first] = partners
    ends = first + lengths - 1
    last = starts[targets_of] + segment_lengths[targets_of] - 1
    target_index = body + within
    target_index[ends] = last
    return DecodePlan(
        gather=gather,
        targets=input_ids[target_index].astype(np.int64),
        lengths=lengths,
        target_roles=np.repeat(roles[targets_of], lengths),
        target_pairs=np.cumsum(roles == QUERY)[targets_of] - 1,
    )
