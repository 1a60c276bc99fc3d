"""Invariants: the packed loss equals algorithm 1 computed one pair at a time; the mean is over the batch's target
tokens, however the batch is split; hard negatives and other texts play no part."""

import pytest
import torch
from reference import plain_model, plain_reconstruction, relative

from anchor.config import schema
from anchor.data.batches import to_tensors
from anchor.data.shards import ShardReader, make_batch
from anchor.models.backbone import load_causal_lm
from anchor.objectives.reconstruction import ReconstructionObjective

CPU = torch.device("cpu")


def objective_of(folder, alpha: float, dtype: torch.dtype) -> ReconstructionObjective:
    model = load_causal_lm(str(folder), dtype, "anchor_segments").eval()
    return ReconstructionObjective(model, schema.ReconstructionObjective(kind="reconstruction", alpha=alpha))


def packed_loss(objective: ReconstructionObjective, batch):
    outputs = [objective(to_tensors(objective.prepare(pack), CPU), batch) for pack in batch.packs]
    shares = [objective.metrics(output, batch) for output in outputs]
    assert len(shares) > 1
    return sum(o[0] for o in outputs), {name: float(sum(s[name] for s in shares)) for name in shares[0]}


@pytest.mark.parametrize("model_dir", ["tiny_model_dir", "tiny_untied_model_dir"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_packed_loss_and_gradient_equal_one_pair_at_a_time_in_float64(model_dir, alpha, request, make_shards):
    folder = request.getfixturevalue(model_dir)
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8)).read(0)
    objective, plain = objective_of(folder, alpha, torch.float64), plain_model(folder, torch.float64)
    loss, metrics = packed_loss(objective, batch)
    expected = plain_reconstruction(plain, batch, alpha)
    value = float(expected.detach())
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6)
    assert metrics["loss/total_nats"] == pytest.approx(value, rel=1e-6)
    weighted = alpha * metrics["loss/query_to_document_nats"] + (1 - alpha) * metrics["loss/document_to_query_nats"]
    assert weighted == pytest.approx(value, rel=1e-6)
    loss.backward()
    expected.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in objective.reconstructor.embedder.causal_lm.named_parameters():
        assert relative(parameter.grad, theirs[name].grad) < 1e-5, name


def test_the_loss_does_not_depend_on_how_the_batch_is_packed(tiny_model_dir, make_shards):
    objective = objective_of(tiny_model_dir, 0.2, torch.float64)
    folders = [make_shards(pairs=8, pack_multiple=m, pack_tokens=t, num_rows=8) for m, t in ((2, 512), (8, 256))]
    batches = [ShardReader(folder).read(0) for folder in folders]
    assert len(batches[0].packs) != len(batches[1].packs)
    first, second = (float(packed_loss(objective, batch)[0].detach()) for batch in batches)
    assert first == pytest.approx(second, rel=1e-6)


def test_hard_negatives_are_not_read(tiny_model_dir, make_shards):
    objective = objective_of(tiny_model_dir, 0.2, torch.float32)
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8, hard_negatives=2)).read(0)
    loss, _ = packed_loss(objective, batch)
    for pack in batch.packs:
        starts = pack.segment_lengths.cumsum() - pack.segment_lengths
        for s in (pack.roles > 1).nonzero()[0]:
            ids = pack.input_ids.copy()
            ids[starts[s] : starts[s] + pack.segment_lengths[s]] = 5
            object.__setattr__(pack, "input_ids", ids)
    assert float(packed_loss(objective, make_batch(batch.packs, "x"))[0].detach()) == float(loss.detach())


def test_the_anchor_token_is_the_last_target(tiny_model_dir, make_shards):
    """Masking by id, as published code does where pad is the end token, would leave this gradient at zero."""
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8)).read(0)
    bodies = sum(int((p.body_ends - p.body_starts)[p.roles == 0].sum()) for p in batch.packs)
    assert batch.query_target_tokens == bodies + 8
