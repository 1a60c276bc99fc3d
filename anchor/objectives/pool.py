"""The pool of a batch as seen from one rank, and masks for the texts known to match.

1. The pool is every positive and hard negative of the batch, in pack order, independent of the number of ranks. Queries
   are ordered the same way.
2. A text is not a negative of a pair if the batch itself shows that it matches. The known documents of pair i are its
   query's own text and every positive of that query text. Its known queries are its positive's own text and every
   query of that positive text.
3. Masks are built for a run of rows at a time, so no full B x N array is kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from anchor.config.objectives import Similarity
from anchor.data.batches import rank_packs
from anchor.data.records import QUERY
from anchor.data.shards import Batch


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """Positions of a batch's queries and documents, as seen from one rank.

    The rank has B local queries; the batch has M queries and N documents.

    Attributes:
        local_queries: rows of this rank's embeddings that are queries, in order.
        local_documents: rows of this rank's embeddings that are documents, in order.
        queries_per_rank, documents_per_rank: counts, one per rank.
        first_query: index of this rank's first query among all queries.
        first_document: index of this rank's first document in the pool.
        target: int64 ``M``; index in the pool of every query's positive.
        query_text: int64 ``M``; text identity of every query.
        document_text: int64 ``N``; text identity of every document.
    """

    local_queries: np.ndarray
    local_documents: np.ndarray
    queries_per_rank: tuple[int, ...]
    documents_per_rank: tuple[int, ...]
    first_query: int
    first_document: int
    target: np.ndarray
    query_text: np.ndarray
    document_text: np.ndarray

    @property
    def num_queries(self) -> int:
        """Number of queries in the whole batch."""
        return len(self.query_text)

    @property
    def local(self) -> slice:
        """Slice of this rank's queries among all queries."""
        return slice(self.first_query, self.first_query + len(self.local_queries))

    @property
    def local_target(self) -> np.ndarray:
        """Index in the pool of each local query's positive."""
        return self.target[self.local]


def pool_layout(batch: Batch, rank: int, world_size: int) -> PoolLayout:
    """Return the layout of a batch's pool for one rank, using only the shards' columns.

    Args:
        batch: the whole batch.
        rank, world_size: select this rank's packs.
    """
    shares = [rank_packs(len(batch.packs), r, world_size) for r in range(world_size)]
    is_query = [np.concatenate([batch.packs[i].roles for i in share]) == QUERY for share in shares]
    queries = tuple(int(q.sum()) for q in is_query)
    documents = tuple(int((~q).sum()) for q in is_query)
    everywhere, texts = np.concatenate(is_query), np.concatenate([pack.text_ids for pack in batch.packs])
    return PoolLayout(
        local_queries=np.flatnonzero(is_query[rank]),
        local_documents=np.flatnonzero(~is_query[rank]),
        queries_per_rank=queries,
        documents_per_rank=documents,
        first_query=sum(queries[:rank]),
        first_document=sum(documents[:rank]),
        # A pair's segments are contiguous: query, positive, hard negatives.
        target=(np.cumsum(~everywhere) - 1)[np.flatnonzero(everywhere) + 1],
        query_text=texts[everywhere],
        document_text=texts[~everywhere],
    )


class KnownMatches:
    """Masks of the texts that the batch shows to match a pair.

    Query-to-document masks the pair's known documents, and document-to-query masks its known queries. Query-to-query
    and document-to-document mask both, because they would otherwise push matching texts apart.

    Args:
        layout: the pool.
        device: the device on which masks are built.
        similarities: the similarities that :meth:`keep` will be called with.
    """

    def __init__(self, layout: PoolLayout, device: torch.device, similarities: Iterable[Similarity]) -> None:
        positive_text = layout.document_text[layout.target]
        # Almost every text belongs to one pair only, so only the few others get lists. Build them before the first
        # copy to the device, because that copy waits for the device's queued work.
        pairs_by_text = {"document": (layout.query_text, positive_text), "query": (positive_text, layout.query_text)}
        wanted = {known for similarity in similarities for known in _known_sides(similarity)}
        more = {known: _partners(*pairs_by_text[known], layout.local) for known in sorted(wanted)}
        self._texts = {
            "query": torch.from_numpy(layout.query_text).to(device),
            "document": torch.from_numpy(layout.document_text).to(device),
        }
        own = torch.from_numpy(np.stack([layout.query_text, positive_text])[:, layout.local]).to(device)
        self._own_query, self._own_positive = own[0], own[1]
        self._more = {
            known: [(rows, torch.from_numpy(partners).to(device)) for rows, partners in found]
            for known, found in more.items()
        }

    def keep(self, similarity: Similarity, rows: slice) -> Bool[Tensor, "R N"]:
        """Return a mask that is False where a column is not a negative of the pair, its own positive included.

        Args:
            similarity: the side of the local pairs and the side of all pairs to compare.
            rows: a run of local pairs.
        """
        columns = self._texts[similarity.partition("_to_")[2]]
        # The texts of the query and its positive, which also covers the pair's own column.
        keep = columns != self._own_query[rows, None]
        keep &= columns != self._own_positive[rows, None]
        for known in _known_sides(similarity):
            for members, partners in self._more[known]:
                here = members[(members >= rows.start) & (members < rows.stop)]
                if len(here):
                    keep[torch.from_numpy(here - rows.start).to(keep.device)] &= ~torch.isin(columns, partners)
        return keep


class OwnTexts:
    """Masks of a pair's own two texts only. Every other text is a negative, including copies of them.

    Args:
        layout: the pool.
        device: the device on which masks are built.
    """

    def __init__(self, layout: PoolLayout, device: torch.device) -> None:
        own = {"query": np.arange(layout.local.start, layout.local.stop), "document": layout.local_target}
        self._own = {side: torch.from_numpy(columns).to(device) for side, columns in own.items()}
        self._width = {"query": layout.num_queries, "document": len(layout.document_text)}

    def keep(self, similarity: Similarity, rows: slice) -> Bool[Tensor, "R N"]:
        """Return a mask that is False only at the pair's own text; arguments as in :meth:`KnownMatches.keep`."""
        side = similarity.partition("_to_")[2]
        own = self._own[side][rows]
        keep = torch.ones(len(own), self._width[side], dtype=torch.bool, device=own.device)
        return keep.scatter_(1, own[:, None], value=False)


def _known_sides(similarity: Similarity) -> tuple[str, ...]:
    """Return which of a pair's known texts a similarity masks: its documents, its queries or both."""
    side, _, other = similarity.partition("_to_")
    return ("document", "query") if side == other else (other,)


def _partners(texts: np.ndarray, partners: np.ndarray, local: slice) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each text in several pairs, the local pairs that have it and the partners of all pairs that do."""
    _, inverse, times = np.unique(texts, return_inverse=True, return_counts=True)
    several = np.flatnonzero(times[inverse] > 1)
    several = several[np.argsort(inverse[several], kind="stable")]
    out = []
    for group in np.split(several, np.flatnonzero(np.diff(inverse[several])) + 1):
        rows = group[(group >= local.start) & (group < local.stop)] - local.start
        if len(rows):
            out.append((rows, np.unique(partners[group])))
    return out
