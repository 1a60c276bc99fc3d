"""Invariants: the gradient does not depend on how a batch is split: 1, 2 and 4 ranks times 1, 2 and 4 packs per rank,
cached or plain, under ZeRO-0, ZeRO-2 and ZeRO-3, equal one process that computes the paper's formulas text by text
without any of our code; and the same comparison rejects the usual mistakes when they are made on purpose."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

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

pytestmark = pytest.mark.slow  # 20 engines on 1, 2 and 4 ranks
PACKS_PER_RANK = (1, 2, 4)

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
    "beyond the paper": {"kind": "reconstruction", "alpha": 0.2, "decode_prefix": "bos", "anchor_vector": "centred"},
    "joint": {"kind": "reconstruction", "alpha": 0.2, "contrastive": {"weight": 0.3, "temperature": 0.1}},
}
LORA = {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.1}
FULL = {"kind": "full"}


class Case(NamedTuple):
    """One engine.

    Attributes:
        model: folder.
        objective: name in OBJECTIVES.
        trained: the recipe's ``backbone.trained``.
        ds: DeepSpeed file.
        checkpointing: whether backward recomputes the layers.
    """

    model: Path
    objective: str
    trained: dict[str, Any]
    ds: Path
    checkpointing: bool = False


def recipe_of(case: Case, shards: Path):
    from anchor.config.train_recipe import TrainRecipe

    return TrainRecipe.model_validate(
        {
            "output_dir": "unused",
            "seed": 0,
            "data": {"shards": shards},
            "backbone": {
                "path": str(case.model),
                "trained": case.trained,
                "attention": "segments",
                "gradient_checkpointing": case.checkpointing,
            },
            "objective": OBJECTIVES[case.objective],
            "optim": {"lr": 1e-3, "warmup_steps": 0, "total_steps": 4, "max_grad_norm": 1e9},
            "engine": {"deepspeed": case.ds, "dtype": "fp32"},
        }
    )


def loss_times_world_size() -> AbstractContextManager:
    """Multiply the loss by the world size, which turns the engine's mean over ranks into a sum."""
    from anchor.engine.deepspeed import Engine

    right = Engine.backward
    return patch.object(
        Engine, "backward", lambda self, loss, *, last: right(self, loss * self.ranks.world_size, last=last)
    )


def gather_without_gradient() -> AbstractContextManager:
    """Gather the pool without gradient: no document learns, not even the rank's own."""
    from anchor import dist

    right = dist.all_gather_with_grad
    return patch.object(dist, "all_gather_with_grad", lambda rows, counts: right(rows, counts).detach())


def gradient_of_the_own_rows_only() -> AbstractContextManager:
    """Gather the pool without gradient and put the rank's own rows back, as several trainers do."""
    from anchor import dist

    right = dist.all_gather_with_grad

    def gather(rows, counts):
        parts = list(right(rows, counts).detach().split(list(counts)))
        parts[torch.distributed.get_rank()] = rows
        return torch.cat(parts)

    return patch.object(dist, "all_gather_with_grad", gather)


def mask_by_token_id() -> AbstractContextManager:
    """Mask targets equal to the padding's id, here the anchor token's: the model never learns the end."""
    from anchor.models.head import Head

    right, anchor = Head.forward, 2  # the third of conftest's SPECIAL_TOKENS
    return patch.object(
        Head, "forward", lambda self, hidden, target, weight: right(self, hidden, target, weight * (target != anchor))
    )


WRONG: dict[str, tuple[str, Callable[[], AbstractContextManager]]] = {
    "reconstruction times world size": ("reconstruction", loss_times_world_size),
    "contrastive times world size": ("contrastive", loss_times_world_size),
    "gather without gradient": ("contrastive", gather_without_gradient),
    "gradient of the own rows only": ("contrastive", gradient_of_the_own_rows_only),
    "mask by token id": ("reconstruction", mask_by_token_id),
}


def fixed_means(batch) -> dict:
    """A mean for every frame of a batch, no two alike."""
    from anchor.models.centres import frames_of

    frames = sorted({frame for pack in batch.packs for frame in frames_of(pack)})
    return {frame: torch.linspace(-1, 1, 32) * (number + 1) for number, frame in enumerate(frames)}


def gradients_of(ranks, cases: dict[str, Case], shards: dict[int, Path]) -> dict:
    """Return for each case and packs per rank: loss, every trained parameter's whole gradient, and LoRA's initial A.

    On two ranks, return the wrong variants too, from the same engines.
    """
    from deepspeed.utils import safe_get_full_grad

    from anchor.data.shards import ShardReader
    from anchor.engine.build import make_objective
    from anchor.engine.deepspeed import Engine, complete_ds_config, init_communication, read_ds_config
    from anchor.engine.step import train_step
    from anchor.models.backbone import load_backbone

    class Spy(Engine):
        def step(self, lr: float) -> float:
            named = {n: p for n, p in self.objective.named_parameters() if p.requires_grad}
            replicated = case.ds.stem == "zero0"
            self.seen = {n: p.grad if replicated else safe_get_full_grad(p) for n, p in named.items()}
            self.seen = {n.rpartition("causal_lm.")[2]: g.clone() for n, g in self.seen.items() if g is not None}
            return super().step(0.0)  # parameters stay, gradients are cleared

    init_communication()
    out: dict[str, dict[int, Any]] = {}
    for name, case in cases.items():
        recipe = recipe_of(case, shards[4])
        ds_config = complete_ds_config(read_ds_config(case.ds), recipe, ranks.world_size)
        torch.manual_seed(0)
        model = load_backbone(recipe.backbone, torch.float32, "cpu", work_dir=Path("unused"), ds_config=ds_config)
        engine = Spy(make_objective(model, recipe), ds_config, recipe.optim, ranks)
        adapters = {
            n.rpartition("causal_lm.")[2]: engine.gathered(p)
            for n, p in engine.objective.named_parameters()
            if "lora_A" in n
        }
        right: list[tuple[str, Callable]] = [(name, nullcontext)]
        wrong = [(w, mistake) for w, (of, mistake) in WRONG.items() if of == name and ranks.world_size == 2]
        for variant, mistake in right + wrong:
            for packs_per_rank in PACKS_PER_RANK:
                batch = ShardReader(shards[packs_per_rank * ranks.world_size]).read(1)
                assert len(batch.packs) == packs_per_rank * ranks.world_size
                if engine.objective.centres is not None:
                    engine.objective.centres.means = fixed_means(batch)
                with mistake():
                    result = train_step(engine, batch, step=1, seed=0, lr=1e-3)
                found = (result.metrics["loss/total_nats"], engine.seen if ranks.rank == 0 else {}, adapters)
                out.setdefault(variant, {})[packs_per_rank] = found
    return out


def expected_loss(objective: str, model, batch, shards: Path) -> torch.Tensor:
    """Return the objective's loss, computed text by text."""
    from anchor.config.objectives import ContrastiveSection
    from anchor.data.decode_prefix import template_prefix_ids

    if objective == "contrastive":
        return plain_contrastive(model, batch, 0.1)
    if objective == "joint":
        return plain_reconstruction(model, batch, 0.2) + 0.3 * plain_contrastive(model, batch, 0.1)
    section = OBJECTIVES[objective]
    if section["kind"] == "contrastive":
        chosen = ContrastiveSection.model_validate(section)
        vectors = plain_vectors(model, batch)
        loss = naive_contrastive(*vectors, chosen)
        if chosen.false_negative_margin is not None:  # it does leave something out
            without = naive_contrastive(*vectors, chosen.model_copy(update={"false_negative_margin": None}))
            assert abs(float((without - loss).detach())) > 1e-3
        return loss
    prefix = len(template_prefix_ids(shards)) if "target" in section else None
    if "anchor_vector" not in section:
        return plain_reconstruction(model, batch, section["alpha"], prefix)
    means = fixed_means(batch)

    def centred(state: torch.Tensor, segment: dict) -> torch.Tensor:
        ids, (start, end) = segment["ids"].tolist(), segment["body"]
        moved = state - means[tuple(ids[:start]), tuple(ids[end:])]
        return moved / moved.square().mean().sqrt()

    # The tokenizer's BOS token is the first of the template.
    return plain_reconstruction(
        model, batch, section["alpha"], decode_prefix=template_prefix_ids(shards)[:1], vector=centred
    )


@pytest.fixture(scope="module")
def shards(make_shards) -> dict[int, Path]:
    """The same batches cut into 1, 2, 4, 8 and 16 packs."""
    from anchor.data.shards import ShardReader

    folders = {
        packs: make_shards(pairs=16, pack_multiple=packs, pack_tokens=4096, num_rows=48) for packs in (1, 2, 4, 8, 16)
    }
    batches = [ShardReader(folder).read(1) for folder in folders.values()]
    pairs = [sorted(int(i) for pack in batch.packs for i in pack.pair_ids) for batch in batches]
    assert [len(batch.packs) for batch in batches] == list(folders)
    assert all(these == pairs[0] for these in pairs)
    return folders


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_model_dir, tiny_untied_model_dir, shards) -> tuple[dict[str, Case], dict[int, Any]]:
    """The cases, and the results on 1, 2 and 4 ranks."""
    zero2, zero3 = (Path(__file__).parents[2] / f"ds_configs/zero{stage}.json" for stage in (2, 3))
    zero0 = tmp_path_factory.mktemp("ds") / "zero0.json"
    zero0.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    tied, untied, exact_lora = tiny_model_dir, tiny_untied_model_dir, {**LORA, "dropout": 0.0}
    cases = {
        "reconstruction": Case(tied, "reconstruction", FULL, zero3),
        "reconstruction ZeRO-2": Case(tied, "reconstruction", FULL, zero2),
        "reconstruction ZeRO-0": Case(tied, "reconstruction", FULL, zero0),
        "reconstruction untied": Case(untied, "reconstruction", FULL, zero3),
        "contrastive": Case(tied, "contrastive", FULL, zero3),
        "contrastive ZeRO-2": Case(tied, "contrastive", FULL, zero2),
        "contrastive untied ZeRO-0": Case(untied, "contrastive", FULL, zero0),
        "contrastive untied checkpointed": Case(untied, "contrastive", FULL, zero3, True),
        "contrastive LoRA": Case(tied, "contrastive", LORA, zero3, True),
        "contrastive LoRA ZeRO-0": Case(tied, "contrastive", LORA, zero0),
        "contrastive LoRA without dropout": Case(tied, "contrastive", exact_lora, zero3),
        "reconstruction LoRA": Case(tied, "reconstruction", LORA, zero3),
        "reconstruction LoRA ZeRO-2": Case(untied, "reconstruction", LORA, zero2),
        "all similarities": Case(tied, "all similarities", FULL, zero3),
        "per side": Case(untied, "per side", FULL, zero3),
        "one direction": Case(tied, "one direction", FULL, zero3),
        "beyond the paper": Case(tied, "beyond the paper", FULL, zero3),
        "joint": Case(tied, "joint", FULL, zero3),
        "joint untied ZeRO-2": Case(untied, "joint", FULL, zero2),
        "joint LoRA": Case(tied, "joint", LORA, zero3, True),
    }
    return cases, {size: run_distributed(gradients_of, size, cases, shards) for size in (1, 2, 4)}


@pytest.fixture(scope="module")
def expected(setting, shards) -> Callable[[Path, str], tuple[float, dict[str, torch.Tensor]]]:
    """``expected(model, objective)`` returns the loss and all parameters' gradients, computed text by text."""
    from anchor.data.shards import ShardReader

    known: dict[tuple[Path, str], tuple[float, dict[str, torch.Tensor]]] = {}

    def compute(model: Path, objective: str) -> tuple[float, dict[str, torch.Tensor]]:
        if (model, objective) not in known:
            plain, batch = plain_model(model), ShardReader(shards[4]).read(1)
            loss = expected_loss(objective, plain, batch, shards[4])
            loss.backward()
            gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
            assert len(gradients) > 10
            known[model, objective] = float(loss.detach()), gradients
        return known[model, objective]

    return compute


def differing(found: tuple, wanted: tuple[float, dict[str, torch.Tensor]]) -> list[str]:
    """Return "loss" if it differs by over 1e-5, and parameters whose gradients differ by over 1e-4, both relative."""
    loss, gradients = found[:2]
    names = [] if loss == pytest.approx(wanted[0], rel=1e-5) else ["loss"]
    return names + [n for n, gradient in wanted[1].items() if not relative(gradients[n], gradient) < 1e-4]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("packs_per_rank", PACKS_PER_RANK)
def test_loss_and_gradient_equal_one_process_without_our_code(setting, expected, world_size, packs_per_rank):
    cases, results = setting
    compared = []
    for name, case in cases.items():
        if case.trained["kind"] == "full":
            found = results[world_size][0][name][packs_per_rank]
            assert differing(found, expected(case.model, case.objective)) == [], name
            compared.append(name)
    assert len(compared) == 14


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("packs_per_rank", PACKS_PER_RANK)
def test_the_gradient_of_an_adapter_follows_from_that_of_its_layer(setting, expected, world_size, packs_per_rank):
    """``y = W x + s B A x`` with B = 0 at the start: ``dL/dB = s dL/dW A^T`` and ``dL/dA = 0``."""
    cases, results = setting
    name = "contrastive LoRA without dropout"
    loss, gradients, first = results[world_size][0][name][packs_per_rank]
    value, layers = expected(cases[name].model, "contrastive")
    wanted = {}
    for adapter, a in first.items():
        layer = adapter.removesuffix(".lora_A.default.weight")
        wanted[f"{layer}.lora_B.default.weight"] = 2.0 * layers[f"{layer}.weight"] @ a.T  # alpha / r = 8 / 4
        assert float(gradients[adapter].abs().max()) == 0
    assert len(wanted) == 14
    assert differing((loss, gradients), (value, wanted)) == []


@pytest.mark.parametrize("num_packs", [2, 4, 8])
def test_dropout_and_gradient_do_not_depend_on_the_number_of_ranks(setting, num_packs):
    """Dropout is seeded by (seed, step, pack): cached on few ranks and plain on many must draw the same."""
    cases, results = setting
    compared = 0
    for name, case in cases.items():
        if not case.trained.get("dropout"):
            continue
        found = {w: results[w][0][name][num_packs // w] for w in (1, 2, 4) if num_packs // w in PACKS_PER_RANK}
        assert len(found) > 1
        loss, gradients, _ = found.pop(min(found))
        moved = {n: g for n, g in gradients.items() if float(g.norm()) > 0}
        assert all("lora_" in n for n in gradients)
        assert len(moved) >= 14
        for other in found.values():
            assert differing(other, (loss, moved)) == [], name
            compared += 1
    assert compared >= 5


def test_all_ranks_report_the_same_loss(setting):
    cases, results = setting
    for name in cases:
        for packs_per_rank in PACKS_PER_RANK:
            assert len({results[4][rank][name][packs_per_rank][0] for rank in range(4)}) == 1


@pytest.mark.parametrize("packs_per_rank", PACKS_PER_RANK)
@pytest.mark.parametrize("mistake", WRONG)
def test_the_comparison_rejects_a_mistake_made_on_purpose(setting, expected, mistake, packs_per_rank):
    cases, results = setting
    case = cases[WRONG[mistake][0]]
    wanted = expected(case.model, case.objective)
    wrong = differing(results[2][0][mistake][packs_per_rank], wanted)
    # Only the mask changes the loss itself; the others are seen in the gradient alone, of every layer.
    assert ("loss" in wrong) == (mistake == "mask by token id")
    assert len([name for name in wrong if name.endswith("proj.weight")]) == 14
