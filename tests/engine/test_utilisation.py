"""Invariants: utilisation is the step's model FLOPs over the devices' peak, the same under ZeRO-3 as without; a device
that is not in the list has none."""

import json

import pytest
from distributed import run_distributed
from test_train import train_ranks, write_recipe

from anchor.estimate.gpus import peak_of_device


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_found_by_the_devices_name(device, tflops):
    assert peak_of_device(device) == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_utilisation_equals_the_hand_computed_one(zero, tmp_path, tiny_model_dir, make_shards):
    """Six FLOPs per matrix element and token of both passes, attention, and the head on the target tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from anchor.data.shards import ShardReader

    shards = make_shards(pairs=16, pack_multiple=2, pack_tokens=1024, num_rows=16)
    ds = str(tmp_path / "ds.json")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": int(zero[-1])}}))
    changes = {"optim__total_steps": 1, "telemetry": {"peak_tflops": 0.5}, "engine__deepspeed": ds}
    recipe = write_recipe(tmp_path, tiny_model_dir, shards, **changes)
    run_distributed(train_ranks, 2, recipe, False)
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text())

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    matrices = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    encode = decode = squares = 0
    for pack in ShardReader(shards).read(0).packs:
        for role, length, begin, end in zip(
            pack.roles, pack.segment_lengths, pack.body_starts, pack.body_ends, strict=True
        ):
            if role < 2:
                target = int(end - begin) + 1
                encode, decode = encode + int(length), decode + target
                squares += int(length) ** 2 + target**2
    flops = 6 * matrices * (encode + decode) + 6 * model.config.vocab_size * 32 * decode
    flops += 12 * 2 * 32 * squares
    expected = flops / (row["time/step_seconds"] * 2 * 0.5e12)
    assert row["speed/mfu_fraction"] == pytest.approx(expected, rel=1e-6)
