"""Pure arithmetic of packs: lengths -> packs; packs -> cu_seqlens, positions and gather indices.

1. :func:`plan_packs`: longest-processing-time partition of a batch's pairs into the smallest multiple of
   ``pack_multiple`` packs that all fit the token budget.
2. :func:`cu_seqlens`, :func:`position_ids`: inputs of packed attention and RoPE.
3. :func:`decode_plan`, :func:`answer_decode_plan`: indices that turn prefix vectors (anchor states, or soft prompts)
   and input embeddings into one packed decode pass.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anchor.data.records import POSITIVE, QUERY


def partition_longest_first(lengths: Sequence[int], num_packs: int) -> list[list[int]]:
    """Put each length, longest first, into the emptiest pack (longest-processing-time partition, Graham 1969).

    The heaviest pack is at most 4/3 - 1/(3 num_packs) times the best possible. Ties go to the lower index, so the
    result is a pure function of the arguments. Members of a pack are in ascending order.
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
    """Cut a batch into as few packs as fit ``pack_tokens``, in a multiple of ``pack_multiple``.

    Args:
        pair_tokens: tokens of each pair, summed over its segments.
        pack_tokens: token budget of a pack.
        pack_multiple: the number of packs is a multiple of this; it must divide the number of pairs.

    Returns:
        The indices of each pack's pairs. No pack is empty.

    Raises:
        ValueError: a pair exceeds the budget, or ``pack_multiple`` does not divide the number of pairs.
    """
    if len(pair_tokens) % pack_multiple or not pair_tokens:
        raise ValueError(f"{len(pair_tokens)} pairs cannot be cut into multiples of {pack_multiple} packs")
    if max(pair_tokens) > pack_tokens:
        raise ValueError(f"a pair of {max(pair_tokens)} tokens exceeds the pack's {pack_tokens}")
    # Lower bounds: by total tokens, by pairs that cannot share a pack, by how many of the shortest pairs fit in one.
    least = max(
        -(-sum(pair_tokens) // pack_tokens),
        sum(2 * tokens > pack_tokens for tokens in pair_tokens),
        -(-len(pair_tokens) // (pack_tokens // max(1, min(pair_tokens)))),
    )
    num_packs = pack_multiple * -(-least // pack_multiple)
    while True:
        packs = partition_longest_first(pair_tokens, num_packs)
        if max(sum(pair_tokens[i] for i in pack) for pack in packs) <= pack_tokens:
            return packs
        num_packs += pack_multiple


def cu_seqlens(lengths: np.ndarray) -> np.ndarray:
    """Return cumulative lengths with a leading zero, int32, as FlashAttention takes them."""
    out = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=out[1:])
    return out


def position_ids(lengths: np.ndarray) -> np.ndarray:
    """Return the position of each token in its segment, int64."""
    starts = np.repeat(cu_seqlens(lengths)[:-1], lengths)
    return np.arange(int(lengths.sum()), dtype=np.int64) - starts


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Index plan of one packed decode pass over all target segments.

    The row of a target segment is C decode prefix tokens, P prefix vectors and then the input embeddings of its body.
    Its last body + 1 positions (the last prefix vector and the body) predict the body and then one end token. Earlier
    positions predict nothing.

    Attributes:
        gather: int64 ``R``; index into ``cat([prefix vectors, input embeddings (T), decode prefix embeddings (C)])``
            for each decode token.
        lengths: int64 ``G``; decode tokens per target segment, C + P + body.
        body_rows: int64; indices of the ``R`` decode tokens that are input embeddings of a body.
        target_rows: int64 ``N``; indices of the decode tokens that predict a token (all of them if C is 0 and P is 1).
            Only their states go to the head.
        targets: int64 ``N``; the token that each of them predicts.
        target_roles: int8 ``N``; role of the segment that each target belongs to.
        target_pairs: int64 ``G``; each target segment's pair, by its number in the pack.
    """

    gather: np.ndarray
    lengths: np.ndarray
    body_rows: np.ndarray
    target_rows: np.ndarray
    targets: np.ndarray
    target_roles: np.ndarray
    target_pairs: np.ndarray


def decode_plan(
    input_ids: np.ndarray,
    segment_lengths: np.ndarray,
    roles: np.ndarray,
    body_starts: np.ndarray,
    body_ends: np.ndarray,
    decoded_roles: Sequence[int] = (QUERY, POSITIVE),
    *,
    num_decode_prefix: int = 0,
    partner_of: np.ndarray | None = None,
) -> DecodePlan:
    """Plan the decode pass of reconstruction: each side of a pair is decoded from the other side's anchor state.

    Row of target segment s with partner p: ``[decode prefix, anchor(p), x[body(s)]]``. Its last body + 1 positions
    predict ``[ids[body(s)], anchor token]``. The prefix vectors are the ``S`` anchor states of the pack's segments.

    Args:
        input_ids: token ids of the pack, ``T``.
        segment_lengths, roles, body_starts, body_ends: per segment, ``S``; bodies are relative to the segment.
            A pair's segments are adjacent: query, positive, hard negatives.
        decoded_roles: roles of the targets; other segments have no rows.
        num_decode_prefix: C, tokens before the anchor state in every row.
        partner_of: int64 ``S``; the segment whose anchor state a target is decoded from. By default it is the other
            side of the target's pair.

    Returns:
        The plan. Hard negatives are neither decoded nor decoded from.
    """
    targets_of = np.flatnonzero(np.isin(roles, decoded_roles))
    partners = (partners_of(roles) if partner_of is None else partner_of)[targets_of]
    last = cu_seqlens(segment_lengths)[1:].astype(np.int64)[targets_of] - 1
    bodies = (body_starts, body_ends)
    return _plan(
        input_ids,
        segment_lengths,
        roles,
        bodies,
        targets_of,
        partners[:, None],
        num_vectors=len(segment_lengths),
        end_ids=input_ids[last],
        num_decode_prefix=num_decode_prefix,
    )


def partners_of(roles: np.ndarray) -> np.ndarray:
    """Return the segment that holds the other side of each segment's pair, int64 ``S``.

    A query's partner is the next segment, and a positive's is the previous one. A hard negative has no partner; do not
    read its entry.
    """
    segments = np.arange(len(roles))
    return np.where(roles == QUERY, segments + 1, segments - 1)


def wrong_partners_of(roles: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
    """Return, for each segment, the opposite side of another pair of the pack, int64 ``S``; -1 if no pair fits.

    The other pair is the next one in the pack (cyclically) that shares neither text with the segment's own pair. This
    makes sure that the partner is wrong. Hard negatives have entry -1.
    """
    queries = np.flatnonzero(roles == QUERY)
    texts = text_ids[queries], text_ids[queries + 1]
    wrong = np.full(len(roles), -1, dtype=np.int64)
    for i, query in enumerate(queries):
        others = np.roll(np.arange(len(queries)), -i - 1)[:-1]
        fits = (texts[0][others] != texts[0][i]) & (texts[1][others] != texts[1][i])
        if fits.any():
            other = queries[others[fits.argmax()]]
            wrong[query], wrong[query + 1] = other + 1, other
    return wrong


def answer_decode_plan(
    input_ids: np.ndarray,
    segment_lengths: np.ndarray,
    roles: np.ndarray,
    body_starts: np.ndarray,
    body_ends: np.ndarray,
    *,
    num_prefix: int,
    end_token_id: int,
    num_decode_prefix: int = 0,
) -> DecodePlan:
    """Plan the decode pass of self-supervision: each positive is decoded from its query's P soft prompts.

    Row of the positive of the q-th query: ``[decode prefix, p(q, 0) ... p(q, P-1), x[body]]``. Its last body + 1
    positions predict ``[ids[body], end token]``. The prefix vectors are the soft prompts of the pack's ``Q`` queries,
    in order and flat (``Q P`` rows).

    Args:
        input_ids: token ids of the whole pack, ``T``; indices into the input embeddings count all of them.
        segment_lengths, roles, body_starts, body_ends: per segment, ``S``; as in :func:`decode_plan`.
        num_prefix: P, soft prompts per query.
        end_token_id: id of the token that follows a body.
        num_decode_prefix: C, tokens before the soft prompts in every row.

    Returns:
        The plan, one row per pair in the order of the queries. Hard negatives are not decoded.
    """
    targets_of = np.flatnonzero(roles == POSITIVE)
    queries = (np.cumsum(roles == QUERY)[targets_of] - 1).astype(np.int64)
    prefix = queries[:, None] * num_prefix + np.arange(num_prefix)
    ends = np.full(len(targets_of), end_token_id)
    num_vectors = num_prefix * int((roles == QUERY).sum())
    return _plan(
        input_ids,
        segment_lengths,
        roles,
        (body_starts, body_ends),
        targets_of,
        prefix,
        num_vectors=num_vectors,
        end_ids=ends,
        num_decode_prefix=num_decode_prefix,
    )


def _plan(
    input_ids: np.ndarray,
    segment_lengths: np.ndarray,
    roles: np.ndarray,
    bodies: tuple[np.ndarray, np.ndarray],
    targets_of: np.ndarray,
    prefix: np.ndarray,
    *,
    num_vectors: int,
    end_ids: np.ndarray,
    num_decode_prefix: int,
) -> DecodePlan:
    """Plan the segments ``targets_of`` (``G``) with prefix vectors ``prefix`` (``G P``) of ``num_vectors``."""
    num_prefix = num_decode_prefix + prefix.shape[1]
    sizes = (bodies[1] - bodies[0])[targets_of].astype(np.int64)
    body_first = (cu_seqlens(segment_lengths)[:-1].astype(np.int64) + bodies[0])[targets_of]
    lengths = sizes + num_prefix
    first = cu_seqlens(lengths)[:-1].astype(np.int64)
    within = position_ids(lengths)  # i < C is a decode prefix token, i < C + P a prefix vector, then the body
    gather = num_vectors + np.repeat(body_first, lengths) + within - num_prefix
    gather[(first[:, None] + np.arange(num_decode_prefix, num_prefix)).ravel()] = prefix.ravel()
    decode_prefix = num_vectors + len(input_ids) + np.arange(num_decode_prefix)
    gather[(first[:, None] + np.arange(num_decode_prefix)).ravel()] = np.tile(decode_prefix, len(first))
    target_rows = np.flatnonzero(within >= num_prefix - 1)
    # Each position predicts the next body token; the last one predicts the end token.
    behind = np.repeat(body_first, sizes + 1) + position_ids(sizes + 1)
    ends = np.cumsum(sizes + 1) - 1
    behind[ends] = body_first  # placeholder, replaced below
    targets = input_ids[behind].astype(np.int64)
    targets[ends] = end_ids
    return DecodePlan(
        gather=gather,
        lengths=lengths,
        body_rows=np.flatnonzero(within >= num_prefix),
        target_rows=target_rows,
        targets=targets,
        target_roles=np.repeat(roles[targets_of], sizes + 1),
        target_pairs=np.cumsum(roles == QUERY)[targets_of] - 1,
    )
