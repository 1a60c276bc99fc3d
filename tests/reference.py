"""Slow references for the packed code: plain transformers, one text at a time."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from anchor.data.shards import Batch, Pack


def plain_model(folder, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the model with plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def segments_of(pack: Pack) -> list[dict]:
    """Cut the pack into its texts: ids, body span, role, pair."""
    out, start, pair = [], 0, -1
    for s, length in enumerate(pack.segment_lengths):
        pair += int(pack.roles[s] == 0)
        out.append(
            {
                "ids": torch.from_numpy(pack.input_ids[start : start + length].astype("int64")),
                "body": (int(pack.body_starts[s]), int(pack.body_ends[s])),
                "role": int(pack.roles[s]),
                "pair": pair,
            }
        )
        start += int(length)
    return out


def plain_hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model.base_model(input_ids=ids[None]).last_hidden_state[0]


def plain_reconstruction(
    model: PreTrainedModel,
    batch: Batch,
    alpha: float,
    prefix: int | None = None,
    *,
    decode_prefix: Sequence[int] = (),
    kept: Sequence[Tensor] | None = None,
    vector: Callable[[Tensor, dict], Tensor] = lambda state, _: state,
) -> Tensor:
    """Algorithm 1 of the paper, one pair at a time, with full logits.

    Args:
        model: the model.
        batch: the batch.
        alpha: weight of the documents' side.
        prefix: number of tokens that targets skip; None: targets are the bare texts.
        decode_prefix: tokens before the anchor vector.
        kept: per pack, which decode inputs are not dropped; None: all.
        vector: anchor state and its segment -> vector of the decode pass.
    """
    sums, counts = [0.0, 0.0], [0, 0]
    before = model.get_input_embeddings()(torch.tensor(decode_prefix, dtype=torch.long))
    for number, pack in enumerate(batch.packs):
        masks = None if kept is None else iter(kept[number])
        segments = [s for s in segments_of(pack) if s["role"] <= 1]
        for query, document in zip(segments[::2], segments[1::2], strict=True):
            assert (query["role"], document["role"], query["pair"]) == (0, 1, document["pair"])
            for target, partner in ((query, document), (document, query)):
                anchor = plain_hidden(model, partner["ids"])[-1]
                start, end = target["body"]
                body = target["ids"][start if prefix is None else prefix : end]
                words = model.get_input_embeddings()(body)
                if masks is not None:
                    words = torch.stack([word if next(masks) else torch.zeros_like(word) for word in words])
                inputs = torch.cat([before, vector(anchor, partner)[None], words])
                logits = model(inputs_embeds=inputs[None]).logits[0, len(before) :].double()
                wanted = torch.cat([body, target["ids"][-1:]])
                sums[target["role"]] = sums[target["role"]] + torch.nn.functional.cross_entropy(
                    logits, wanted, reduction="sum"
                )
                counts[target["role"]] += len(wanted)
    return alpha * sums[1] / counts[1] + (1 - alpha) * sums[0] / counts[0]


def naive_contrastive(vectors: Tensor, roles, text_ids, section) -> Tensor:
    """Every option of the contrastive loss, one cosine at a time; ``section`` is a ``ContrastiveTermSection``.

    Args:
        vectors: unit vectors of the batch's segments.
        roles, text_ids: of the segments.
    """
    roles, texts = list(roles), list(text_ids)
    queries = [i for i, role in enumerate(roles) if role == 0]
    sides = {"query": queries, "document": [i for i, role in enumerate(roles) if role > 0]}
    known_documents = {q: {texts[q]} | {texts[p + 1] for p in queries if texts[p] == texts[q]} for q in queries}
    known_queries = {q: {texts[q + 1]} | {texts[p] for p in queries if texts[p + 1] == texts[q + 1]} for q in queries}
    dimensions = (*section.matryoshka_dimensions, vectors.shape[1])
    softmaxes = [section.negatives]
    if section.softmax == "per_side":
        softmaxes = [[s for s in section.negatives if s.startswith(side)] for side in ("query", "document")]
    losses = []
    for dimension in dimensions:
        cut = [torch.nn.functional.normalize(v[:dimension], dim=0) for v in vectors]
        if dimension == vectors.shape[1]:
            cut = list(vectors)  # unit already: normalising again would change the gradient
        for softmax in softmaxes:
            for q in queries:
                scores = [cut[q] @ cut[q + 1] / section.temperature]
                for similarity in softmax:
                    row, _, column = similarity.partition("_to_")
                    known = known_documents[q] if column == "document" else known_queries[q]
                    if row == column:
                        known = known_documents[q] | known_queries[q]
                    i = q if row == "query" else q + 1
                    for j in sides[column]:
                        margin = section.false_negative_margin
                        own = q if column == "query" else q + 1
                        if j == own or (section.mask_known_matches and texts[j] in known):
                            continue
                        if margin is not None and vectors[i] @ vectors[j] > vectors[q] @ vectors[q + 1] + margin:
                            continue
                        scores.append(cut[i] @ cut[j] / section.temperature)
                losses.append(torch.logsumexp(torch.stack(scores), 0) - scores[0])
    assert len(losses) == len(dimensions) * len(softmaxes) * len(queries)
    return torch.stack(losses).mean()


def plain_vectors(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, list[int], list[int]]:
    """Unit vectors, roles and text identities of all segments of a batch."""
    segments = [s for pack in batch.packs for s in segments_of(pack)]
    vectors = [torch.nn.functional.normalize(plain_hidden(model, s["ids"])[-1], dim=0) for s in segments]
    texts = [int(text) for pack in batch.packs for text in pack.text_ids]
    return torch.stack(vectors), [s["role"] for s in segments], texts


def plain_contrastive(model: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
    """Mean InfoNCE of all queries against all documents of the batch, no masks."""
    segments = [s for pack in batch.packs for s in segments_of(pack)]
    vectors = [torch.nn.functional.normalize(plain_hidden(model, s["ids"])[-1], dim=0) for s in segments]
    documents = [(i, v) for i, (s, v) in enumerate(zip(segments, vectors, strict=True)) if s["role"] > 0]
    losses = []
    for i, segment in enumerate(segments):
        if segment["role"] == 0:
            scores = {j: vectors[i] @ v / temperature for j, v in documents}
            losses.append(torch.logsumexp(torch.stack(list(scores.values())), 0) - scores[i + 1])
    assert losses
    assert math.isfinite(float(losses[0].detach()))
    return torch.stack(losses).mean()


def relative(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|``; b must not be zero, or the comparison would be empty."""
    assert float(b.norm()) > 0
    return float((a - b).norm() / b.norm())
