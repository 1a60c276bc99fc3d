"""Invariant: reconstruction learns to use the embedding. 64 pairs, overfitted by a tiny model, end with a decoder that
says the right query for each document and needs the right document for it."""

import numpy as np
import pytest
import torch

from anchor.config import schema
from anchor.data.batches import to_tensors
from anchor.data.shards import Pack, make_batch
from anchor.models.backbone import load_causal_lm
from anchor.models.reconstructor import generate_from_prefixes
from anchor.objectives.reconstruction import ReconstructionObjective

START, END = 1, 2
PAIRS = 64
STEPS = 600


def overfit_batch() -> Pack:
    """One pack: documents of three words, queries of two that the document decides; every pair differs."""
    ids, roles = [], []
    for pair in range(PAIRS):
        first, second = divmod(pair, 8)
        ids += [[START, 10 + first, 20 + second, END], [START, 30 + first, 40 + second, 50, END]]
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


@pytest.mark.parametrize(
    ("decode_prefix", "vector", "dropout"),
    [
        ((), "raw", 0.0),
        ((START,), "centred", 0.5),
        *(
            pytest.param(prefix, vector, dropout, marks=pytest.mark.slow)
            for prefix in ((), (START,))
            for vector in ("raw", "centred")
            for dropout in (0.0, 0.5)
            if (prefix, vector, dropout) not in [((), "raw", 0.0), ((START,), "centred", 0.5)]
        ),
    ],
)
def test_64_pairs_are_learnt_until_every_document_decodes_to_its_query(tiny_model_dir, decode_prefix, vector, dropout):
    torch.manual_seed(0)
    model = load_causal_lm(str(tiny_model_dir), torch.float32, "anchor_segments")
    section = schema.ReconstructionObjective(
        kind="reconstruction", alpha=0.5, input_dropout=dropout, anchor_vector=vector
    )
    objective = ReconstructionObjective(model, section, None, decode_prefix)
    pack = overfit_batch()
    batch, tensors = make_batch([pack], "x"), to_tensors(pack, torch.device("cpu"))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for step in range(STEPS):
        torch.manual_seed(step)
        loss = objective(tensors, batch)[0]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        if objective.centres is not None:
            objective.centres.update(batch)
    objective.eval()
    with torch.no_grad():
        output = objective(tensors, batch)
    metrics = objective.metrics(output, batch)
    print({k: round(float(v), 3) for k, v in metrics.items()})
    vectors = output[2] if objective.centres is None else objective.centres.vectors(output[2], pack, training=False)
    documents = vectors[torch.from_numpy(pack.roles == 1)]
    said = generate_from_prefixes(
        model, documents[:, None], END, decode_prefix_ids=decode_prefix, max_new_tokens=4
    )
    right = [said[pair] == [10 + pair // 8, 20 + pair % 8] for pair in range(PAIRS)]
    print(sum(right))
    assert float(metrics["dependence/document_to_query_nats"]) > 1
    assert float(metrics["dependence/query_to_document_nats"]) > 1
    assert sum(right) == PAIRS
