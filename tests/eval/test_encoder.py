"""Invariants: vectors depend neither on the order nor on the packing of texts; a folder that is no export, and a
prompt that does not exist, are refused by name."""

import json

import numpy as np
import pytest
from conftest import english_pairs

from anchor.errors import ConfigError, ModelError
from eval.encoder import Encoder

TEXTS = [row["positive"] for row in english_pairs(40)] + ["", "word " * 200]


def test_vectors_depend_neither_on_order_nor_on_packing(export_dir):
    vectors = Encoder(export_dir, dtype="fp32", pack_tokens=8192).encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    small = Encoder(export_dir, dtype="fp32", pack_tokens=60)
    np.testing.assert_allclose(small.encode(TEXTS[::-1])[::-1], vectors, atol=1e-5)


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


def test_embed_writes_vectors_ids_and_manifest(export_dir, tmp_path):
    from eval.embed import embed

    source, out = tmp_path / "texts.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"id": f"n{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    encoder = Encoder(export_dir, dtype="fp32")
    embed(encoder, source, out, "query")
    vectors = np.load(out / "embeddings.npy")
    np.testing.assert_array_equal(vectors, encoder.encode(TEXTS, "Answer it: "))
    assert (out / "ids.txt").read_text().splitlines() == [f"n{i}" for i in range(len(TEXTS))]
    assert json.loads((out / "manifest.json").read_text())["prompt"] == "Answer it: "
    with pytest.raises(ConfigError) as error:
        embed(encoder, source, out, None)
    assert str(error.value) == f"{out}: not empty; choose another --output"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', ":2: malformed JSON: Expecting value at character 10"),
        ('{"txt": "a"}\n', ":1: no field 'text' with a text; did you mean 'txt'?"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', ": the id '1' is given twice"),
        ("", ": holds no text"),
    ],
)
def test_bad_input_files_are_refused_by_line(tmp_path, content, message):
    from anchor.errors import DataError
    from eval.embed import read_texts

    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_texts(path)
    assert str(error.value) == f"{path}{message}"
