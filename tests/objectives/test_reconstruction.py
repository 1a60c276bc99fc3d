"""Invariants: the packed loss equals algorithm 1 computed one pair at a time; the mean is over the batch's target
tokens, however the batch is split; hard negatives and other texts play no part; a direction without weight costs
nothing; targets may include the instruction; the joint loss is the sum of its parts."""

import numpy as np
import pytest
import torch
from reference import plain_contrastive, plain_hidden, plain_model, plain_reconstruction, relative, segments_of

from anchor.config.load import validate
from anchor.config.objectives import ReconstructionSection
from anchor.config.train_recipe import TrainRecipe
from anchor.data.batches import to_tensors
from anchor.data.decode_prefix import template_prefix_ids
from anchor.data.packing import partners_of, wrong_partners_of
from anchor.data.shards import Pack, ShardReader, make_batch
from anchor.errors import ConfigError
from anchor.models.backbone import load_causal_lm
from anchor.objectives.base import add_shares
from anchor.objectives.reconstruction import ReconstructionObjective

CPU = torch.device("cpu")


def objective_of(
    folder, alpha: float, dtype: torch.dtype, prefix: int | None = None, decode_prefix=(), **fields
) -> ReconstructionObjective:
    model = load_causal_lm(str(folder), dtype, "anchor_segments").eval()
    target = "body" if prefix is None else "instruction_and_body"
    section = ReconstructionSection(kind="reconstruction", alpha=alpha, target=target, **fields)
    return ReconstructionObjective(model, section, prefix, tuple(decode_prefix))


def packed_loss(objective: ReconstructionObjective, batch):
    outputs = []
    for number, pack in enumerate(batch.packs):
        torch.manual_seed(number)
        outputs.append(objective(to_tensors(objective.prepare(pack), CPU), batch))
    shares = [output.metrics for output in outputs]
    assert len(shares) > 1
    return sum(output.loss for output in outputs), {name: float(sum(s[name] for s in shares)) for name in shares[0]}


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
    sides = {"loss/query_to_document_nats": alpha, "loss/document_to_query_nats": 1 - alpha}
    assert set(metrics) == {"loss/total_nats", *(name for name, weight in sides.items() if weight)}
    assert sum(w * metrics[name] for name, w in sides.items() if w) == pytest.approx(value, rel=1e-6)
    loss.backward()
    expected.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in objective.reconstructor.embedder.causal_lm.named_parameters():
        assert relative(parameter.grad, theirs[name].grad) < 1e-5, name


@pytest.mark.parametrize("decode_prefix", [(), (3,), (3, 9, 11)])
@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_loss_and_gradient_with_prefix_and_dropped_inputs_equal_one_pair_at_a_time(
    decode_prefix, dropout, tiny_model_dir, make_shards
):
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8)).read(0)
    objective = objective_of(tiny_model_dir, 0.2, torch.float64, decode_prefix=decode_prefix, input_dropout=dropout)
    kept = []
    for number, pack in enumerate(batch.packs):
        torch.manual_seed(number)
        words = int((pack.body_ends - pack.body_starts)[pack.roles <= 1].sum())
        kept.append(torch.rand(words) >= dropout)
    share = float(torch.cat(kept).double().mean())
    assert share == pytest.approx(1 - dropout, abs=0.1)
    loss, _ = packed_loss(objective, batch)
    plain = plain_model(tiny_model_dir, torch.float64)
    expected = plain_reconstruction(plain, batch, 0.2, decode_prefix=decode_prefix, kept=kept)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    paper = float(plain_reconstruction(plain, batch, 0.2).detach())
    assert (abs(paper - float(expected.detach())) > 1e-4) == bool(decode_prefix or dropout)
    loss.backward()
    expected.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in objective.reconstructor.embedder.causal_lm.named_parameters():
        assert relative(parameter.grad, theirs[name].grad) < 1e-5, name


def test_inputs_are_not_dropped_in_evaluation(tiny_model_dir, make_shards):
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8)).read(0)
    losses = {
        (dropout, training): float(
            packed_loss(objective_of(tiny_model_dir, 0.2, torch.float64, input_dropout=dropout).train(training), batch)[
                0
            ].detach()
        )
        for dropout in (0.0, 0.5)
        for training in (True, False)
    }
    assert losses[0.0, True] == losses[0.0, False] == losses[0.5, False] != losses[0.5, True]


def test_dependence_is_what_another_pairs_anchor_costs_beyond_the_own(tiny_model_dir, make_shards):
    """Compute it one pair at a time: the same rows behind the anchor of the next pair that shares no text with it."""
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8)).read(0)
    objective = objective_of(tiny_model_dir, 0.2, torch.float64, decode_prefix=(3,)).eval()
    _, metrics = packed_loss(objective, batch)
    plain = plain_model(tiny_model_dir, torch.float64)
    sums, counts = np.zeros((2, 2)), np.zeros(2)
    with torch.no_grad():
        embed = plain.get_input_embeddings()
        for pack in batch.packs:
            segments = [s for s in segments_of(pack) if s["role"] <= 1]
            anchors = [plain_hidden(plain, s["ids"])[-1] for s in segments]
            assert len(set(pack.text_ids[pack.roles <= 1])) == len(segments) > 2
            for i, target in enumerate(segments):
                start, end = target["body"]
                body, wanted = target["ids"][start:end], torch.cat([target["ids"][start:end], target["ids"][-1:]])
                for without, words in enumerate((embed(body), torch.zeros_like(embed(body)))):
                    nll = []
                    for partner in (i ^ 1, ((i ^ 1) + 2) % len(segments)):
                        rows = torch.cat([embed(torch.tensor([3])), anchors[partner][None], words])
                        logits = plain(inputs_embeds=rows[None]).logits[0, 1:]
                        nll.append(float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")))
                    sums[without, target["role"]] += nll[1] - nll[0]
                counts[target["role"]] += len(wanted)
    for role, direction in enumerate(("document_to_query", "query_to_document")):
        for without, suffix in enumerate(("", "_without_inputs")):
            expected = sums[without, role] / counts[role]
            assert abs(expected) > 1e-6
            assert metrics[f"dependence/{direction}{suffix}_nats"] == pytest.approx(expected, rel=1e-4)


def test_a_wrong_partner_shares_no_text_with_the_pair():
    roles = np.array([0, 1, 0, 1, 2, 0, 1, 0, 1], dtype=np.int8)
    texts = np.array([10, 20, 11, 20, 99, 10, 21, 12, 22])  # pairs 0 and 1 share a document, 0 and 2 a query
    assert wrong_partners_of(roles, texts).tolist() == [8, 7, 6, 5, -1, 8, 7, 1, 0]
    assert wrong_partners_of(roles[:4], texts[:4]).tolist() == [-1, -1, -1, -1]
    assert partners_of(roles)[roles <= 1].tolist() == [1, 0, 3, 2, 6, 5, 8, 7]


def test_dependence_is_absent_where_no_pair_has_another_beside_it(tiny_model_dir, make_shards):
    batch = ShardReader(make_shards(pairs=8, pack_multiple=8, num_rows=8)).read(0)
    assert all(pack.num_pairs == 1 for pack in batch.packs)
    _, metrics = packed_loss(objective_of(tiny_model_dir, 0.2, torch.float32).eval(), batch)
    assert not [name for name in metrics if name.startswith("dependence")]


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


def decoded_tokens(objective: ReconstructionObjective, batch, monkeypatch) -> int:
    """Count the tokens of all decode passes."""
    passes = []
    run = objective.reconstructor.embedder.hidden_states
    monkeypatch.setattr(
        objective.reconstructor.embedder, "hidden_states", lambda x, *rest: passes.append(len(x)) or run(x, *rest)
    )
    packed_loss(objective, batch)
    assert len(passes) == 2 * len(batch.packs)
    return sum(passes[1::2])


def test_a_direction_without_weight_is_not_decoded(tiny_model_dir, make_shards, monkeypatch):
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8)).read(0)
    both, documents, queries = (
        decoded_tokens(objective_of(tiny_model_dir, alpha, torch.float32), batch, monkeypatch)
        for alpha in (0.2, 1.0, 0.0)
    )
    assert (documents, queries) == (batch.document_target_tokens, batch.query_target_tokens)
    assert both == documents + queries


def test_one_direction_of_sides_of_equal_length_decodes_half_the_tokens(tiny_model_dir, monkeypatch):
    n, pairs = 6, 4
    ids, ones = np.arange(2 * pairs * n, dtype=np.int32), np.ones(2 * pairs, dtype=np.int32)
    roles, numbers = np.tile([0, 1], pairs).astype(np.int8), np.arange(2 * pairs)
    batch = make_batch([Pack(ids, n * ones, 2 * ones, 5 * ones, roles, numbers, numbers)] * 2, "x")
    both, one = (
        decoded_tokens(objective_of(tiny_model_dir, alpha, torch.float32), batch, monkeypatch) for alpha in (0.5, 1.0)
    )
    assert both == 2 * one == 2 * 2 * pairs * 4


@pytest.mark.parametrize("alpha", [0.2, 1.0, 0.0])
def test_targets_with_the_instruction_begin_behind_the_template(tiny_model_dir, make_shards, alpha):
    shards = make_shards(pairs=8, pack_multiple=2, num_rows=8)
    prefix = len(template_prefix_ids(shards))
    batch = ShardReader(shards).read(0)
    for segment in (s for pack in batch.packs for s in segments_of(pack)):
        # Documents carry no instruction, so their bodies begin where the template's prefix ends; queries' do not.
        assert (segment["body"][0] == prefix) == (segment["role"] > 0)
    objective = objective_of(tiny_model_dir, alpha, torch.float64, prefix)
    loss, metrics = packed_loss(objective, batch)
    expected = plain_reconstruction(plain_model(tiny_model_dir, torch.float64), batch, alpha, prefix)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert metrics["loss/total_nats"] == pytest.approx(float(expected.detach()), rel=1e-6)
    without = float(packed_loss(objective_of(tiny_model_dir, alpha, torch.float64), batch)[0].detach())
    assert (abs(without - float(loss.detach())) > 1e-4) == (alpha < 1)


def test_the_joint_loss_is_reconstruction_plus_weighted_contrast_of_the_same_states(tiny_model_dir, make_shards):
    section = ReconstructionSection.model_validate(
        {"kind": "reconstruction", "alpha": 0.2, "contrastive": {"weight": 0.3, "temperature": 0.1}}
    )
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8)).read(0)
    model = load_causal_lm(str(tiny_model_dir), torch.float64, "anchor_segments").eval()
    objective = ReconstructionObjective(model, section)
    packs = [to_tensors(objective.prepare(pack), CPU) for pack in batch.packs]
    outputs = [objective(pack, batch) for pack in packs]
    embeddings = torch.cat([output.embeddings for output in outputs])
    alone = torch.cat([objective(pack, batch, True).embeddings for pack in packs])
    assert torch.equal(embeddings, alone)
    contrast, shares = objective.pooled_loss(embeddings, batch, 0, 1)
    for output in outputs:
        shares = add_shares(shares, output.metrics)
    plain = plain_model(tiny_model_dir, torch.float64)
    expected = [plain_reconstruction(plain, batch, 0.2), plain_contrastive(plain, batch, 0.1)]
    value = float((expected[0] + 0.3 * expected[1]).detach())
    assert float((sum(output.loss for output in outputs) + contrast).detach()) == pytest.approx(value, rel=1e-6)
    assert float(shares["loss/total_nats"]) == pytest.approx(value, rel=1e-6)
    assert float(shares["loss/contrastive_nats"]) == pytest.approx(float(expected[1].detach()), rel=1e-6)
    assert "embedding/positive_cosine" in shares


def test_the_anchor_token_is_the_last_target(tiny_model_dir, make_shards):
    """Masking by id, as in published code where pad is the end token, would give this target no gradient."""
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8)).read(0)
    bodies = sum(int((p.body_ends - p.body_starts)[p.roles == 0].sum()) for p in batch.packs)
    assert batch.query_target_tokens == bodies + 8


def test_reconstruction_refuses_a_bidirectional_backbone():
    """The decode pass runs the same weights; a target that attends to later tokens would see itself."""
    recipe = {
        "output_dir": "out",
        "seed": 0,
        "data": {"shards": "shards"},
        "backbone": {"path": "m", "trained": {"kind": "full"}, "attention": "segments", "direction": "bidirectional"},
        "objective": {"kind": "contrastive", "temperature": 0.02},
        "optim": {"lr": 1e-3, "warmup_steps": 0, "total_steps": 1},
        "engine": {"deepspeed": "zero3.json", "dtype": "bf16"},
    }
    validate(recipe, TrainRecipe, "x.yaml")
    recipe["objective"] = {"kind": "reconstruction", "alpha": 0.2}
    with pytest.raises(ConfigError) as error:
        validate(recipe, TrainRecipe, "x.yaml")
    assert str(error.value) == (
        "x.yaml: backbone.direction is bidirectional, but objective.kind reconstruction decodes with the same weights, "
        "where every target would see itself; use backbone.direction: causal or objective.kind: contrastive"
    )
