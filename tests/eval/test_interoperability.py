"""Invariants: the exported folder means the same to mteb's own loader, to plain transformers and to the bare tokenizer
file, and holds the fields that vLLM's pooling runner and text-embeddings-inference read."""

import json

import mteb
import numpy as np
import pytest
import torch
from conftest import english_pairs
from tokenizers import Tokenizer

from anchor.encoding.encoder import Encoder
from anchor.model_folder.consumer_files import config_for_all, prompts_and_limit

TEXTS = [row["positive"] for row in english_pairs(6)]


@pytest.fixture(scope="module")
def ours(export_dir) -> np.ndarray:
    return Encoder(export_dir, dtype="fp32").encode(TEXTS)


@pytest.mark.filterwarnings("ignore")  # mteb asks the hub for a model card that a local folder has not
def test_mtebs_wrapper_reads_the_folder_but_its_command_line_knows_only_hub_names(export_dir, ours):
    """`mteb run -m FOLDER` calls `get_model`, which in mteb 2.26 has no loader for a folder; eval/README.md says so."""
    with pytest.raises(NotImplementedError):
        mteb.get_model(str(export_dir), device="cpu")
    model = mteb.models.SentenceTransformerEncoderWrapper(str(export_dir), device="cpu")
    np.testing.assert_allclose(model.model.encode(TEXTS), ours, atol=1e-5)
    assert model.model.prompts["query"] == "Answer it: "


def test_plain_transformers_agrees_with_either_padding_side(export_dir, ours):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(export_dir).eval(), AutoTokenizer.from_pretrained(export_dir)
    for side in ("left", "right"):
        batch = tokenizer(TEXTS, padding=True, truncation=True, padding_side=side, return_tensors="pt")
        last = batch["attention_mask"].cumsum(dim=1).argmax(dim=1)  # the last real token, wherever the padding is
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state[torch.arange(len(TEXTS)), last]
        np.testing.assert_allclose(torch.nn.functional.normalize(hidden, dim=1).numpy(), ours, atol=1e-5)


def test_the_bare_tokenizer_file_appends_the_anchor_token(export_dir):
    """A server in Rust reads tokenizer.json alone."""
    bare, ours = Tokenizer.from_file(str(export_dir / "tokenizer.json")), Encoder(export_dir, dtype="fp32").backend
    bare.enable_truncation(48)  # servers apply max_seq_length themselves
    for text in [*TEXTS, ""]:
        assert bare.encode(text).ids == ours.encode(text).ids
        assert bare.encode(text).tokens[-1] == "<|im_end|>"


def test_a_scaled_rotary_embedding_is_said_twice_and_read_once(export_dir, tmp_path):
    """Regression: transformers 5 writes it only to `rope_parameters`; older readers silently used 10,000."""
    from transformers import AutoConfig

    rope = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
    config = AutoConfig.from_pretrained(export_dir)
    config.rope_parameters = rope
    config.save_pretrained(tmp_path)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    said = config_for_all(tmp_path)
    assert (said["rope_theta"], said["rope_scaling"]) == (500000.0, {"rope_type": "linear", "factor": 4.0})
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope


def test_a_bidirectional_folder_says_so_to_every_reader(export_dir, tmp_path):
    """Regression: text-embeddings-inference attended causally: it reads another key for Llama, Mistral and Qwen3."""
    config = json.loads((export_dir / "config.json").read_text())
    assert "use_bidirectional_attention" not in config
    (tmp_path / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    assert config_for_all(tmp_path) == {**config, "is_causal": False, "use_bidirectional_attention": True}


def test_a_tokenizer_of_a_model_that_sees_images_is_one_of_texts(export_dir, tmp_path):
    """Regression: sentence-transformers looked for the settings of images and found none."""
    config = json.loads((export_dir / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "processor_class": "Gemma3Processor"}))
    assert prompts_and_limit(tmp_path, {}, 48)["tokenizer_config.json"] == config


def test_the_fields_that_servers_read(export_dir):
    """Fields that vLLM and text-embeddings-inference read.

    vLLM (`get_pooling_config`, `get_sentence_transformer_tokenizer_config`) reads the two module types by name, the
    first pooling key that is true, max_seq_length and do_lower_case. In config.json it reads architectures and
    is_causal, which defaults to causal.

    text-embeddings-inference (`ModelConfig`, `PoolConfig`) reads every pooling flag. In config.json it reads
    architectures, a known model_type, numbers where it expects some, and rope_theta at the top level.
    """
    modules = json.loads((export_dir / "modules.json").read_text())
    kinds = {module["type"]: module["path"] for module in modules}
    assert kinds["sentence_transformers.models.Pooling"] == "1_Pooling"
    assert kinds["sentence_transformers.models.Normalize"] == "2_Normalize"
    pooling = json.loads((export_dir / "1_Pooling/config.json").read_text())
    modes = {key: value for key, value in pooling.items() if key.startswith("pooling_mode_")}
    assert {key for key, value in modes.items() if value} == {"pooling_mode_lasttoken"}
    assert {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} <= set(modes)
    assert next(key for key, value in pooling.items() if value is True) == "pooling_mode_lasttoken"
    config = json.loads((export_dir / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == config["hidden_size"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config.get("is_causal", True) is True
    assert all(isinstance(config[key], int) for key in ("max_position_embeddings", "pad_token_id", "vocab_size"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    prompts = json.loads((export_dir / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts
    assert all(isinstance(text, str) for text in prompts.values())
    assert json.loads((export_dir / "sentence_bert_config.json").read_text()) == {
        "max_seq_length": 48,
        "do_lower_case": False,
    }
    assert json.loads((export_dir / "tokenizer_config.json").read_text())["model_max_length"] == 48
