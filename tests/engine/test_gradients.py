"""Invariant: the gradient does not depend on how a batch is split: 1, 2 and 4 ranks, so 4, 2 and 1 packs per rank,
under ZeRO-3 and ZeRO-2, equal one process that computes the paper's formulas text by text without any of our code."""

from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from reference import (
    naive_contrastive,
    plain_contrastive,
    plain_model,
    plain_reconstruction,
    plain_vectors,
    relative,
)

OBJECTIVES = {
    "reconstruction": {"kind": "reconstruction", "alpha": 0.2},
    "contrastive": {"kind": "contrastive", "temperature": 0.1},
    "all similarities": {
        "kind": "contrastive",
        "temperature": 0.1,
        "negatives": ["query_to_document", "query_to_query", "document_to_query", "document_to_document"],
        "false_negative_margin": 0.002,
        "matryoshka_dimensions": [8, 16],
    },
    "per side": {
        "kind": "contrastive",
        "temperature": 0.1,
        "negatives": ["query_to_document", "document_to_query"],
        "softmax": "per_side",
    },
    "one direction": {"kind": "reconstruction", "alpha": 0.0, "target": "instruction_and_body"},
    "joint": {"kind": "reconstruction", "alpha": 0.2, "contrastive": {"weight": 0.3, "temperature": 0.1}},
}
LORA = {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.1}


def recipe_of(
    folder: Path, shards: Path, objective: str, trained: dict, ds: str = "zero3", checkpointing: bool = False
):
    from anchor.config.schema import TrainRecipe

    return TrainRecipe.model_validate(
        {
            "output_dir": "unused",
            "seed": 0,
            "data": {"shards": shards},
            "backbone": {
                "path": str(folder),
                "trained": trained,
                "attention": "segments",
                "gradient_checkpointing": checkpointing,
            },
            "objective": OBJECTIVES[objective],
            "optim": {"lr": 1e-3, "warmup_steps": 0, "total_steps": 4, "max_grad_norm": 1e9},
            "engine": {"deepspeed": Path(__file__).parents[2] / f"ds_configs/{ds}.json", "dtype": "fp32"},
        }
    )


def gradients_of(ranks, cases: dict) -> dict:
    """Per case: loss and every trained parameter's whole gradient, from the engine's own step."""
    from deepspeed.utils import safe_get_full_grad

    from anchor.data.shards import ShardReader
    from anchor.engine.deepspeed import Engine, complete_ds_config, init_communication, read_ds_config
    from anchor.engine.loop import make_objective
    from anchor.engine.step import train_step
    from anchor.models.backbone import load_backbone

    class Spy(Engine):
        def step(self, lr: float) -> float:
            named = dict(self.objective.named_parameters())
            self.seen = {n: safe_get_full_grad(p) for n, p in named.items() if p.requires_grad}
            return 0.0

    init_communication()
    out = {}
    for case, arguments in cases.items():
        recipe = recipe_of(*arguments)
        ds_config = complete_ds_config(read_ds_config(recipe.engine.deepspeed), recipe, ranks.world_size)
        torch.manual_seed(0)
        model = load_backbone(recipe.backbone, torch.float32, "cpu", work_dir=Path("unused"), ds_config=ds_config)
        engine = Spy(make_objective(model, recipe), ds_config, recipe.optim, ranks)
        batch = ShardReader(recipe.data.shards).read(1)
        assert len(batch.packs) == 4
        result = train_step(engine, batch, step=1, seed=0, lr=1e-3)
        seen = {n.rpartition("causal_lm.")[2]: g.clone() for n, g in engine.seen.items() if g is not None}
        out[case] = (result.metrics["loss/total_nats"], seen if ranks.rank == 0 else {})
    return out


def expected_loss(objective: str, model, batch, shards: Path):
    """The objective's loss, text by text."""
    from anchor.config import schema
    from anchor.engine.loop import template_prefix_tokens

    if objective == "contrastive":
        return plain_contrastive(model, batch, 0.1)
    if objective == "joint":
        return plain_reconstruction(model, batch, 0.2) + 0.3 * plain_contrastive(model, batch, 0.1)
    section = OBJECTIVES[objective]
    if section["kind"] == "contrastive":
        chosen = schema.ContrastiveObjective.model_validate(section)
        vectors = plain_vectors(model, batch)
        loss = naive_contrastive(*vectors, chosen)
        if chosen.false_negative_margin is not None:  # it does leave something out
            without = naive_contrastive(*vectors, chosen.model_copy(update={"false_negative_margin": None}))
            assert abs(float((without - loss).detach())) > 1e-3
        return loss
    prefix = template_prefix_tokens(shards) if "target" in section else None
    return plain_reconstruction(model, batch, section["alpha"], prefix)


@pytest.fixture(scope="module")
def setting(tiny_model_dir, tiny_untied_model_dir, make_shards):
    """Cases, and the results on 1, 2 and 4 ranks."""
    shards = make_shards(pairs=16, pack_multiple=4, pack_tokens=1024, num_rows=48)
    full = {"kind": "full"}
    cases = {
        "reconstruction": (tiny_model_dir, shards, "reconstruction", full),
        "reconstruction untied": (tiny_untied_model_dir, shards, "reconstruction", full),
        "reconstruction ZeRO-2": (tiny_model_dir, shards, "reconstruction", full, "zero2"),
        "contrastive": (tiny_model_dir, shards, "contrastive", full),
        "contrastive checkpointed": (tiny_untied_model_dir, shards, "contrastive", full, "zero3", True),
        "contrastive ZeRO-2": (tiny_model_dir, shards, "contrastive", full, "zero2"),
        "contrastive LoRA": (tiny_model_dir, shards, "contrastive", LORA, "zero3", True),
        "reconstruction LoRA": (tiny_model_dir, shards, "reconstruction", LORA),
        "all similarities": (tiny_model_dir, shards, "all similarities", full),
        "per side": (tiny_untied_model_dir, shards, "per side", full),
        "one direction": (tiny_model_dir, shards, "one direction", full),
        "joint": (tiny_model_dir, shards, "joint", full),
        "joint untied": (tiny_untied_model_dir, shards, "joint", full, "zero2"),
        "joint LoRA": (tiny_model_dir, shards, "joint", LORA, "zero3", True),
    }
    return cases, {world_size: run_distributed(gradients_of, world_size, cases) for world_size in (1, 2, 4)}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loss_and_gradient_equal_one_process_without_our_code(setting, world_size):
    from anchor.data.shards import ShardReader

    cases, results = setting
    compared = 0
    for case, (folder, shards, objective, trained, *_) in cases.items():
        if trained["kind"] == "lora":
            continue  # dropout: compared between numbers of ranks below
        plain, batch = plain_model(folder), ShardReader(shards).read(1)
        expected = expected_loss(objective, plain, batch, shards)
        expected.backward()
        value = float(expected.detach())
        loss, gradient = results[world_size][0][case]
        assert loss == pytest.approx(value, rel=1e-5), case
        theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        assert len(theirs) > 10
        for name, wanted in theirs.items():
            assert relative(gradient[name], wanted) < 1e-4, (case, name)
            compared += 1
    assert compared > 60


@pytest.mark.parametrize("case", ["contrastive LoRA", "reconstruction LoRA", "joint LoRA"])
def test_dropout_and_gradient_do_not_depend_on_the_number_of_ranks(setting, case):
    _, results = setting
    loss, gradient = results[1][0][case]
    moved = [name for name, g in gradient.items() if float(g.norm()) > 0]
    assert all("lora_" in name for name in gradient)
    assert len(moved) >= 14
    for world_size in (2, 4):
        other_loss, other = results[world_size][0][case]
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name in moved:
            assert relative(other[name], gradient[name]) < 1e-4, name


def test_all_ranks_report_the_same_loss(setting):
    _, results = setting
    for case in setting[0]:
        assert len({results[4][rank][case][0] for rank in range(4)}) == 1
