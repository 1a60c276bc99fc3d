"""Invariants: what autograd saves in a layer is the estimate to the byte, for every kind of training; weights, master
copy, optimiser state and gradients of a real engine are the estimate's; work follows the papers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_distributed

from anchor.config.train_recipe import BackboneSection, TrainRecipe
from anchor.errors import ConfigError
from anchor.estimate.gpus import find_gpu
from anchor.estimate.memory import layer_bytes_per_token, memory, state_bytes
from anchor.estimate.model_shape import ModelShape, ParameterSize, shape_of
from anchor.estimate.setting import Setting, StepShape
from anchor.estimate.work import checkpoint_bytes, step_seconds, work
from anchor.models.backbone import DTYPES, choose_trained, meta_model
from anchor.models.embedder import Embedder

FULL = {"kind": "full"}
LORA = {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.1}
FROZEN = {"kind": "frozen"}
SETTING = Setting(
    num_ranks=2,
    ranks_per_node=8,
    element_bytes=2,
    zero={"stage": 3},
    kernel="segments",
    checkpointing=False,
    lora_rank=None,
    lora_dropout=False,
    device="cpu",
)


def saved_bytes_per_token(family: str, dtype: str, trained: dict[str, Any], layers: int) -> tuple[float, ModelShape]:
    """Return the bytes of all storages that autograd saves for the backward of one packed pass, without parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes)) if family == "llama" else Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.set_attn_implementation("anchor_segments")
    section = {"path": "unused", "trained": trained, "attention": "segments"}
    choose_trained(model, BackboneSection.model_validate(section))
    model.to(DTYPES[dtype]).train()
    model.enable_input_require_grads()
    embedder, tokens = Embedder(model), 128
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inputs = embedder.embed_tokens(torch.zeros(tokens, dtype=torch.long))
        boundaries = torch.arange(0, tokens + 1, 32, dtype=torch.int32)
        hidden = embedder.hidden_states(inputs, torch.arange(tokens) % 32, boundaries, 32)
    assert hidden.requires_grad
    return sum(t.untyped_storage().nbytes() for t in saved.values()) / tokens, shape_of(model)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "trained", [FULL, LORA, {**LORA, "dropout": 0.0}, FROZEN], ids=["full", "lora", "lora, no dropout", "frozen"]
)
def test_what_a_layer_saves_for_backward_is_estimated_to_the_byte(family, dtype, trained):
    three, shape = saved_bytes_per_token(family, dtype, trained, 3)
    one, _ = saved_bytes_per_token(family, dtype, trained, 1)
    setting = replace(
        SETTING,
        element_bytes=2 if dtype == "bf16" else 4,
        lora_rank=trained.get("r"),
        lora_dropout=bool(trained.get("dropout")),
        frozen=trained == FROZEN,
    )
    assert layer_bytes_per_token(shape, setting) == (three - one) / 2


def recipe_of(model: Path, trained: dict[str, Any], stage: int, dtype: str) -> TrainRecipe:
    return TrainRecipe.model_validate(
        {
            "output_dir": "unused",
            "seed": 0,
            "data": {"shards": "unused"},
            "backbone": {"path": str(model), "trained": trained, "attention": "segments"},
            "objective": {"kind": "contrastive", "temperature": 0.1},
            "optim": {"lr": 1e-3, "warmup_steps": 0, "total_steps": 1},
            "engine": {"deepspeed": f"zero{stage}.json", "dtype": dtype},
        }
    )


def measured_state(ranks, cases: dict) -> dict:
    """Return for each case the bytes of one rank of a real engine after one step, by name as in :func:`state_bytes`."""
    from anchor.data.shards import ShardReader
    from anchor.engine.deepspeed import Engine, complete_ds_config, init_communication
    from anchor.engine.step import train_step
    from anchor.models.backbone import load_backbone
    from anchor.objectives.contrastive import ContrastiveObjective

    init_communication()
    out = {}
    for name, (model, trained, stage, dtype, shards) in cases.items():
        recipe = recipe_of(model, trained, stage, dtype)
        ds_config = complete_ds_config({"zero_optimization": {"stage": stage}}, recipe, ranks.world_size)
        causal_lm = load_backbone(recipe.backbone, DTYPES[dtype], "cpu", work_dir=Path("unused"), ds_config=ds_config)
        engine = Engine(ContrastiveObjective(causal_lm, recipe.objective), ds_config, recipe.optim, ranks)
        train_step(engine, ShardReader(shards).read(0), step=0, seed=0, lr=1e-3)
        wrapper = engine._engine.optimizer
        adam = wrapper if stage == 0 else wrapper.optimizer
        moments = [t for s in adam.state.values() for t in s.values() if torch.is_tensor(t) and t.dim()]
        weights = [getattr(p, "ds_tensor", p) for p in engine.objective.parameters()]
        names = {2: "single_partition_of_fp32_groups", 3: "fp32_partitioned_groups_flat"}
        master = getattr(wrapper, names[stage]) if stage else []
        out[name] = {
            "weights": sum(t.nbytes for t in weights),
            "optimiser": sum(t.nbytes for t in moments),
            "master": sum(t.nbytes for t in master),
        }
        if stage == 3:
            out[name]["gradients"] = wrapper.grad_partitions_flat_buffer.nbytes
    return out


def test_state_of_a_real_engine_is_the_estimate(tiny_model_dir, tiny_untied_model_dir, make_shards):
    shards = make_shards(pairs=4, pack_multiple=2, num_rows=4)
    cases = {
        "full": (tiny_model_dir, FULL, 3, "bf16", shards),
        "full fp32": (tiny_untied_model_dir, FULL, 3, "fp32", shards),
        "LoRA": (tiny_untied_model_dir, LORA, 3, "bf16", shards),
        "ZeRO-2": (tiny_model_dir, FULL, 2, "bf16", shards),
        "ZeRO-2 LoRA": (tiny_model_dir, LORA, 2, "bf16", shards),
        "ZeRO-0": (tiny_model_dir, FULL, 0, "fp32", shards),
    }
    found = run_distributed(measured_state, 2, cases)
    for name, (model, trained, stage, dtype, _) in cases.items():
        shape = shape_of(meta_model(recipe_of(model, trained, stage, dtype).backbone))
        element_bytes = 2 if dtype == "bf16" else 4
        lora_rank = trained.get("r")
        setting = replace(SETTING, zero={"stage": stage}, element_bytes=element_bytes, lora_rank=lora_rank)
        expected = state_bytes(shape, setting)
        for rank in range(2):
            for part, measured in found[rank][name].items():
                # ZeRO-2 pads its two flat groups to a multiple of 2 W elements.
                padding = 2 * 4 * 4 * 2 if stage == 2 and part != "weights" else 0
                assert expected[part] <= measured <= expected[part] + padding, (name, part)
        assert expected["weights"] > 0


BIG = ModelShape(
    model_type="llama",
    num_layers=2,
    hidden_size=1000,
    intermediate_size=3000,
    vocabulary_size=10_000,
    query_size=1000,
    key_value_size=500,
    num_heads=10,
    tied=True,
    parameters=(
        ParameterSize("input embeddings", 10_000_000, True),
        ParameterSize("attention", 6_000_000, True),
        ParameterSize("mlp", 18_000_000, True),
    ),
    adapter_inputs=(),
    embedding_size=1000,
)
STEP = StepShape(
    num_pairs=32,
    num_packs=2.0,
    pack_tokens=1000,
    decode_tokens=0,
    step_tokens=2000.0,
    step_decode_tokens=0.0,
    squared_lengths=2000.0 * 100,
    step_segments=96.0,
    gathered_segments=0.0,
)


def test_full_training_costs_six_flops_per_matrix_element_and_token_and_lora_four():
    """arXiv:2204.02311, appendix B; attention by hand: 12 a l^2 a layer and segment."""
    layers, attention = 24_000_000, 2 * 1000 * 2000 * 100
    assert work(BIG, SETTING, STEP).model == 6 * layers * 2000 + 12 * attention
    lora = replace(SETTING, lora_rank=4)
    assert work(BIG, lora, STEP).model == 4 * layers * 2000 + 12 * attention


def test_checkpointing_and_gradient_cache_compute_one_forward_again():
    plain = work(BIG, SETTING, STEP)
    assert plain.again == 0
    assert work(BIG, replace(SETTING, checkpointing=True), STEP).again == plain.model / 3
    assert work(BIG, SETTING, replace(STEP, gathered_segments=64.0, num_packs=8.0)).again == plain.model / 3


def test_time_is_work_over_the_assumed_share_of_the_peak():
    h100 = find_gpu("h100-80gb")
    assert h100.bf16_flops == 989.4e12
    done = work(BIG, SETTING, STEP)
    assert step_seconds(done, h100, 4, 0.5) == pytest.approx(done.executed / (4 * 989.4e12 * 0.5))
    assert step_seconds(done, find_gpu("cpu"), 4, 0.5) is None


def test_offloading_moves_state_to_the_host():
    here = memory(BIG, SETTING, STEP)
    away = memory(BIG, replace(SETTING, zero={"stage": 3, "offload_optimizer": {}, "offload_param": {}}), STEP)
    assert (here.host, away.state) == (0, 0)
    assert away.host == here.state


def test_a_checkpoint_holds_twelve_bytes_per_trained_parameter():
    assert checkpoint_bytes(34_000_000, 2, 3) == 12 * 34_000_000
    assert checkpoint_bytes(34_000_000, 2, 2) == 14 * 34_000_000


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ConfigError) as error:
        find_gpu("h100-80g")
    assert str(error.value).startswith("--gpu: unknown GPU 'h100-80g'; did you mean 'h100-80gb'?; known are h100-80gb")
