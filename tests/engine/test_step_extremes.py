"""Invariants: a batch of one pair, equal texts and a positive that stands twice in the pool give the loss that the long
way gives, through the real engine; a gradient that overflows stops the run on all ranks before the optimiser: weights,
master copy and moments keep their bits, and the message names step, source and pairs."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_distributed
from reference import naive_contrastive, plain_model, plain_reconstruction, plain_vectors
from safetensors.torch import load_file, save_file

from anchor.config.objectives import ContrastiveSection, ReconstructionSection
from anchor.data.shards import Batch, Pack, ShardReader, make_batch

CONTRASTIVE = ContrastiveSection(kind="contrastive", temperature=0.1)
RECONSTRUCTION = ReconstructionSection(kind="reconstruction", alpha=0.2)
COLUMNS = [name for name in Pack.__slots__ if name != "teacher"]
OVERFLOWING_TEMPERATURE = 3e-39
"""A similarity over it is a finite float32, and so is the loss; its gradient is not."""


def pack_of(*chosen: tuple[Pack, int]) -> Pack:
    """Build a pack from segments of other packs."""
    parts = []
    for pack, s in chosen:
        keep = np.zeros(len(pack.roles), dtype=bool)
        keep[s] = True
        parts.append(pack.select(keep))
    return Pack(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in COLUMNS})


def pair(pack: Pack, number: int, segments: int = 3) -> list[tuple[Pack, int]]:
    """Return the first segments of a pair: query, positive, hard negatives."""
    first = int(np.flatnonzero(pack.roles == 0)[number])
    return [(pack, first + i) for i in range(segments)]


def batches_of(shards: Path) -> dict[str, Batch]:
    """Build extreme batches from the segments of a real one."""
    first, second = ShardReader(shards).read(0).packs
    lone = pack_of((first, 0), (first, 0), (first, 0), (first, 0))
    lone = dataclasses.replace(lone, roles=np.asarray([0, 1, 0, 1], dtype=np.int8))
    again = (pair(second, 0)[0], pair(first, 0)[1], pair(second, 0)[2])
    return {
        "one pair": make_batch([pack_of(*pair(first, 0))], "small"),
        "one pair without negatives": make_batch([pack_of(*pair(first, 0, 2))], "small"),
        "all texts identical": make_batch([lone, lone], "small"),
        "a positive twice": make_batch([first, pack_of(*again, *pair(second, 1))], "small"),
    }


def engine_of(ranks, model: Path, objective, stage: int, dtype: str):
    from anchor.config.train_recipe import TrainRecipe
    from anchor.engine.deepspeed import Engine, complete_ds_config
    from anchor.models.backbone import DTYPES, load_backbone
    from anchor.objectives.contrastive import ContrastiveObjective
    from anchor.objectives.reconstruction import ReconstructionObjective

    recipe = TrainRecipe.model_validate(
        {
            "output_dir": "unused",
            "seed": 0,
            "data": {"shards": "unused"},
            "backbone": {"path": str(model), "trained": {"kind": "full"}, "attention": "segments"},
            "objective": objective,
            "optim": {"lr": 1e-3, "warmup_steps": 0, "total_steps": 4},
            "engine": {"deepspeed": f"zero{stage}.json", "dtype": dtype},
        }
    )
    ds_config = complete_ds_config({"zero_optimization": {"stage": stage}}, recipe, ranks.world_size)
    causal_lm = load_backbone(recipe.backbone, DTYPES[dtype], "cpu", work_dir=Path("unused"), ds_config=ds_config)
    kind = ContrastiveObjective if isinstance(objective, ContrastiveSection) else ReconstructionObjective
    return Engine(kind(causal_lm, objective), ds_config, recipe.optim, ranks)


def losses_of(ranks, model: Path, shards: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """Return loss and gradient norm of every extreme batch with a pack for every rank; the learning rate is zero."""
    from anchor.engine.deepspeed import init_communication
    from anchor.engine.step import train_step

    init_communication()
    out = {}
    for objective in (CONTRASTIVE, RECONSTRUCTION):
        engine = engine_of(ranks, model, objective, 3, "fp32")
        for name, batch in batches_of(shards).items():
            if len(batch.packs) >= ranks.world_size:
                metrics = train_step(engine, batch, step=1, seed=0, lr=0.0).metrics
                out[objective.kind, name] = (metrics["loss/total_nats"], metrics["optim/grad_norm"])
    return out


OVERFLOWS = {"ZeRO-3 bf16": (3, "bf16"), "ZeRO-3 fp32": (3, "fp32"), "ZeRO-2 bf16": (2, "bf16"), "ZeRO-0": (0, "fp32")}


def overflows_of(ranks, model: Path, shards: Path) -> dict[str, tuple[str, list[bool]]]:
    """Return per setting the error of a step whose gradient overflows, and whether each tensor kept its bits."""
    from anchor.engine.deepspeed import init_communication
    from anchor.engine.step import train_step
    from anchor.errors import TrainingError

    def tensors(engine, stage: int) -> list[torch.Tensor]:
        wrapper = engine._engine.optimizer
        adam = wrapper if stage == 0 else wrapper.optimizer
        moments = [t for state in adam.state.values() for t in state.values() if torch.is_tensor(t)]
        masters = [p for group in adam.param_groups for p in group["params"]]
        weights = [getattr(p, "ds_tensor", p) for p in engine.objective.parameters()]
        return [t.detach().clone() for t in moments + masters + weights]

    init_communication()
    out, batch = {}, ShardReader(shards).read(0)
    for name, (stage, dtype) in OVERFLOWS.items():
        engine = engine_of(ranks, model, CONTRASTIVE, stage, dtype)
        start = tensors(engine, stage)
        train_step(engine, batch, step=0, seed=0, lr=1e-4)
        before = tensors(engine, stage)
        assert any(not torch.equal(a, b) for a, b in zip(start[-9:], before[-9:], strict=True))  # a step does move them
        term = engine.objective.pooled_loss
        term.section = term.section.model_copy(update={"temperature": OVERFLOWING_TEMPERATURE})
        message = ""
        try:
            train_step(engine, batch, step=1, seed=0, lr=1e-3)
        except TrainingError as error:
            message = str(error)
        after = tensors(engine, stage)
        out[name] = message, [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    return out


@pytest.fixture(scope="module")
def shards(make_shards):
    return make_shards(pairs=4, pack_multiple=2, num_rows=8)


@pytest.fixture(scope="module")
def losses(tiny_model_dir, shards):
    return {size: run_distributed(losses_of, size, tiny_model_dir, shards)[0] for size in (1, 2)}


@pytest.mark.parametrize("name", ["one pair", "one pair without negatives", "all texts identical", "a positive twice"])
def test_an_extreme_batch_has_the_loss_of_the_long_way(losses, tiny_model_dir, shards, name):
    batch, plain = batches_of(shards)[name], plain_model(tiny_model_dir)
    expected = {
        "contrastive": float(naive_contrastive(*plain_vectors(plain, batch), CONTRASTIVE).detach()),
        "reconstruction": float(plain_reconstruction(plain, batch, 0.2).detach()),
    }
    assert expected["reconstruction"] > 1
    # Nothing is left to tell apart where there are no negatives, or where each is known to match.
    alone = name in ("one pair without negatives", "all texts identical")
    assert (expected["contrastive"] > 0) == (not alone)
    compared = 0
    for size, found in losses.items():
        for kind, value in expected.items():
            if (kind, name) not in found:
                assert len(batch.packs) < size
                continue
            loss, norm = found[kind, name]
            assert loss == pytest.approx(value, rel=1e-5, abs=1e-6)
            assert (norm < 1e-6) == (kind == "contrastive" and alone)
            compared += 1
    assert compared == (2 if len(batch.packs) == 1 else 4)


def test_a_repeated_positive_counts_as_no_negative(losses, tiny_model_dir, shards):
    """As a negative it would raise the loss to that of the same vectors with all text identities different."""
    batch = batches_of(shards)["a positive twice"]
    vectors, roles, texts = plain_vectors(plain_model(tiny_model_dir), batch)
    assert len(set(texts)) < len(texts)
    unmasked = float(naive_contrastive(vectors, roles, range(len(texts)), CONTRASTIVE).detach())
    for size in (1, 2):
        assert losses[size]["contrastive", "a positive twice"][0] < unmasked - 1e-3


@pytest.fixture(scope="module")
def many(make_shards):
    """Sixteen pairs. With fewer, a random model finds every positive, and a low temperature leaves no gradient."""
    return make_shards(pairs=16, pack_multiple=2, num_rows=16, pack_tokens=4096)


@pytest.fixture(scope="module")
def steep_model(tmp_path_factory, tiny_model_dir):
    """A model with short hidden states: a unit vector's gradient grows as its length shrinks."""
    folder = tmp_path_factory.mktemp("steep") / "model"
    shutil.copytree(tiny_model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1e-4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def overflows(steep_model, many):
    return run_distributed(overflows_of, 2, steep_model, many)


@pytest.mark.parametrize("name", OVERFLOWS)
def test_a_gradient_that_overflows_stops_all_ranks_before_the_optimiser(overflows, many, name):
    pairs = [int(i) for p in ShardReader(many).read(0).packs for i in p.pair_ids[p.roles == 0]]
    assert len(pairs) == 16
    for rank in range(2):
        message, same = overflows[rank][name]
        assert message.startswith("step 1: source small, pairs ")
        assert ", ".join(map(str, pairs[:8])) in message
        assert "the gradient is not finite" in message
        assert "nothing was updated" in message
        assert len(same) > 5
        assert all(same)


def norm_overflow_of(ranks, model: Path, shards: Path) -> str:
    from anchor.engine.deepspeed import init_communication
    from anchor.engine.step import train_step
    from anchor.errors import TrainingError

    init_communication()
    engine = engine_of(ranks, model, CONTRASTIVE, 2, "bf16")
    term = engine.objective.pooled_loss
    term.section = term.section.model_copy(update={"temperature": 1e-36})
    try:
        train_step(engine, ShardReader(shards).read(0), step=1, seed=0, lr=1e-3)
    except TrainingError as error:
        return str(error)
    return f"norm {engine._engine.get_global_grad_norm()}"


def test_a_gradient_whose_norm_alone_overflows_stops_the_run(tiny_model_dir, many):
    """Regression: finite elements passed the check before the update; clipping by infinity made the gradient zero."""
    (message,) = run_distributed(norm_overflow_of, 1, tiny_model_dir, many)
    assert "the norm of the gradient is not finite" in message
    assert "this update is in no checkpoint" in message
