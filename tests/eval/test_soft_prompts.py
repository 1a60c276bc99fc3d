"""Invariants: a self-supervised folder gives the vectors of plain transformers and of its own sentence-transformers
module, with or without an adapter; its soft prompts decode as a decoder without a cache does; its base is found, and
another one refused; embed, mteb, decode and report take it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import english_pairs, write_jsonl
from peft import LoraConfig, get_peft_model
from retrieval import write_retrieval
from torch import nn
from transformers import AutoModelForCausalLM

from anchor.data.index import read_index
from anchor.encoding.encoder import Encoder
from anchor.encoding.opening import open_encoder
from anchor.encoding.soft_prompts import SoftPromptsEncoder
from anchor.errors import ConfigError, ModelError
from anchor.model_folder.description import base_fingerprint
from anchor.model_folder.special_tokens_export import Collected, write
from anchor.models.special_tokens import SpecialTokens
from eval.__main__ import main
from eval.decode import Decoder
from eval.embedding.vectors import read_folder
from eval.reporting.report import Looks, write_report

P, TEACHER = 3, 24
PAIRS = english_pairs(12)
TEXTS = [row["positive"] for row in PAIRS] + ["", "word " * 100]


def write_folder(folder: Path, base: Path, shards: Path, *, adapter: bool) -> Path:
    """Write a folder as the export leaves it, with every trained number drawn at random."""
    torch.manual_seed(2)
    index, causal_lm = read_index(shards), AutoModelForCausalLM.from_pretrained(base)
    fingerprint = base_fingerprint(causal_lm)
    special = SpecialTokens(P, 32, TEACHER, index.anchor_token_id - P + 1)
    nn.init.normal_(special.rows, std=0.05)
    nn.init.normal_(special.reconstruction.weight)  # so that texts decode differently
    shutil.copytree(shards / "tokenizer", folder)
    write(folder, Collected(dict(special.named_parameters()), fingerprint), causal_lm, index)
    about = {
        "objective": "self_supervised",
        "template": index.template,
        "anchor_token_id": index.anchor_token_id,
        "prompts": index.prompts,
        "max_tokens": 48,
        "base": {"path": str(base), "fingerprint": fingerprint},
        "special_tokens": {"count": P, "first_id": special.first_id},
        "end_token_id": index.end_token_id,
        "dimension": TEACHER,
    }
    (folder / "anchor.json").write_text(json.dumps(about))
    if adapter:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(causal_lm, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(str(folder / "adapter"))
    return folder


@pytest.fixture(scope="module")
def shards(make_shards) -> Path:
    template = {"kind": "special_tokens", "tokens": P, "end": "<|im_end|>"}
    return make_shards(max_tokens=48, template=template)


@pytest.fixture(scope="module", params=["rows", "adapter"])
def folder(request, tmp_path_factory, tiny_untied_model_dir, shards) -> Path:
    place = tmp_path_factory.mktemp("self_supervised") / "export"
    return write_folder(place, tiny_untied_model_dir, shards, adapter=request.param == "adapter")


@pytest.fixture
def rows_only(tmp_path, tiny_untied_model_dir, shards) -> Path:
    return write_folder(tmp_path / "export", tiny_untied_model_dir, shards, adapter=False)


@torch.inference_mode()
def plainly(encoder: SoftPromptsEncoder, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return soft prompts and unit vectors, one text at a time through transformers, with the rows put in by hand."""
    model = AutoModelForCausalLM.from_pretrained(encoder.about["base"]["path"]).eval()
    if (encoder.folder / "adapter").is_dir():
        model.load_adapter(str(encoder.folder / "adapter"))
    special = encoder.embedder.special
    prompts = []
    for text in texts:
        ids = torch.tensor(encoder.backend.encode(text).ids)
        assert ids[-P:].tolist() == [special.first_id + i for i in range(P)]
        inputs = torch.cat([model.get_input_embeddings()(ids[:-P]), special.rows])
        hidden = model.base_model(inputs_embeds=inputs[None]).last_hidden_state[0, -P:]
        prompts.append(special.reconstruction(hidden))
    soft = torch.stack(prompts)
    return soft, nn.functional.normalize(special.alignment(soft).mean(dim=1), dim=1)


def test_vectors_equal_plain_transformers_and_the_folders_own_module(folder):
    from sentence_transformers import SentenceTransformer

    encoder = open_encoder(folder, dtype="fp32", pack_tokens=120)
    assert isinstance(encoder, SoftPromptsEncoder)
    prompts, expected = plainly(encoder, TEXTS)
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.dimension) == (len(TEXTS), TEACHER)
    np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-5)
    assert np.abs(vectors - vectors[0]).max() > 0.01
    np.testing.assert_allclose(encoder.prefixes(TEXTS), prompts, atol=1e-4)
    theirs = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    for prompt_name, prompt in encoder.prompts.items():
        found = theirs.encode(TEXTS, prompt_name=prompt_name)
        assert (found * encoder.encode(TEXTS, prompt)).sum(axis=1).min() > 0.9999
    wide, narrow = (open_encoder(folder, dtype="bf16", pack_tokens=t).encode(TEXTS) for t in (8192, 50))
    assert (wide * narrow).sum(axis=1).min() > 0.999
    assert (wide * vectors).sum(axis=1).min() > 0.99


def test_soft_prompts_decode_by_the_base_without_its_adapter(folder):
    encoder = open_encoder(folder, dtype="fp32")
    prompts, _ = plainly(encoder, TEXTS)
    base = AutoModelForCausalLM.from_pretrained(encoder.about["base"]["path"]).eval()
    end, expected = encoder.about["end_token_id"], []
    for one in prompts:  # greedy, no cache
        inputs, ids = one, []
        while len(ids) < 6 and end not in ids:
            with torch.inference_mode():
                ids.append(int(base(inputs_embeds=inputs[None]).logits[0, -1].argmax()))
            inputs = torch.cat([inputs, base.get_input_embeddings()(torch.tensor(ids[-1:]))]).detach()
        expected.append(encoder.backend.decode([i for i in ids if i != end], skip_special_tokens=True))
    before = encoder.encode(TEXTS)
    assert [one.decoded for one in Decoder(encoder, max_new_tokens=6).texts(TEXTS)] == expected
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(encoder.encode(TEXTS), before)


def test_queries_decode_to_answers_and_stored_vectors_do_not_decode(rows_only, tmp_path, capsys):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS[:3])
    main(["decode", str(rows_only), "--pairs", str(pairs), "--max-new-tokens", "4", "--output", str(tmp_path / "d")])
    rows = [json.loads(line) for line in (tmp_path / "d").read_text().splitlines()]
    assert [row["direction"] for row in rows] == ["query_to_document"] * 3
    assert [row["source"] for row in rows] == [row["query"] for row in PAIRS[:3]]
    decoder = Decoder(open_encoder(rows_only, dtype="fp32"))
    with pytest.raises(ConfigError, match="so a query decodes to its answer only; use query_to_document"):
        decoder.pairs([("q", "d")], "document_to_query")
    with pytest.raises(SystemExit):
        main(["decode", str(rows_only), "--vectors", str(tmp_path / "v")])
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {rows_only}: of objective self_supervised, which decodes a text's soft prompts, not its stored "
        "vector; give the texts: --input FILE"
    )


def test_a_base_that_moved_is_found_by_its_option_and_another_is_refused(rows_only, tmp_path, tiny_untied_model_dir):
    expected = open_encoder(rows_only, dtype="fp32").encode(TEXTS)
    about = json.loads((rows_only / "anchor.json").read_text())
    about["base"]["path"] = str(tmp_path / "gone")
    (rows_only / "anchor.json").write_text(json.dumps(about))
    with pytest.raises(ModelError) as error:
        open_encoder(rows_only, dtype="fp32")
    assert str(error.value) == (
        f"{rows_only}: needs its base model, but {tmp_path / 'gone'}: no such model folder (hub names are looked up "
        "only when HF_HUB_OFFLINE is not 1); say where it lies by --base PATH"
    )
    moved = str(tiny_untied_model_dir)
    np.testing.assert_array_equal(open_encoder(rows_only, dtype="fp32", base=moved).encode(TEXTS), expected)
    other = AutoModelForCausalLM.from_pretrained(tiny_untied_model_dir)
    other.model.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError) as error:
        open_encoder(rows_only, dtype="fp32", base=str(tmp_path / "other"))
    assert str(error.value).startswith(f"{tmp_path / 'other'}: not the base of {rows_only}: fingerprint ")
    with pytest.raises(ModelError, match="holds special tokens for"):
        Encoder(rows_only, dtype="fp32")


def test_the_revision_follows_rows_adapter_and_base(folder, tmp_path):
    place = tmp_path / "export"
    shutil.copytree(folder, place)
    before = open_encoder(place, dtype="fp32").revision()
    for name in ("special_tokens.safetensors", "adapter/adapter_model.safetensors"):
        file = place / name
        if file.is_file():
            whole = file.read_bytes()
            file.write_bytes(whole[:-1] + b"\x01")
            assert open_encoder(place, dtype="fp32").revision() != before
            file.write_bytes(whole)
    assert open_encoder(place, dtype="fp32").revision() == before


@pytest.mark.filterwarnings("ignore")  # other libraries' loading of data sets
def test_the_commands_take_such_a_folder(rows_only, tmp_path, one_rank):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    main(["embed", str(rows_only), "--input", str(texts), "--output", str(tmp_path / "cut"), "--dimension", "8"])
    encoder = open_encoder(rows_only, dtype="fp32")
    stored, whole = read_folder(tmp_path / "cut"), encoder.states(TEXTS)
    cut = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(stored.embeddings, cut, atol=1e-5)
    np.testing.assert_allclose(stored.norms, np.linalg.norm(whole, axis=1), rtol=1e-5)
    task = write_retrieval(tmp_path / "small")
    main(["mteb", str(rows_only), "--retrieval", str(task), "--output", str(tmp_path / "mteb")])
    scores = json.loads((tmp_path / "mteb/scores.json").read_text())
    assert scores["prompts"] == "llm2vec_gen"
    assert scores["prompts_used"]["Local-small"] == {
        "query": "Generate a passage that best answers this question: ",
        "document": "Summarize the following passage: ",
    }
    assert 0 < scores["scores"]["Local-small"] < 1
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    write_report([], tmp_path / "report.html", looks=Looks(encoder, pairs=pairs))
    assert "12 pairs. Mean cosine" in (tmp_path / "report.html").read_text()
