"""InfoNCE over a pool of any size, computed in chunks of rows to bound the memory for the B x N similarities.

For pair i with query q_i, positive d_i and temperature tau (van den Oord et al. 2018, arXiv:1807.03748, eq. 4)::

    L_i = -log( exp(q_i . d_i / tau) / Z_i ),    L = mean over the M pairs of the batch

1. ``negatives`` lists the similarities that Z_i sums over. The positive counts once and comes first.
   ``query_to_document`` is ``q_i . d_j`` over the whole pool. ``query_to_query`` is ``q_i . q_j``,
   ``document_to_query`` is ``d_i . q_j`` and ``document_to_document`` is ``d_i . d_j``, each over all others. All four
   with softmax ``joint`` give GTE's improved contrastive loss (Li et al. 2023, arXiv:2308.03281, eq. 4-6), except that
   GTE counts the positive in both directions.
2. With softmax ``per_side``, ``L_i`` is the mean of two losses: the query's ``Z`` sums over ``query_to_*``, the
   document's over ``document_to_*`` (the symmetric loss of CLIP, Radford et al. 2021, arXiv:2103.00020, figure 3).
3. Two masks remove columns from Z_i:

   * texts known to match by identity (:class:`anchor.objectives.pool.KnownMatches`), unless ``mask_known_matches`` is
     false;
   * every column whose cosine exceeds ``q_i . d_i + margin``, as in Qwen3-Embedding (Zhang et al. 2025,
     arXiv:2506.05176, section 3.1, margin 0.1). GISTEmbed (Solatorio 2024, arXiv:2402.16829) uses margin 0 and
     another model as judge. NV-Retriever's TopK-MarginPos (Moreira et al. 2024, arXiv:2407.15831) uses a negative
     margin and another model, during mining. Here the model itself is the judge, at full dimension, without gradient.
4. Matryoshka (Kusupati et al. 2022, arXiv:2205.13147, eq. 1) averages L over the leading ``dimensions`` of all vectors,
   scaled to length 1 again, and over the whole vectors.

Backward recomputes each chunk unless there is only one, so memory holds the similarities of one chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anchor.config.objectives import Similarity

_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}


def info_nce(
    cosine: Float[Tensor, "R N"], target: Int[Tensor, " R"], keep: Bool[Tensor, "R N"], *, temperature: float
) -> Float[Tensor, " R"]:
    """Compute InfoNCE for a run of rows.

    ``-log( exp(c_{i,t} / tau) / sum_{j kept} exp(c_{ij} / tau) )`` (van den Oord et al. 2018, arXiv:1807.03748,
    eq. 4).

    Args:
        cosine: similarities of each row to all columns.
        target: column of each row's positive.
        keep: False where a column is not a negative of the row; must be True at the target.
        temperature: divides the similarities (dimensionless, > 0).

    Returns:
        One term per row, in nats.

    Raises:
        ValueError: if ``temperature`` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = (cosine / temperature).masked_fill(~keep, -torch.inf)
    return torch.logsumexp(logits, dim=1) - logits.gather(1, target[:, None])[:, 0]


def prefix(vectors: Float[Tensor, "S D"], dimension: int) -> Float[Tensor, "S D2"]:
    """Return the leading dimensions, scaled to length 1; at full dimension, return the unit vectors unchanged."""
    return vectors if dimension == vectors.shape[1] else nn.functional.normalize(vectors[:, :dimension], dim=1)


@dataclass(frozen=True, slots=True)
class Softmax:
    """One denominator per local pair.

    Attributes:
        similarities: the similarities it sums over; the first contains the positive.
        target: column of each local pair's positive in the first similarity.
    """

    similarities: tuple[Similarity, ...]
    target: Int[Tensor, " B"]

    @property
    def sides(self) -> list[tuple[str, str]]:
        """``(row side, column side)`` of each similarity."""
        return [(row, column) for row, _, column in (s.partition("_to_") for s in self.similarities)]


@dataclass(frozen=True, slots=True)
class RowTerms:
    """Loss and metrics of each local pair from one softmax at one dimension.

    Attributes:
        nll: the loss, in nats, with gradient.
        positive: cosine of the pair.
        hardest: highest cosine of a kept negative in the first similarity; ``-inf`` if no negative is kept.
        over_margin: number of columns in the first similarity that only the margin removed.
    """

    nll: Float[Tensor, " B"]
    positive: Float[Tensor, " B"]
    hardest: Float[Tensor, " B"]
    over_margin: Float[Tensor, " B"]


def chunked_info_nce(
    rows: dict[str, Float[Tensor, "B _"]],
    columns: dict[str, Float[Tensor, "_ _"]],
    softmax: Softmax,
    keep: Callable[[Similarity, slice], Tensor],
    *,
    temperature: float,
    margin: float | None,
    dimension: int,
    chunk_rows: int | None = None,
) -> RowTerms:
    """Compute InfoNCE of all local pairs for one softmax at one dimension.

    The caller gathers ``columns`` with :func:`anchor.dist.all_gather_with_grad`, whose backward sums over ranks, and
    divides by the number of pairs in the whole batch. No factor of the world size belongs here.

    Args:
        rows: unit vectors of the local pairs by side, ``query`` and ``document``.
        columns: unit vectors of all ranks by side.
        softmax: the denominator of each row.
        keep: returns the mask by text identity for a similarity and a run of rows; False at the positive too.
        temperature: divides the cosines (dimensionless).
        margin: removes columns whose full-dimension cosine exceeds the pair's by more than this; None keeps all.
        dimension: number of leading dimensions to compare.
        chunk_rows: number of rows whose similarities exist at a time; None derives it from the device and the columns.
    """
    num_rows = len(rows["query"])
    if chunk_rows is None:
        width = sum(len(columns[column]) for _, column in softmax.sides)
        chunk_rows = max(1, _CHUNK_ELEMENTS.get(rows["query"].device.type, 1 << 24) // width)
    # Cut once, outside the chunks: the prefixes are the same for all of them.
    sides = softmax.sides
    cut_rows = {side: prefix(rows[side], dimension) for side, _ in sides}
    cut_columns = {side: prefix(columns[side], dimension) for _, side in sides}

    def chunk(start: int, *cut: Tensor) -> tuple[Tensor, ...]:
        run = slice(start, min(start + chunk_rows, num_rows))
        target = softmax.target[run]
        cosine = _cat([r[run] @ c.T for r, c in zip(cut[::2], cut[1::2], strict=True)])
        kept = _cat([keep(similarity, run) for similarity in softmax.similarities])
        with torch.no_grad():
            over = torch.zeros_like(target)
            if margin is not None:
                judged = cosine
                if dimension != rows["query"].shape[1]:
                    judged = _cat([rows[row][run] @ columns[column].T for row, column in sides])
                exceeds = judged > judged.gather(1, target[:, None]) + margin
                over = (kept & exceeds)[:, : len(cut[1])].sum(dim=1)
                kept &= ~exceeds
            # Columns of the first similarity; `kept` still excludes the positive.
            first = cosine[:, : len(cut[1])].masked_fill(~kept[:, : len(cut[1])], -torch.inf)
            hardest = first.amax(dim=1)
            kept.scatter_(1, target[:, None], torch.ones_like(kept[:, :1]))
        nll = info_nce(cosine, target, kept, temperature=temperature)
        return nll, cosine.detach().gather(1, target[:, None])[:, 0], hardest.detach(), over.to(cosine.dtype)

    cut = [part for row, column in sides for part in (cut_rows[row], cut_columns[column])]
    if chunk_rows >= num_rows:
        return RowTerms(*chunk(0, *cut))
    parts = [
        checkpoint(chunk, start, *cut, use_reentrant=False, preserve_rng_state=False)
        for start in range(0, num_rows, chunk_rows)
    ]
    return RowTerms(*(torch.cat(terms) for terms in zip(*parts, strict=True)))


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
