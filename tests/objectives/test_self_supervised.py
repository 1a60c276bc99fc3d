"""Invariants: both losses and the gradient of every trained parameter equal plain transformers', one text at a time;
nothing depends on how the batch is packed; a loss without weight costs nothing; the joint loss is the sum of its parts;
nothing of the backbone has a gradient."""

from contextlib import nullcontext

import pytest
import torch
from reference import naive_contrastive, plain_model, relative, segments_of
from taught import DIMENSION, TEMPLATE, TOKENS, plain_embeddings, plain_losses, teach_at_random

from anchor.config.load import validate
from anchor.config.objectives import JointContrastiveSection, SelfSupervisedSection
from anchor.config.train_recipe import TrainRecipe
from anchor.data.batches import to_tensors
from anchor.data.shards import Batch, ShardReader
from anchor.errors import ConfigError
from anchor.models.backbone import load_causal_lm
from anchor.models.special_tokens import SpecialTokens
from anchor.objectives.base import add_shares
from anchor.objectives.self_supervised import SelfSupervisedObjective, new_special_tokens

CPU = torch.device("cpu")
PAPER = {"kind": "self_supervised", "alignment_weight": 1.0, "reconstruction_weight": 1.0}
CONTRASTIVE = {"weight": 0.3, "temperature": 0.1}


@pytest.fixture(scope="module")
def shards(make_shards):
    folder = make_shards(pairs=8, pack_multiple=2, num_rows=8, template=TEMPLATE)
    return teach_at_random(folder)


def objective_of(folder, shards, changes: dict | None = None, dtype: torch.dtype = torch.float64):
    model = load_causal_lm(str(folder), dtype, "anchor_segments").requires_grad_(False).eval()
    section = SelfSupervisedSection.model_validate(PAPER | (changes or {}))
    index = ShardReader(shards).index
    count = index.template["special_tokens"]
    special = new_special_tokens(model, count, DIMENSION, index.first_special_id, 0, lambda _: nullcontext())
    return SelfSupervisedObjective(model, special, section, index.end_token_id)


def special_of(objective) -> SpecialTokens:
    return objective.supervisor.embedder.special


def packed(objective, batch: Batch):
    """Return loss and metrics over all packs, and the outputs."""
    outputs = [objective(to_tensors(objective.prepare(pack), CPU), batch) for pack in batch.packs]
    shares: dict = {}
    for output in outputs:
        shares = add_shares(shares, output.metrics)
    assert len(outputs) > 1
    return sum(output.loss for output in outputs), {name: float(value) for name, value in shares.items()}, outputs


@pytest.mark.parametrize("model_dir", ["tiny_model_dir", "tiny_untied_model_dir"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_losses_and_gradients_equal_one_pair_at_a_time(model_dir, weights, request, shards):
    folder = request.getfixturevalue(model_dir)
    changes = dict(zip(("alignment_weight", "reconstruction_weight"), weights, strict=True))
    objective, batch = objective_of(folder, shards, changes), ShardReader(shards).read(0)
    loss, metrics, _ = packed(objective, batch)
    alignment, reconstruction = plain_losses(plain_model(folder, torch.float64), special_of(objective), batch)
    expected = weights[0] * alignment + weights[1] * reconstruction
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    wanted = {"loss/total_nats": expected, "loss/alignment_mean_square": alignment}
    wanted |= {"loss/reconstruction_nats": reconstruction} if weights[1] else {}
    assert set(metrics) == {*wanted, "embedding/teacher_cosine"}
    assert all(metrics[n] == pytest.approx(float(v.detach()), rel=1e-6) for n, v in wanted.items())
    special = special_of(objective)
    theirs = torch.autograd.grad(expected, list(special.parameters()))
    loss.backward()
    for (name, parameter), gradient in zip(special.named_parameters(), theirs, strict=True):
        if name.startswith("alignment") and not weights[0]:  # nothing is aligned
            assert float(parameter.grad.norm()) == float(gradient.norm()) == 0
        else:
            assert relative(parameter.grad, gradient) < 1e-5, name
    assert [n for n, p in objective.named_parameters() if p.grad is not None and "special" not in n] == []


def test_the_reported_cosine_is_that_of_embedding_and_teacher(tiny_model_dir, shards):
    objective, batch = objective_of(tiny_model_dir, shards).eval(), ShardReader(shards).read(0)
    _, metrics, outputs = packed(objective, batch)
    for pack, output in zip(batch.packs, outputs, strict=True):
        vectors, prepared = output.embeddings, objective.prepare(pack)
        teacher = torch.from_numpy(pack.teacher.astype("float32"))
        assert torch.allclose(vectors[prepared.roles == 1].float(), teacher, atol=1e-3)
        assert torch.allclose(vectors.norm(dim=1), torch.ones(()).to(vectors.dtype), atol=1e-6)
    found = [
        (o.embeddings[objective.prepare(p).roles == 0] * torch.from_numpy(p.teacher.astype("float64"))).sum(1)
        for p, o in zip(batch.packs, outputs, strict=True)
    ]
    assert metrics["embedding/teacher_cosine"] == pytest.approx(float(torch.cat(found).mean()), abs=1e-3)


def test_the_loss_does_not_depend_on_how_the_batch_is_packed(tiny_model_dir, make_shards):
    losses, sizes = [], []
    for multiple, tokens in ((2, 512), (8, 256)):
        folder = make_shards(pairs=8, pack_multiple=multiple, pack_tokens=tokens, num_rows=8, template=TEMPLATE)
        taught = teach_at_random(folder)
        batch = ShardReader(taught).read(0)
        losses.append(packed(objective_of(tiny_model_dir, taught), batch)[1])
        sizes.append(len(batch.packs))
    assert sizes[0] != sizes[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(("reconstruction", "passes"), [(1.0, 2), (0.0, 1)])
def test_only_queries_are_encoded_and_without_weight_nothing_is_decoded(
    tiny_model_dir, shards, monkeypatch, reconstruction, passes
):
    objective = objective_of(tiny_model_dir, shards, {"reconstruction_weight": reconstruction}).train()
    batch = ShardReader(shards).read(0)
    seen: list[int] = []
    embedder = objective.supervisor.embedder.embedder
    run = embedder.hidden_states
    monkeypatch.setattr(embedder, "hidden_states", lambda x, *rest: seen.append(len(x)) or run(x, *rest))
    packed(objective, batch)
    assert len(seen) == passes * len(batch.packs)
    assert sum(seen[::passes]) == sum(int(p.segment_lengths[p.roles == 0].sum()) for p in batch.packs)
    if passes == 2:
        assert sum(seen[1::2]) == batch.document_target_tokens + batch.num_pairs * (TOKENS - 1)
    read = sum(objective.prepare(pack).num_tokens for pack in batch.packs)
    assert (read == sum(seen[::passes])) == (passes == 1)


def test_the_joint_loss_adds_contrast_of_the_same_embeddings(tiny_model_dir, shards):
    objective = objective_of(tiny_model_dir, shards, {"contrastive": CONTRASTIVE})
    batch = ShardReader(shards).read(0)
    packs = [to_tensors(objective.prepare(pack), CPU) for pack in batch.packs]
    outputs = [objective(pack, batch) for pack in packs]
    vectors = torch.cat([output.embeddings for output in outputs])
    assert torch.equal(vectors, torch.cat([objective(pack, batch, True).embeddings for pack in packs]))
    contrast, shares = objective.pooled_loss(vectors, batch, 0, 1)
    for output in outputs:
        shares = add_shares(shares, output.metrics)
    special, plain = special_of(objective), plain_model(tiny_model_dir, torch.float64)
    segments = [s for pack in batch.packs for s in segments_of(pack)]
    assert {s["role"] for s in segments} == {0, 1, 2}
    wanted = [torch.nn.functional.normalize(plain_embeddings(plain, special, s["ids"])[1], dim=0) for s in segments]
    texts = [int(text) for pack in batch.packs for text in pack.text_ids]
    section = JointContrastiveSection.model_validate(CONTRASTIVE)
    expected = naive_contrastive(torch.stack(wanted), [s["role"] for s in segments], texts, section)
    alignment, reconstruction = plain_losses(plain, special, batch)
    total = float((alignment + reconstruction + 0.3 * expected).detach())
    assert float((sum(output[1] for output in outputs) + contrast).detach()) == pytest.approx(total, rel=1e-6)
    assert float(shares["loss/total_nats"]) == pytest.approx(total, rel=1e-6)
    assert float(shares["loss/contrastive_nats"]) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_one_special_token_is_enough(tiny_model_dir, make_shards):
    folder = teach_at_random(make_shards(pairs=8, pack_multiple=2, num_rows=8, template={**TEMPLATE, "tokens": 1}))
    objective, batch = objective_of(tiny_model_dir, folder), ShardReader(folder).read(0)
    assert special_of(objective).rows.shape == (1, 32)
    loss, _, _ = packed(objective, batch)
    alignment, reconstruction = plain_losses(plain_model(tiny_model_dir, torch.float64), special_of(objective), batch)
    assert float(loss.detach()) == pytest.approx(float((alignment + reconstruction).detach()), rel=1e-6)


def test_the_number_of_trained_parameters_is_exact(tiny_model_dir, shards):
    objective, hidden, dimension = objective_of(tiny_model_dir, shards), 32, DIMENSION
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    assert trained == TOKENS * hidden + hidden**2 + hidden + hidden * dimension + dimension


RECIPE = {
    "output_dir": "out",
    "seed": 0,
    "data": {"shards": "shards"},
    "backbone": {"path": "m", "trained": {"kind": "frozen"}, "attention": "segments"},
    "objective": PAPER,
    "optim": {"lr": 1e-3, "warmup_steps": 0, "total_steps": 1},
    "engine": {"deepspeed": "zero3.json", "dtype": "bf16"},
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"backbone": {**RECIPE["backbone"], "trained": {"kind": "full"}}},
            "x.yaml: backbone.trained.kind is full, but objective.kind self_supervised exports no backbone; use "
            "backbone.trained.kind: frozen (as the paper) or lora",
        ),
        (
            {"objective": {"kind": "contrastive", "temperature": 0.02}},
            "x.yaml: backbone.trained.kind is frozen, but objective.kind contrastive has no parameters of its own, so "
            "that nothing would be trained; use backbone.trained.kind: full or lora",
        ),
        (
            {"objective": {**PAPER, "alignment_weight": 0, "reconstruction_weight": 0}},
            "x.yaml: objective: alignment_weight and reconstruction_weight are both 0; the paper's are 1 and 1",
        ),
        (
            {"backbone": {**RECIPE["backbone"], "direction": "bidirectional"}},
            "x.yaml: backbone.direction is bidirectional, but objective.kind self_supervised decodes with the same "
            "weights, where every target would see itself; use backbone.direction: causal or objective.kind: "
            "contrastive",
        ),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(change, expected):
    validate(RECIPE, TrainRecipe, "x.yaml")
    with pytest.raises(ConfigError) as error:
        validate(RECIPE | change, TrainRecipe, "x.yaml")
    assert str(error.value) == expected
