"""Invariants: the packed next-token loss and its gradient equal plain transformers, one text at a time; the mean is
over the targets of the whole batch, however it is packed and on any number of ranks; hard negatives play no part; a
text without a token before it loses its first target, and only that; targets are those of reconstruction."""

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_distributed
from reference import plain_model, relative, segments_of

from anchor.config.train_recipe import TrainRecipe
from anchor.data.batches import to_tensors
from anchor.data.packing import decode_plan
from anchor.data.shards import Batch, ShardReader, make_batch
from anchor.models.backbone import load_causal_lm
from anchor.objectives.language_model import LanguageModelObjective, next_tokens

CPU = torch.device("cpu")


def plain_next_token(model, batch: Batch) -> tuple[torch.Tensor, int]:
    """Return mean loss and number of targets (body and anchor tokens of queries and positives), one text at a time."""
    terms = []
    for segment in (s for pack in batch.packs for s in segments_of(pack) if s["role"] <= 1):
        ids, (start, end) = segment["ids"], segment["body"]
        logits = model(input_ids=ids[None]).logits[0].double()
        targets = [*range(max(start, 1), end), len(ids) - 1]
        terms += [-torch.log_softmax(logits[t - 1], dim=-1)[ids[t]] for t in targets]
    return torch.stack(terms).mean(), len(terms)


def objective_of(folder: Path, dtype: torch.dtype = torch.float64) -> LanguageModelObjective:
    return LanguageModelObjective(load_causal_lm(str(folder), dtype, "anchor_segments").eval())


def packed(objective: LanguageModelObjective, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    outputs = [objective(to_tensors(objective.prepare(pack), CPU), batch) for pack in batch.packs]
    shares = [output.metrics for output in outputs]
    assert len(shares) > 1
    loss = torch.stack([output.loss for output in outputs]).sum()
    return loss, {name: float(torch.stack([s[name] for s in shares]).sum()) for name in shares[0]}


@pytest.mark.parametrize("model_dir", ["tiny_model_dir", "tiny_untied_model_dir"])
def test_packed_loss_and_gradient_equal_one_text_at_a_time_in_float64(model_dir, request, make_shards):
    folder = request.getfixturevalue(model_dir)
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8)).read(0)
    objective, plain = objective_of(folder), plain_model(folder, torch.float64)
    loss, metrics = packed(objective, batch)
    expected, number = plain_next_token(plain, batch)
    assert number == batch.query_target_tokens + batch.document_target_tokens == sum(objective.target_tokens(batch))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert metrics["loss/total_nats"] == pytest.approx(float(expected.detach()), rel=1e-6)
    queries, documents = objective.target_tokens(batch)
    sides = metrics["loss/query_nats"] * queries + metrics["loss/document_nats"] * documents
    assert sides / number == pytest.approx(float(expected.detach()), rel=1e-6)
    loss.backward()
    expected.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in objective.embedder.causal_lm.named_parameters():
        assert relative(parameter.grad, theirs[name].grad) < 1e-5, name


def test_the_loss_does_not_depend_on_how_the_batch_is_packed(tiny_model_dir, make_shards):
    objective = objective_of(tiny_model_dir)
    folders = [make_shards(pairs=8, pack_multiple=m, pack_tokens=t, num_rows=8) for m, t in ((2, 512), (8, 256))]
    batches = [ShardReader(folder).read(0) for folder in folders]
    assert len(batches[0].packs) != len(batches[1].packs)
    first, second = (float(packed(objective, batch)[0].detach()) for batch in batches)
    assert first == pytest.approx(second, rel=1e-6)


def test_hard_negatives_are_not_read(tiny_model_dir, make_shards):
    objective = objective_of(tiny_model_dir)
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8, hard_negatives=2)).read(0)
    before = float(packed(objective, batch)[0].detach())
    packs = []
    for pack in batch.packs:
        ids = pack.input_ids.copy()
        ids[np.repeat(pack.roles > 1, pack.segment_lengths)] = 5
        packs.append(type(pack)(ids, *(getattr(pack, name) for name in pack.__slots__ if name != "input_ids")))
    altered = make_batch(packs, batch.source)
    assert any((a.input_ids != b.input_ids).any() for a, b in zip(altered.packs, batch.packs, strict=True))
    assert float(packed(objective, altered)[0].detach()) == before


def test_targets_are_those_of_reconstruction(make_shards):
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8)).read(0)
    for pack in (p.select(p.roles <= 1) for p in batch.packs):
        plan = decode_plan(pack.input_ids, pack.segment_lengths, pack.roles, pack.body_starts, pack.body_ends)
        ours = next_tokens(pack)
        assert len(ours.targets) > 20
        assert (ours.targets == plan.targets).all()
        assert (ours.of_queries == (plan.target_roles == 0)).all()


def test_a_text_at_the_very_beginning_loses_its_first_target(tiny_model_dir, make_shards):
    bare = {"kind": "custom", "prefix": "", "suffix": "<|im_end|>"}
    batch = ShardReader(make_shards(pairs=8, pack_multiple=2, num_rows=8, template=bare)).read(0)
    objective = objective_of(tiny_model_dir)
    queries, documents = objective.target_tokens(batch)
    # Queries carry an instruction, documents begin their segments.
    assert (queries, documents) == (batch.query_target_tokens, batch.document_target_tokens - batch.num_pairs)
    expected, number = plain_next_token(plain_model(tiny_model_dir, torch.float64), batch)
    assert number == queries + documents
    assert float(packed(objective, batch)[0].detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def recipe_of(model: Path, shards: Path) -> TrainRecipe:
    return TrainRecipe.model_validate(
        {
            "output_dir": "unused",
            "seed": 0,
            "data": {"shards": shards},
            "backbone": {"path": str(model), "trained": {"kind": "full"}, "attention": "segments"},
            "objective": {"kind": "language_model"},
            "optim": {"lr": 1e-3, "warmup_steps": 0, "total_steps": 1, "max_grad_norm": 1e9},
            "engine": {"deepspeed": "zero3.json", "dtype": "fp32"},
        }
    )


def engine_metrics(ranks, model: Path, shards: Path) -> dict[str, float]:
    from anchor.engine.build import make_objective
    from anchor.engine.deepspeed import Engine, complete_ds_config, init_communication
    from anchor.engine.step import train_step
    from anchor.models.backbone import load_backbone

    init_communication()
    recipe = recipe_of(model, shards)
    config = complete_ds_config({"zero_optimization": {"stage": 3}}, recipe, ranks.world_size)
    causal_lm = load_backbone(recipe.backbone, torch.float32, "cpu", work_dir=Path("unused"), ds_config=config)
    engine = Engine(make_objective(causal_lm, recipe), config, recipe.optim, ranks)
    return train_step(engine, ShardReader(shards).read(0), step=0, seed=0, lr=1e-3).metrics


def test_a_step_on_two_ranks_has_the_loss_and_gradient_norm_of_plain_transformers(tiny_model_dir, make_shards):
    shards = make_shards(pairs=8, pack_multiple=4, num_rows=8)
    found = run_distributed(engine_metrics, 2, tiny_model_dir, shards)
    plain = plain_model(tiny_model_dir, torch.float64)
    expected, _ = plain_next_token(plain, ShardReader(shards).read(0))
    expected.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    assert found[0] == found[1]
    assert found[0]["loss/total_nats"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found[0]["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_dry_run_counts_the_head_of_a_language_model(tiny_model_dir, make_shards):
    from anchor.config.pack_recipe import PackRecipe
    from anchor.estimate.step_shape import bounded_step, sampled_step

    shards = make_shards(pairs=8, pack_multiple=2, num_rows=8)
    reader, objective = ShardReader(shards), objective_of(tiny_model_dir)
    recipe, packing = recipe_of(tiny_model_dir, shards), PackRecipe.model_validate(reader.index.recipe)
    batch = reader.read(0)
    step, _ = sampled_step(objective, packing, [batch])
    bound = bounded_step(recipe, packing)
    assert step.step_predicted_tokens == sum(objective.target_tokens(batch)) > 0
    assert bound.step_predicted_tokens == 2 * 8 * 64 >= step.step_predicted_tokens
    assert (step.step_decode_tokens, bound.step_decode_tokens, step.pooled, bound.pooled) == (0, 0, False, False)
    assert step.step_segments == bound.step_segments == 16
