"""Invariants: a decoded text is the argmax of the decode pass, token by token, without a cache; a stored normalised
embedding decodes to what its text decodes to; what cannot be decoded says why."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import english_pairs, write_jsonl
from safetensors.torch import save_file
from transformers import GenerationConfig

from anchor.encoding.encoder import Encoder
from anchor.errors import ConfigError, DataError, ModelError
from anchor.models.centres import CENTRES_NAME
from anchor.models.reconstructor import generate_from_prefixes
from eval.__main__ import main
from eval.decode import Decoded, Decoder, means, overlap, read_pairs, write_decoded
from eval.embedding.embed import Options, embed
from eval.embedding.texts import Source

PAIRS = english_pairs(5)
TEXTS = [row["positive"] for row in PAIRS]


@pytest.fixture(scope="module")
def encoder(export_dir) -> Encoder:
    encoder = Encoder(export_dir, dtype="fp32")
    # A tied random model repeats its anchor token; with another end it has something to say.
    encoder.about["anchor_token_id"] = encoder.backend.token_to_id("<|endoftext|>")
    return encoder


def greedy_without_cache(encoder: Encoder, rows: torch.Tensor, steps: int) -> list[int]:
    """Decode with one packed pass per token, the decode pass of training; append the last row's best token."""
    inputs, ids = rows, []
    model = encoder.embedder
    for _ in range(steps):
        length = len(inputs)
        ends = torch.tensor([0, length], dtype=torch.int32)
        hidden = model.hidden_states(inputs, torch.arange(length), ends, length)
        ids.append(int(model.causal_lm.get_output_embeddings()(hidden[-1]).argmax()))
        inputs = torch.cat([inputs, model.embed_tokens(torch.tensor(ids[-1:]))])
    return ids


def test_greedy_decoding_equals_the_decode_pass_without_a_cache(encoder):
    texts = encoder.states(TEXTS)
    # A tied random model repeats its last token: from a real anchor state it would only say that it is done.
    states = torch.from_numpy(texts) + 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    end = encoder.backend.token_to_id("<|im_end|>")
    # Settings of the folder, which `generate` would take where it is not told otherwise, change nothing.
    encoder.causal_lm.generation_config = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1)
    decoded = generate_from_prefixes(encoder.causal_lm, states[:, None], end, max_new_tokens=6)
    assert encoder.causal_lm.generation_config.repetition_penalty == 5.0
    with torch.inference_mode():
        expected = [greedy_without_cache(encoder, state[None], 6) for state in states]
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in expected]
    assert any(cut)
    assert decoded == cut
    # The packed kernel is back in its place.
    np.testing.assert_allclose(encoder.states(TEXTS), texts, atol=1e-6)


def test_a_centred_model_behind_a_prefix_decodes_as_its_decode_pass_does(export_dir, tmp_path):
    """Text by text, without a cache: [prefix, centred anchor state, words so far]; a stored vector says the same."""
    folder = tmp_path / "centred"
    shutil.copytree(export_dir, folder)
    about = json.loads((folder / "anchor.json").read_text())
    end, bos = (Encoder(folder, dtype="fp32").backend.token_to_id(name) for name in ("<|endoftext|>", "<|im_start|>"))
    changes = {"anchor_vector": "centred", "decode_prefix_token_ids": [bos, 9], "anchor_token_id": end}
    (folder / "anchor.json").write_text(json.dumps(about | changes))
    plain = Encoder(export_dir, dtype="fp32")
    frame = plain.backend.encode("").ids
    # Away from the anchor token, which a tied random model would repeat, and towards a word.
    word = plain.embedder.embed_tokens(torch.tensor([300]))[0].detach()
    mean = torch.from_numpy(plain.states(TEXTS)).mean(dim=0) - word / word.square().mean().sqrt()
    save_file({json.dumps([frame[:-1], frame[-1:]]): mean}, folder / CENTRES_NAME)
    encoder = Encoder(folder, dtype="fp32")
    decoder = Decoder(encoder, max_new_tokens=6)
    expected = []
    with torch.inference_mode():
        for state in torch.from_numpy(encoder.states(TEXTS)):
            moved = state - mean
            vector = moved / moved.square().mean().sqrt()
            before = encoder.embedder.embed_tokens(torch.tensor([bos, 9]))
            ids = greedy_without_cache(encoder, torch.cat([before, vector[None]]), 6)
            expected.append(encoder.backend.decode(ids[: ids.index(end)] if end in ids else ids))
    assert any(expected)
    assert [one.decoded for one in decoder.texts(TEXTS)] == expected
    assert expected != [one.decoded for one in Decoder(plain, max_new_tokens=6).texts(TEXTS)]
    source = Source(write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS]))
    embed(encoder, source, tmp_path / "vectors", Options())
    assert [one.decoded for one in decoder.stored(tmp_path / "vectors")] == expected


def test_a_stored_embedding_decodes_like_its_text(encoder, tmp_path, monkeypatch):
    decoder = Decoder(encoder, max_new_tokens=8)
    source = Source(write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS]))
    for name, options in (("unit", Options()), ("raw", Options(normalize=False))):
        embed(encoder, source, tmp_path / name, options)
        stored = decoder.stored(tmp_path / name)
        assert [one.source for one in stored] == ["0", "1", "2", "3", "4"]
        assert [one.decoded for one in stored] == [one.decoded for one in decoder.texts(TEXTS)]
        seen: list[np.ndarray] = []
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "prefixes", lambda _, found, seen=seen: seen.append(found) or [""] * len(found))
            decoder.stored(tmp_path / name)
        np.testing.assert_allclose(seen[0][:, 0], encoder.states(TEXTS), atol=1e-5)

    embed(encoder, source, tmp_path / "cut", Options(dimension=8))
    with pytest.raises(DataError) as error:
        decoder.stored(tmp_path / "cut")
    assert str(error.value) == (
        f"{tmp_path / 'cut'}: vectors of 8 components, decoding needs all 32; embed without --dimension"
    )


def test_beams_search_further(encoder):
    assert len(Decoder(encoder, max_new_tokens=4, num_beams=3).texts(TEXTS[:2])) == 2


def test_overlap_is_the_f1_of_words_and_of_their_longest_common_subsequence():
    assert overlap("a b c d", "D, c b") == pytest.approx((2 * 3 / 7, 2 * 1 / 7))
    assert overlap("река течёт", "Река") == pytest.approx((2 / 3, 2 / 3))
    assert overlap("a", "b") == (0.0, 0.0)


def test_pairs_are_decoded_both_ways_and_scored(encoder, tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    out = tmp_path / "decoded.jsonl"
    command = ["decode", str(encoder.folder), "--pairs", str(path), "--max-new-tokens", "5", "--output", str(out)]
    main(command)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["direction"] for row in rows] == ["document_to_query"] * 5 + ["query_to_document"] * 5
    assert rows[0]["source"] == rows[5]["reference"] == PAIRS[0]["positive"]
    assert rows[0]["reference"] == rows[5]["source"] == PAIRS[0]["query"]
    assert "over 5 pairs" in capsys.readouterr().out
    # A file that exists is refused before anything is decoded.
    monkeypatch.setattr(Decoder, "texts", lambda *_: pytest.fail("decoded"))
    with pytest.raises(SystemExit):
        main(command)
    assert "exists; choose another --output or add --overwrite" in capsys.readouterr().err


def test_texts_are_read_from_standard_input(encoder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"one\ntwo\n"))))
    main(["decode", str(encoder.folder), "--input", "-", "--max-new-tokens", "2"])
    assert [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")] == ["one", "two"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["decode", "m", "--pairs", "p", "--prompt", "query"],
            "eval decode: --prompt is of --text and --input; leave it out",
        ),
        (
            ["decode", "m", "--vectors", "v", "--prompt", "query"],
            "eval decode: --prompt is of --text and --input; leave it out",
        ),
        (
            ["decode", "m", "--text", "a", "--direction", "both"],
            "eval decode: --direction is of --pairs; leave it out",
        ),
        (
            ["table", "x=y", "--published"],
            "eval table: --published shows a benchmark's rows; add --benchmark or leave it out",
        ),
        (
            ["mteb", "m", "--tasks", "BIOSSES", "--compare", "published"],
            "eval mteb: --compare published shows a benchmark's rows; add --benchmark or leave it out",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(command, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


def test_a_failure_while_writing_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    def cut_short(self, text, **_):
        self.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    out = tmp_path / "d.jsonl"
    write_decoded(out, [Decoded("a", "b")], overwrite=False)
    with monkeypatch.context() as patch:
        patch.setattr(type(out), "write_text", cut_short)
        with pytest.raises(KeyboardInterrupt):
            write_decoded(out, [Decoded("c", "d")], overwrite=True)
    assert json.loads(out.read_text()) == {"source": "a", "decoded": "b"}
    with pytest.raises(ConfigError) as error:
        write_decoded(tmp_path, [], overwrite=True)
    assert str(error.value) == f"{tmp_path}: a folder; name a file"


def test_means_are_per_direction(encoder):
    decoded = Decoder(encoder, max_new_tokens=3).pairs([("q", "d")], "query_to_document")
    assert list(means(decoded)) == ["query_to_document"]
    assert means(decoded)["query_to_document"][2] == 1


def test_what_cannot_be_decoded_says_why(encoder, tmp_path):
    encoder.embedder.causal_lm.config.is_causal = False
    with pytest.raises(ModelError, match="attends in both directions"):
        Decoder(encoder)
    del encoder.embedder.causal_lm.config.is_causal
    bad = write_jsonl(tmp_path / "p.jsonl", [{"query": "a", "positives": "b"}])
    with pytest.raises(DataError) as error:
        read_pairs(bad)
    assert str(error.value) == f"{bad}:1: no field 'positive' with a text; did you mean 'positives'?"
    bad.write_text('{"query": "a\\ud800", "positive": "b"}\n')
    with pytest.raises(DataError) as error:
        read_pairs(bad)
    assert str(error.value) == f"{bad}:1: 'query' holds half a surrogate pair at character 2"
