"""Invariant: reconstruction learns to use the embedding. 64 pairs, overfitted by a tiny model, end with a decoder that
says the right query for each document and needs the right document for it."""

import numpy as np
import pytest
import torch

from anchor.config.objectives import ReconstructionSection
from anchor.data.batches import to_tensors
from anchor.data.shards import Pack, make_batch
from anchor.models.backbone import load_causal_lm
from anchor.models.reconstructor import generate_from_prefixes
from anchor.objectives.reconstruction import ReconstructionObjective

START, END = 1, 2
PAIRS = 64
LR = 5e-3
STEPS = 1000


def pack_of_pairs() -> Pack:
    """Return one pack of pairs: a document of one word, and its query of another."""
    ids, roles = [], []
    for pair in range(PAIRS):
        ids += [[START, 10 + pair, END], [START, 100 + pair, END]]
        roles += [0, 1]
    lengths = np.array([len(one) for one in ids], dtype=np.int32)
    return Pack(
        input_ids=np.concatenate([np.array(one, dtype=np.int32) for one in ids]),
        segment_lengths=lengths,
        body_starts=np.ones_like(lengths),
        body_ends=lengths - 1,
        roles=np.array(roles, dtype=np.int8),
        pair_ids=np.repeat(np.arange(PAIRS), 2),
        text_ids=np.arange(2 * PAIRS),
    )


PACK = pack_of_pairs()


@pytest.mark.parametrize(
    ("decode_prefix", "vector", "dropout"),
    [
        ((START,), "centred", 0.5),
        *(
            pytest.param(prefix, vector, dropout, marks=pytest.mark.slow)
            for prefix in ((), (START,))
            for vector in ("raw", "centred")
            for dropout in (0.0, 0.5)
            if (prefix, vector, dropout) != ((START,), "centred", 0.5)
        ),
    ],
)
def test_64_pairs_are_learnt_until_every_document_decodes_to_its_query(tiny_model_dir, decode_prefix, vector, dropout):
    torch.manual_seed(0)
    model = load_causal_lm(str(tiny_model_dir), torch.float32, "anchor_segments")
    section = ReconstructionSection(kind="reconstruction", alpha=0.5, input_dropout=dropout, anchor_vector=vector)
    objective = ReconstructionObjective(model, section, None, decode_prefix)
    pairs = np.repeat(np.arange(PAIRS), 2)
    parts = [make_batch([PACK.select(pairs % 4 == part)], "x") for part in range(4)]
    tensors = [to_tensors(part.packs[0], torch.device("cpu")) for part in parts]
    optimizer = torch.optim.AdamW(objective.parameters(), lr=LR)
    losses = [10.0] * 4
    for step in range(STEPS):
        part = step % 4
        torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / 20, 1.1 - step / STEPS)
        loss = objective(tensors[part], parts[part]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        if objective.centres is not None:
            objective.centres.update(parts[part])
        losses[part] = float(loss.detach())
        if max(losses) < 0.02:
            break
    objective.eval()
    batch = make_batch([PACK], "x")
    with torch.no_grad():
        whole = to_tensors(PACK, torch.device("cpu"))
        metrics = objective(whole, batch).metrics
        embedder = objective.reconstructor.embedder
        anchors = embedder.anchor_states(whole, embedder.embed_tokens(whole.input_ids))
    vectors = anchors if objective.centres is None else objective.centres.vectors(anchors, PACK, training=False)
    documents = vectors[torch.from_numpy(PACK.roles == 1)]
    said = generate_from_prefixes(model, documents[:, None], END, decode_prefix_ids=decode_prefix, max_new_tokens=4)
    right = [said[pair] == [10 + pair] for pair in range(PAIRS)]
    assert float(metrics["dependence/document_to_query_nats"]) > 1
    assert float(metrics["dependence/query_to_document_nats"]) > 1
    assert sum(right) == PAIRS
