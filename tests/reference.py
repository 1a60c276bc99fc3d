"""What the packed code must equal, written the long way: plain transformers, one text at a time."""

import math

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from anchor.data.shards import Batch, Pack


def plain_model(folder, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as anybody would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def segments_of(pack: Pack) -> list[dict]:
    """The pack cut into its texts: ids, body span, role, pair."""
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


def plain_reconstruction(model: PreTrainedModel, batch: Batch, alpha: float) -> Tensor:
    """Algorithm 1 of the paper, one pair at a time, full logits."""
    sums, counts = [0.0, 0.0], [0, 0]
    for pack in batch.packs:
        segments = [s for s in segments_of(pack) if s["role"] <= 1]
        for query, document in zip(segments[::2], segments[1::2], strict=True):
            assert (query["role"], document["role"], query["pair"]) == (0, 1, document["pair"])
            for target, partner in ((query, document), (document, query)):
                anchor = plain_hidden(model, partner["ids"])[-1]
                body = target["ids"][slice(*target["body"])]
                inputs = torch.cat([anchor[None], model.get_input_embeddings()(body)])
                logits = model(inputs_embeds=inputs[None]).logits[0].double()
                wanted = torch.cat([body, target["ids"][-1:]])
                sums[target["role"]] = sums[target["role"]] + torch.nn.functional.cross_entropy(
                    logits, wanted, reduction="sum"
                )
                counts[target["role"]] += len(wanted)
    return alpha * sums[1] / counts[1] + (1 - alpha) * sums[0] / counts[0]


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
