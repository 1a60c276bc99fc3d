"""Invariants: the gradients of special tokens, projections and adapters do not depend on how a batch is split: 1, 2 and
4 ranks, 1 to 8 packs per rank, plain or cached, ZeRO-2 and ZeRO-3, equal one process that computes the formulas text
by text; adapters belong to the encode pass alone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from distributed import run_distributed
from reference import naive_contrastive, plain_model, relative, segments_of
from taught import DIMENSION, TEMPLATE, TOKENS, plain_embeddings, plain_losses, teach_at_random
from test_train import write_recipe

from anchor.config.load import load_recipe
from anchor.config.objectives import JointContrastiveSection
from anchor.config.train_recipe import TrainRecipe
from anchor.data.shards import ShardReader
from anchor.engine.plan import make_plan
from anchor.models.special_tokens import SpecialTokens

pytestmark = pytest.mark.slow
PAPER = {"kind": "self_supervised", "alignment_weight": 1.0, "reconstruction_weight": 1.0}
JOINT = {**PAPER, "contrastive": {"weight": 0.3, "temperature": 0.1}}
FROZEN = {"kind": "frozen"}
LORA = {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.0}
RANKS = (1, 2, 4)
PACKS = {4: ("paper", "paper ZeRO-2", "align only", "joint", "LoRA", "joint LoRA"), 8: ("paper", "joint")}
"""Packs of the batch, and the cases that are cut so."""


class Case(NamedTuple):
    """One engine: objective, trained parts, name of the DeepSpeed file, whether the head is tied."""

    objective: dict[str, Any]
    trained: dict[str, Any]
    ds: str
    tied: bool


CASES = {
    "paper": Case(PAPER, FROZEN, "zero3", True),
    "paper ZeRO-2": Case(PAPER, FROZEN, "zero2", False),
    "align only": Case({**PAPER, "reconstruction_weight": 0.0}, FROZEN, "zero3", True),
    "joint": Case(JOINT, FROZEN, "zero3", True),
    "LoRA": Case(PAPER, LORA, "zero3", False),
    "joint LoRA": Case(JOINT, LORA, "zero2", True),
}


def gradients_of(ranks, recipes: dict[str, Path]) -> dict[str, tuple[float, dict, dict]]:
    """Return for each recipe the loss, and gradients and values of the trained parameters, gathered whole."""
    from deepspeed.utils import safe_get_full_grad

    from anchor.engine.build import load_engine
    from anchor.engine.deepspeed import Engine
    from anchor.engine.step import train_step

    right, found = Engine.step, {}
    for name, recipe in recipes.items():
        plan = make_plan(load_recipe(recipe, TrainRecipe), name, ranks.world_size)
        engine = load_engine(plan, ranks, universal=False)
        trained = {n: p for n, p in engine.objective.named_parameters() if p.requires_grad}
        values = {short(n): engine.gathered(p).clone() for n, p in trained.items()}
        seen: dict[str, torch.Tensor] = {}

        def step(self, lr, seen=seen, trained=trained):
            seen |= {short(n): safe_get_full_grad(p).clone() for n, p in trained.items()}
            return right(self, 0.0)

        with patch.object(Engine, "step", step):
            result = train_step(engine, plan.reader.read(0), step=0, seed=0, lr=1e-3)
        found[name] = (result.metrics["loss/total_nats"], seen, values)
    return found


def short(name: str) -> str:
    return name.rpartition("special." if "special." in name else "causal_lm.")[2]


@pytest.fixture(scope="module")
def shards(make_shards) -> dict[int, Path]:
    """The same batch cut into 4 and 8 packs."""
    folders = {
        n: teach_at_random(make_shards(pairs=16, pack_multiple=n, pack_tokens=2048, num_rows=16, template=TEMPLATE))
        for n in PACKS
    }
    assert [len(ShardReader(folder).read(0).packs) for folder in folders.values()] == list(PACKS)
    return folders


@pytest.fixture(scope="module")
def results(tmp_path_factory, shards, tiny_model_dir, tiny_untied_model_dir) -> dict[int, Any]:
    """``results[ranks][case, packs]``."""
    recipes = {}
    for packs, names in PACKS.items():
        for name in names:
            case = CASES[name]
            folder = tmp_path_factory.mktemp("gradients")
            recipes[name, packs] = write_recipe(
                folder,
                tiny_model_dir if case.tied else tiny_untied_model_dir,
                shards[packs],
                objective=case.objective,
                backbone__trained=case.trained,
                optim__max_grad_norm=1e9,
                engine__deepspeed=str(Path(__file__).parents[2] / f"ds_configs/{case.ds}.json"),
            )
    out = {size: run_distributed(gradients_of, size, recipes)[0] for size in RANKS}
    for recipe in recipes.values():
        shutil.rmtree(recipe.parent)
    return out


@pytest.fixture(scope="module")
def expected(results, shards, tiny_model_dir, tiny_untied_model_dir) -> Callable[[str], tuple[float, dict]]:
    """``expected(case)`` returns loss and gradients, text by text in float64, at the engines' initial values."""
    known: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}

    def compute(name: str) -> tuple[float, dict[str, torch.Tensor]]:
        if name not in known:
            case, values = CASES[name], results[1][name, 4][2]
            folder = tiny_model_dir if case.tied else tiny_untied_model_dir
            special = SpecialTokens(TOKENS, 32, DIMENSION, 400).double()
            special.load_state_dict({n: v for n, v in values.items() if "lora" not in n})
            known[name] = plain_gradients(case, special, values, folder, ShardReader(shards[4]).read(0))
        return known[name]

    return compute


def plain_gradients(case: Case, special: SpecialTokens, values: dict, folder: Path, batch) -> tuple[float, dict]:
    encoder, decoder = (plain_model(folder, torch.float64) for _ in range(2))
    alignment, reconstruction = plain_losses(encoder, special, batch, decoder)
    loss = alignment + case.objective["reconstruction_weight"] * reconstruction
    if "contrastive" in case.objective:
        section = JointContrastiveSection.model_validate(case.objective["contrastive"])
        segments = [s for pack in batch.packs for s in segments_of(pack)]
        texts = [int(text) for pack in batch.packs for text in pack.text_ids]
        vectors = [plain_embeddings(encoder, special, s["ids"])[1] for s in segments]
        units = torch.stack([torch.nn.functional.normalize(v, dim=0) for v in vectors])
        loss = loss + section.weight * naive_contrastive(units, [s["role"] for s in segments], texts, section)
    loss.backward()
    gradients = {n: p.grad for n, p in special.named_parameters()}
    layers = dict(encoder.named_parameters())
    for name, a in values.items():
        if "lora_A" in name:  # y = W x + s B A x with B = 0: dL/dB = s dL/dW A^T, s = alpha / r
            layer = name.removesuffix(".lora_A.default.weight")
            gradients[name.replace("lora_A", "lora_B")] = 2.0 * layers[f"{layer}.weight"].grad @ a.T.double()
    return float(loss.detach()), gradients


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize(("packs", "name"), [(packs, name) for packs, names in PACKS.items() for name in names])
def test_loss_and_gradient_equal_one_text_at_a_time(results, expected, name, world_size, packs):
    loss, gradients, _ = results[world_size][name, packs]
    value, wanted = expected(name)
    assert len(wanted) == (5 if CASES[name].trained == FROZEN else 5 + 14)
    assert loss == pytest.approx(value, rel=1e-5)
    for parameter, gradient in wanted.items():
        assert relative(gradients[parameter].double(), gradient) < 1e-4, parameter
