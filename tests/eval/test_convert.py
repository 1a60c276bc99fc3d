"""Invariants: a folder in LLM2Vec-Gen's published layout, made by peft itself, gives after conversion the vectors and
decoded texts that plain peft and transformers give with it; nothing in it is executed; what is missing, of another size
or not supported is one line."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import english_pairs
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from anchor.encoding.opening import open_encoder
from anchor.errors import ConfigError, DataError, ModelError
from anchor.model_folder.description import Description, read_description
from eval.__main__ import main
from eval.conversion.convert import convert
from eval.decode import Decoder

# Peft warns that rows of a tied, enlarged embedding are saved, and transformers of random new rows: as the authors do.
pytestmark = pytest.mark.filterwarnings("ignore")

P, TEACHER = 3, 24
NAMES = [f"<|compressed_{i}|>" for i in range(P)]
TEXTS = [row["positive"] for row in english_pairs(6)] + ["  spaces around \n", "", "a <|im_end|> inside"]


@pytest.fixture(scope="session")
def tiny_untied_model_dir(tmp_path_factory, tiny_untied_model_dir) -> Path:
    """Base with positions for texts of 512 tokens, the default of converted folders."""
    folder = Path(shutil.copytree(tiny_untied_model_dir, tmp_path_factory.mktemp("base") / "qwen3"))
    change_json(folder / "config.json", max_position_embeddings=512)
    return folder


def save_projection(path: Path, width: int, dimension: int) -> nn.Linear:
    layer = nn.Linear(width, dimension)
    config = {"input_dim": width, "output_dim": dimension, "dtype": "torch.float32", "size": 1}
    state = {f"projection.{name}": tensor for name, tensor in layer.state_dict().items()}
    torch.save({"state_dict": state, "config": {**config, "pooling_mode": "linear"}}, path)
    return layer


def write_original(folder: Path, base: Path, kind: str, names: list[str] = NAMES) -> Path:
    """Write the output of the authors' training, with every trained number drawn at random."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.save_pretrained(folder)
    backbone = AutoModel.from_pretrained(base)
    backbone.resize_token_embeddings(len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids(names)
    if kind == "lora":
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], trainable_token_indices=ids)
    else:
        config = TrainableTokensConfig(token_indices=ids)
    model = get_peft_model(backbone, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3 if "lora" in name else 0.05)
    model.save_pretrained(folder / "encoder")
    backbone.config.save_pretrained(folder / "encoder")
    save_projection(folder / "reconstruction_mlp", 32, 32)
    save_projection(folder / "alignment_mlp", 32, TEACHER)
    layout = {"encoding_mode": f"last_{P}_tokens", "save_decoder": False}
    (folder / "encoder_decoder_config.json").write_text(json.dumps(layout))
    run = {"model_name_or_path": str(base), "special_tokens": names, "recon_loss_weight": 1.0}
    tagged = "torch_dtype: !!python/object/apply:torch.dtype [bfloat16]\nteacher: !!python/name:os.system ''\n"
    (folder / "run_config.yml").write_text(yaml.safe_dump(run) + tagged)
    return folder


@pytest.fixture(scope="module", params=["rows", "lora"])
def original(request, tmp_path_factory, tiny_untied_model_dir) -> Path:
    return write_original(tmp_path_factory.mktemp("original") / "model", tiny_untied_model_dir, request.param)


@pytest.fixture
def rows_only(tmp_path, tiny_untied_model_dir) -> Path:
    return write_original(tmp_path / "original", tiny_untied_model_dir, "rows")


@torch.inference_mode()
def through_peft(folder: Path, base: Path) -> tuple[np.ndarray, torch.Tensor]:
    """Return unit vectors ``S D`` and soft prompts ``S P H`` of the texts, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backbone = AutoModel.from_pretrained(base)
    backbone.resize_token_embeddings(len(tokenizer))
    model = PeftModel.from_pretrained(backbone, str(folder / "encoder")).eval()
    layers = []
    for name in ("reconstruction_mlp", "alignment_mlp"):
        stored = torch.load(folder / name, weights_only=True)
        layer = nn.Linear(stored["config"]["input_dim"], stored["config"]["output_dim"])
        layer.load_state_dict({key.removeprefix("projection."): one for key, one in stored["state_dict"].items()})
        layers.append(layer)
    vectors, prompts = [], []
    for text in TEXTS:
        # The authors' tokenizer would read a name inside a text as the token; here it is text.
        ids = tokenizer(text, split_special_tokens=True).input_ids + tokenizer.convert_tokens_to_ids(NAMES)
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0, -P:]
        prompts.append(layers[0](hidden))
        vectors.append(layers[1](prompts[-1]).mean(dim=0))
    return nn.functional.normalize(torch.stack(vectors)).numpy(), torch.stack(prompts)


def test_vectors_and_texts_are_those_of_the_original(original, tiny_untied_model_dir, tmp_path):
    convert(original, tmp_path / "ours")
    encoder = open_encoder(tmp_path / "ours", dtype="fp32", pack_tokens=100)
    expected, prompts = through_peft(original, tiny_untied_model_dir)
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), TEACHER)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert np.abs(expected - expected[0]).max() > 0.05
    decoder = AutoModelForCausalLM.from_pretrained(tiny_untied_model_dir)
    said = []
    for one in prompts:  # the base as it is, one text at a time
        mask = torch.ones(1, P, dtype=torch.long)
        ends = [encoder.backend.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
        more = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": ends, "pad_token_id": ends[0]}
        (ids,) = decoder.generate(inputs_embeds=one[None], attention_mask=mask, **more).tolist()
        said.append(encoder.backend.decode(ids, skip_special_tokens=True))
    theirs = SentenceTransformer(str(tmp_path / "ours"), trust_remote_code=True, device="cpu")
    assert (theirs.encode(TEXTS) * expected).sum(axis=1).min() > 0.9999
    ours = [one.decoded for one in Decoder(encoder, max_new_tokens=8).texts(TEXTS)]
    assert ours == said
    assert len(set(said)) > 1
    # After decoding the adapter is in the encoder again.
    np.testing.assert_allclose(encoder.encode(TEXTS), vectors, atol=1e-6)


@pytest.mark.parametrize(
    ("added", "end", "stops"),
    [
        # As Qwen, where the authors' `<|end_of_text|>` is no token.
        ([], "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
        # As Llama: answers were trained to end in it, though the tokenizer's own end is `<|eot_id|>`.
        (["<|end_of_text|>"], "<|end_of_text|>", ["<|end_of_text|>", "<|im_end|>", "<|endoftext|>"]),
    ],
)
def test_answers_end_where_the_originals_generation_stops(
    tmp_path, tiny_untied_model_dir, monkeypatch, added, end, stops
):
    base = Path(shutil.copytree(tiny_untied_model_dir, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(base)
    convert(write_original(tmp_path / "original", base, "rows"), tmp_path / "ours")
    about = json.loads((tmp_path / "ours/anchor.json").read_text())
    assert about["template"]["end"] == end
    ids = tokenizer.convert_tokens_to_ids(stops)
    assert (about["end_token_id"], about["stop_token_ids"]) == (ids[0], ids)
    decoder = Decoder(open_encoder(tmp_path / "ours", dtype="fp32"))
    river, sea = (tokenizer(word, add_special_tokens=False).input_ids for word in ("river", "sea"))
    rows = [[*river, stop, *sea] for stop in ids]
    monkeypatch.setattr("eval.decode.generate_from_prefixes", lambda *_, **__: rows)
    assert decoder.prefixes(torch.zeros(1, P, 32)) == ["river"] * len(ids)


def test_texts_longer_than_the_bases_positions_are_refused(rows_only, tmp_path, tiny_untied_model_dir):
    with pytest.raises(DataError) as error:
        convert(rows_only, tmp_path / "ours", max_tokens=513)
    assert str(error.value) == (
        f"--max-tokens is 513, but {tiny_untied_model_dir} has 512 positions (max_position_embeddings); give texts at "
        "most 512 tokens"
    )
    assert not (tmp_path / "ours").exists()


def test_the_folder_says_what_it_came_from(rows_only, tmp_path, tiny_untied_model_dir):
    main(["convert", str(rows_only), "--output", str(tmp_path / "ours"), "--max-tokens", "20"])
    about = json.loads((tmp_path / "ours/anchor.json").read_text())
    assert about["converted"]["from"] == str(rows_only)
    assert about["converted"]["run_config"]["torch_dtype"] == ["bfloat16"]
    assert about["base"]["path"] == str(tiny_untied_model_dir)
    assert about["special_tokens"]["count"] == P
    assert about["template"]["end"] == "<|im_end|>"
    assert about["prompts"]["query"] == "Generate a passage that best answers this question: "
    said = read_description(tmp_path / "ours")
    assert Description(said.base, said.fingerprint, P, about["anchor_token_id"] - P + 1, TEACHER) == said
    assert said.to_json().items() <= about.items()
    readme = (tmp_path / "ours/README.md").read_text()
    assert f"over `{tiny_untied_model_dir}`, whose weights are not in this folder; converted from `original`." in readme
    assert "documents 'Summarize the following passage: '" in readme
    encoder = open_encoder(tmp_path / "ours", dtype="fp32")
    tokens = encoder.backend.encode(" word " * 50).tokens
    assert len(tokens) == 20
    assert tokens[-P:] == NAMES


def refused_output(capsys, original: Path, output: Path, *options: str) -> str:
    """Return the error line after the output's name; check that no file near the output has changed."""
    around = original.parent
    before = {file: file.read_bytes() for file in around.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(original), "--output", str(output), *options])
    assert stop.value.code == 2
    assert {file: file.read_bytes() for file in around.rglob("*") if file.is_file()} == before
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {output}: ")
    return line.removeprefix(f"error: {output}: ")


def test_only_a_folder_that_convert_made_is_replaced(rows_only, tmp_path, tiny_untied_model_dir, capsys):
    base = shutil.copytree(tiny_untied_model_dir, tmp_path / "bases/base")
    options = ("--base", str(base), "--overwrite")
    for what, path in (("model", rows_only), ("base", base)):
        overlaps = f"is, holds or lies in the {what} {path}; choose another --output"
        for output in (path, path.parent, path / "ours", path / "x" / ".."):
            assert refused_output(capsys, rows_only, output, *options) in (
                overlaps,
                f"is, holds or lies in the model {rows_only}; choose another --output",  # above both
            )
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("the only copy")
    not_made = "not made by `eval convert`, so it is not overwritten; choose another --output"
    assert refused_output(capsys, rows_only, foreign, *options) == not_made
    (foreign / "anchor.json").write_text('{"objective": "self_supervised"}')
    assert refused_output(capsys, rows_only, foreign, *options) == not_made
    thesis = foreign / "thesis.txt"
    assert refused_output(capsys, rows_only, thesis, *options) == "not a folder; choose another --output"
    assert refused_output(capsys, rows_only, thesis / "ours", *options) == (
        "no folder can be made: File exists; choose another --output"
    )
    output, neighbour = tmp_path / "new/ours", tmp_path / "new/ours.tmp"
    neighbour.mkdir(parents=True)
    main(["convert", str(rows_only), "--output", str(output), "--base", str(base)])
    exists = "exists; choose another --output or add --overwrite"
    assert refused_output(capsys, rows_only, output, "--base", str(base)) == exists
    (output / "from_before").touch()
    main(["convert", str(rows_only), "--output", str(output), *options])
    assert (output / "anchor.json").is_file()
    assert not (output / "from_before").exists()
    assert sorted((tmp_path / "new").iterdir()) == [output, neighbour]


def test_the_folders_own_module_refuses_another_base(rows_only, tmp_path, tiny_untied_model_dir, caplog):
    convert(rows_only, tmp_path / "ours")

    def load(base: Path, **options) -> SentenceTransformer:
        more = {"base": str(base), **options}
        return SentenceTransformer(str(tmp_path / "ours"), trust_remote_code=True, device="cpu", model_kwargs=more)

    for dtype in ("float32", "bfloat16"):
        assert load(tiny_untied_model_dir, dtype=dtype)[0].base.dtype == getattr(torch, dtype)
    assert "is not checked" not in caplog.text
    other = AutoModelForCausalLM.from_pretrained(tiny_untied_model_dir)
    for name in ("norm.weight", "embed_tokens.weight", "layers.1.self_attn.q_proj.weight"):
        before = other.base_model.get_parameter(name).detach().clone()
        other.base_model.get_parameter(name).data.add_(0.01)
        other.save_pretrained(tmp_path / name)
        other.base_model.get_parameter(name).data.copy_(before)
        with pytest.raises(
            ValueError, match=r"not the base of .*: fingerprint \w{16}, expected \w{16}; give that model"
        ):
            load(tmp_path / name)
    # Rounded to float16, the right base has another fingerprint too.
    load(tiny_untied_model_dir, dtype="float16")
    assert f"{tiny_untied_model_dir}: loaded as torch.float16, so whether it is the base of " in caplog.text


@pytest.mark.parametrize("name", ["<|compressed_{}|>", "<|anchor_{}|>"])
def test_no_token_is_added_beside_the_originals_own(tmp_path, tiny_untied_model_dir, name):
    names = [name.format(i) for i in range(P)]
    original = write_original(tmp_path / "original", tiny_untied_model_dir, "rows", names)
    convert(original, tmp_path / "ours")
    theirs, ours = (AutoTokenizer.from_pretrained(place) for place in (original, tmp_path / "ours"))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours("river").input_ids[-P:] == theirs.convert_tokens_to_ids(names)
    assert not set(names) & set(ours.tokenize(f"a river {names[0]}"))


def test_a_limit_that_leaves_no_room_for_text_is_refused(rows_only, tmp_path, capsys):
    def message(limit: int) -> str:
        return f"--max-tokens ({limit}) leaves no room for text: the template takes {P} tokens"

    for limit in (-1, 0, P - 1, P):
        with pytest.raises(ConfigError) as error:
            convert(rows_only, tmp_path / "ours", max_tokens=limit)
        assert str(error.value) == message(limit)
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(rows_only), "--output", str(tmp_path / "ours"), "--max-tokens", str(P)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message(P)}"
    convert(rows_only, tmp_path / "ours", max_tokens=P + 1)
    encoder = open_encoder(tmp_path / "ours", dtype="fp32")
    assert [len(encoder.backend.encode(text).ids) for text in ("river", "castle and river")] == [P + 1] * 2
    assert np.abs(np.diff(encoder.encode(["river", "castle"]), axis=0)).max() > 1e-3


class Evil:
    """Object that runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_pickle_that_would_run_code_is_refused(rows_only, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (rows_only / "alignment_mlp").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError) as error:
        convert(rows_only, tmp_path / "ours")
    assert str(error.value).startswith(f"{rows_only / 'alignment_mlp'}: not readable without running code: ")
    assert "\n" not in str(error.value)
    torch.save({"state_dict": Evil(), "config": {}}, rows_only / "alignment_mlp")
    with pytest.raises(ModelError, match="not readable without running code"):
        convert(rows_only, tmp_path / "ours")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "ours").exists()


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_projection(file: Path, **changes) -> None:
    stored = torch.load(file, weights_only=True)
    torch.save({**stored, "config": {**stored["config"], **changes}}, file)


def change_state(file: Path, part: str, value: object) -> None:
    stored = torch.load(file, weights_only=True)
    torch.save({**stored, "state_dict": {**stored["state_dict"], f"projection.{part}": value}}, file)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "alignment_mlp").unlink(), ": no alignment_mlp; expected a model folder as LLM2Vec-Gen's"),
        (
            lambda f: change_json(f / "encoder_decoder_config.json", save_decoder=True),
            "/encoder_decoder_config.json: save_decoder is true; a folder with a decoder of its own is not supported",
        ),
        (
            lambda f: change_json(f / "encoder_decoder_config.json", encoding_mode="last_10_tokens"),
            "encoding_mode is 'last_10_tokens', expected 'last_3_tokens' for the 3 special tokens of run_config.yml",
        ),
        (
            lambda f: change_json(f / "encoder/adapter_config.json", token_indices=[400, 401]),
            "/encoder/adapter_config.json: trained tokens are [400, 401], expected 3 consecutive ids",
        ),
        (
            lambda f: change_json(f / "encoder/adapter_config.json", peft_type="PREFIX_TUNING"),
            "peft_type is 'PREFIX_TUNING'; supported are TRAINABLE_TOKENS and LORA",
        ),
        (
            lambda f: change_json(f / "encoder/config.json", hidden_size=64),
            "trained rows are 3 x 32, expected 3 x 64 by run_config.yml and encoder/config.json",
        ),
        (
            lambda f: change_projection(f / "reconstruction_mlp", size=3),
            "/reconstruction_mlp: size is 3, a projection for each special token; only one is supported",
        ),
        (
            lambda f: save_projection(f / "alignment_mlp", 16, TEACHER),
            "/alignment_mlp: holds projection.weight 24 x 16, projection.bias 24; expected projection.weight N x 32",
        ),
        (
            lambda f: change_state(f / "alignment_mlp", "bias", 24),
            "/alignment_mlp: holds projection.weight 24 x 32, projection.bias int; expected projection.weight N x 32",
        ),
        (
            lambda f: change_state(f / "alignment_mlp", "weight", [1.0]),
            "holds projection.weight list, projection.bias 24",
        ),
        (
            lambda f: change_state(f / "alignment_mlp", "bias", torch.tensor(1.0)),
            "projection.bias one number; expected",
        ),
        (
            lambda f: change_json(f / "encoder/adapter_config.json", token_indices=["a", "b", "c"]),
            "/encoder/adapter_config.json: trained tokens are ['a', 'b', 'c'], expected 3 consecutive ids",
        ),
        (lambda f: (f / "encoder/config.json").write_text("[]"), "/encoder/config.json: expected an object"),
        (lambda f: (f / "run_config.yml").write_text("a: [1"), "/run_config.yml: not readable as YAML: "),
        (lambda f: (f / "run_config.yml").write_text("a: 1"), "special_tokens is None, expected a list of names"),
        (
            lambda f: (f / "encoder/adapter_model.safetensors").write_bytes(b"half"),
            "/encoder/adapter_model.safetensors: not readable: ",
        ),
    ],
)
def test_what_is_missing_or_of_another_size_is_one_line(rows_only, tmp_path, harm, message):
    harm(rows_only)
    with pytest.raises(ModelError) as error:
        convert(rows_only, tmp_path / "ours")
    assert str(error.value).startswith(str(rows_only))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_base_that_is_missing_or_another_one_is_refused(
    rows_only, tmp_path, tiny_model_dir, tiny_untied_model_dir, capsys
):
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(rows_only), "--output", str(tmp_path / "ours"), "--base", nowhere])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {rows_only}: needs its base model, but {nowhere}: no such model folder (hub names are looked up only "
        "when HF_HUB_OFFLINE is not 1); say where it lies by --base PATH"
    )
    with pytest.raises(ModelError) as error:
        convert(rows_only, tmp_path / "ours", base=str(tiny_model_dir))
    assert str(error.value) == f"{tiny_model_dir}: not the base of {rows_only}: model_type is llama, expected qwen3"
    other = AutoModelForCausalLM.from_pretrained(tiny_untied_model_dir)
    other.get_input_embeddings().weight.data[5] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"not the base of .*: the input embeddings in encoder/ are others"):
        convert(rows_only, tmp_path / "ours", base=str(tmp_path / "other"))
