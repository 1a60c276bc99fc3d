"""Invariants: vectors depend neither on the order nor on the packing of texts; a folder that is no export, and a
prompt that does not exist, are refused by name."""

import shutil

import numpy as np
import pytest
import torch
from conftest import english_pairs

from anchor.encoding.encoder import Encoder
from anchor.encoding.opening import open_encoder
from anchor.encoding.ranks import RankedEncoder
from anchor.errors import ConfigError, ModelError
from eval.__main__ import _warn_of_fp32
from eval.embedding.embed import Options
from eval.scoring import cache

TEXTS = [row["positive"] for row in english_pairs(40)] + ["", "word " * 200]


def test_vectors_depend_neither_on_order_nor_on_packing(export_dir):
    vectors = Encoder(export_dir, dtype="fp32", pack_tokens=8192).encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    small = Encoder(export_dir, dtype="fp32", pack_tokens=60)
    np.testing.assert_allclose(small.encode(TEXTS[::-1])[::-1], vectors, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the bound is a CPU's")
def test_a_cpu_gets_no_larger_passes_than_its_caches_like(export_dir, monkeypatch):
    encoder = Encoder(export_dir, dtype="fp32", pack_tokens=16384)
    seen, of_pack = [], encoder.of_pack
    monkeypatch.setattr(encoder, "of_pack", lambda pack: (seen.append(len(pack.input_ids)), of_pack(pack))[1])
    encoder.encode(["word " * 200] * 300)  # each cut to 48 tokens
    assert len(seen) > 1
    assert 2048 < max(seen) <= 4096


def test_each_call_of_a_command_has_several_blocks_so_that_most_are_tokenised_meanwhile(export_dir):
    # A call was one block: the device waited for the tokenizer before every one.
    encoder = Encoder(export_dir, dtype="fp32")
    for texts in (Options().shard_texts, cache.BLOCK_TEXTS):
        blocks = list(encoder._tokenised([str(number) for number in range(texts)], ""))
        assert len(blocks) >= 2
        assert [start for start, _ in blocks] == np.cumsum([0, *(len(ids) for _, ids in blocks[:-1])]).tolist()
        assert sum(len(ids) for _, ids in blocks) == texts


def test_vectors_do_not_depend_on_blocks(export_dir, monkeypatch):
    encoder = Encoder(export_dir, dtype="fp32")
    whole = encoder.encode([str(number) for number in range(20)])
    monkeypatch.setattr("anchor.encoding.encoder.BLOCK_TEXTS", 8)
    np.testing.assert_allclose(encoder.encode([str(number) for number in range(20)]), whole, atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 0.01


def test_texts_are_cut_where_the_command_says(export_dir, tmp_path):
    """`eval mteb --max-tokens` keeps the template even when it cuts the text."""
    encoder, text = Encoder(export_dir, dtype="fp32"), "word " * 200
    frame, before = len(encoder.backend.encode("").ids), encoder.encode([text])
    encoder.limit(20)
    assert [len(ids) for _, (ids,) in encoder._tokenised([text], "")] == [20]
    assert (RankedEncoder(encoder).max_tokens, encoder.about["max_tokens"]) == (20, 20)
    assert np.abs(encoder.encode([text]) - before).max() > 1e-3
    encoder.limit(48)
    np.testing.assert_array_equal(encoder.encode([text]), before)
    encoder.limit(256)
    assert np.abs(encoder.encode([text]) - before).max() > 1e-3
    for tokens, message in (
        (257, f"--max-tokens 257: {export_dir} has 256 positions; give at most that"),
        (frame, f"--max-tokens {frame}: the template of {export_dir} takes {frame}; give more"),
    ):
        with pytest.raises(ConfigError) as error:
            encoder.limit(tokens)
        assert str(error.value) == message
    assert encoder.max_tokens == 256
    folder = shutil.copytree(export_dir, tmp_path / "plain")
    (folder / "anchor.json").unlink()
    plain = open_encoder(folder, dtype="fp32")
    plain.limit(20)
    encoder.limit(20)
    np.testing.assert_allclose(plain.encode([text]), encoder.encode([text]), atol=1e-5)
    with pytest.raises(ConfigError, match="has 256 positions"):
        plain.limit(257)


@pytest.mark.parametrize(("dtype", "device", "rank", "warns"), [
    ("fp32", "cuda", 0, True), ("fp32", "cuda", 1, False), ("bf16", "cuda", 0, False), ("fp32", "cpu", 0, False),
])  # fmt: skip
def test_fp32_on_cuda_is_warned_of_once(export_dir, monkeypatch, caplog, dtype, device, rank, warns):
    encoder = Encoder(export_dir, dtype=dtype)
    encoder.device = torch.device(device)
    monkeypatch.setattr("anchor.dist.is_first_rank", lambda: rank == 0)
    _warn_of_fp32(encoder)
    expected = (
        "fp32 on CUDA: matrices are multiplied in full precision and attention, which no packed kernel knows in fp32, "
        "is one call per text and layer; if half precision will do, give --dtype bf16"
    )
    assert caplog.messages == ([expected] if warns else [])


def test_a_prompt_changes_the_vectors_and_an_unknown_one_is_refused(export_dir):
    encoder = Encoder(export_dir, dtype="fp32")
    plain, prompted = encoder.encode(TEXTS[:2]), encoder.encode(TEXTS[:2], encoder.prompt("query"))
    assert np.abs(plain - prompted).max() > 0.01
    np.testing.assert_allclose(prompted, encoder.encode(["Answer it: " + text for text in TEXTS[:2]]), atol=1e-6)
    with pytest.raises(ConfigError) as error:
        encoder.prompt("querry")
    assert str(error.value) == f"{export_dir}: no prompt is called 'querry'; did you mean 'query'?"


def test_a_folder_that_is_no_export_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ModelError) as error:
        Encoder(tiny_model_dir, dtype="fp32")
    assert str(error.value) == f"{tiny_model_dir}: no anchor.json; only folders exported by anchor.train can be read"
    with pytest.raises(ModelError, match="no such model folder"):
        Encoder(tmp_path / "nowhere", dtype="fp32")


def test_a_folder_of_sentence_transformers_is_served_by_that_library(export_dir, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(export_dir, folder)
    (folder / "anchor.json").unlink()
    encoder = open_encoder(folder, dtype="fp32")
    assert not encoder.raw
    assert encoder.prompt("query") == "Answer it: "
    ours = Encoder(export_dir, dtype="fp32").encode(TEXTS[:5], "Answer it: ")
    np.testing.assert_allclose(encoder.encode(TEXTS[:5], "Answer it: "), ours, atol=1e-5)


def test_a_folder_without_a_config_in_its_root_is_served(tiny_tokenizer_dir, tmp_path):
    """Regression: static embeddings, which have only modules.json, were not accepted as a model folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_tokenizer_dir / "tokenizer.json"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    model.save(str(tmp_path / "static"))
    (tmp_path / "static/config.json").unlink(missing_ok=True)
    vectors = open_encoder(tmp_path / "static", dtype="fp32").encode(TEXTS[:5])
    theirs = model.encode(TEXTS[:5], normalize_embeddings=True)
    np.testing.assert_allclose(vectors, theirs, atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


def test_the_revision_of_such_a_folder_is_that_of_all_its_modules(export_dir, tmp_path):
    """Regression: only FOLDER/*.safetensors counted, so all folders of pytorch_model.bin shared revision and scores."""
    folder = tmp_path / "plain"
    shutil.copytree(export_dir, folder)
    (folder / "anchor.json").unlink()
    encoder = open_encoder(folder, dtype="fp32")
    seen = [encoder.revision()]
    for name in ("pytorch_model.bin", "2_Dense/model.safetensors", "2_Dense/config.json", "modules.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"another {name}")
        seen.append(encoder.revision())
    assert len(set(seen)) == 5
    for name in ("mteb/cache/block-0.safetensors", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no part of the model")
    assert encoder.revision() == seen[-1]


def test_an_unreadable_or_incomplete_description_is_named(export_dir, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(export_dir, folder)
    (folder / "anchor.json").write_text('{"prompts": ')
    with pytest.raises(ModelError) as error:
        open_encoder(folder, dtype="fp32")
    assert str(error.value).startswith(f"{folder / 'anchor.json'}: not readable: Expecting value: ")
    (folder / "anchor.json").write_text('{"prompts": {}}')
    with pytest.raises(ModelError) as error:
        open_encoder(folder, dtype="fp32")
    assert str(error.value) == f"{folder / 'anchor.json'}: not readable: max_tokens is missing; export again"


def test_a_base_is_only_for_folders_that_have_none(export_dir):
    with pytest.raises(ConfigError) as error:
        open_encoder(export_dir, dtype="fp32", base="elsewhere")
    assert str(error.value) == (
        f"{export_dir}: holds a whole model, not one of objective self_supervised; leave --base out"
    )


def test_a_folder_of_another_kind_says_what_is_missing(tiny_model_dir):
    with pytest.raises(ModelError) as error:
        open_encoder(tiny_model_dir, dtype="fp32")
    assert str(error.value) == (
        f"{tiny_model_dir}: neither anchor.json nor modules.json; expected a folder exported by anchor.train or one of "
        "sentence-transformers"
    )
