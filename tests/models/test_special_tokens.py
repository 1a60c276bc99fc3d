"""Invariants: packed soft prompts and embeddings equal plain transformers', one text at a time; the base's embedding
matrix is neither copied nor given a gradient; rows and projections are a function of the seed alone; a stored folder
comes back bit for bit, and one that does not fit is refused by name; another base is recognised."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import plain_hidden, plain_model, relative
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anchor.data.batches import to_tensors
from anchor.data.shards import Pack
from anchor.errors import ModelError
from anchor.model_folder.description import base_fingerprint, check_base
from anchor.model_folder.special_tokens import load_special_tokens, load_special_tokens_embedder
from anchor.models.backbone import load_causal_lm
from anchor.models.special_tokens import WEIGHTS_NAME, SpecialTokens, SpecialTokensEmbedder

P, D = 3, 12


def new_special(model, seed: int = 0, first_id: int = 390) -> SpecialTokens:
    special = SpecialTokens(P, 32, D, first_id)
    special.initialise(model.get_input_embeddings().weight, seed)
    return special


def text_pack(lengths: list[int], first_id: int) -> Pack:
    """Return a pack of texts of random tokens, each followed by the P special tokens."""
    draw = np.random.default_rng(0)
    texts = [np.r_[draw.integers(3, first_id, n), first_id + np.arange(P)] for n in lengths]
    total = np.asarray([len(t) for t in texts], dtype=np.int32)
    zeros = np.zeros(len(texts), dtype=np.int64)
    return Pack(
        np.concatenate(texts).astype(np.int32),
        total,
        zeros.astype(np.int32),
        total - P,
        zeros.astype(np.int8),
        zeros,
        zeros,
    )


@pytest.mark.parametrize("model_dir", ["tiny_model_dir", "tiny_untied_model_dir"])
def test_packed_embeddings_equal_one_text_at_a_time(model_dir, request):
    folder = request.getfixturevalue(model_dir)
    model = load_causal_lm(str(folder), torch.float64, "anchor_segments").eval()
    embedder = SpecialTokensEmbedder(model, new_special(model).double())
    pack = text_pack([5, 1, 9], embedder.special.first_id)
    prompts, embeddings = embedder.encode(to_tensors(pack, torch.device("cpu")))
    # By hand: a base whose matrix does hold the rows.
    plain, special = plain_model(folder, torch.float64), embedder.special
    plain.get_input_embeddings().weight.data[390 : 390 + P] = special.rows.data
    starts = np.r_[0, pack.segment_lengths.cumsum()]
    for s in range(3):
        ids = torch.from_numpy(pack.input_ids[starts[s] : starts[s + 1]].astype("int64"))
        states = plain_hidden(plain, ids)[-P:]
        wanted = torch.stack([special.reconstruction(h) for h in states])
        assert relative(prompts[s].detach(), wanted.detach()) < 1e-6
        embedding = torch.stack([special.alignment(p) for p in wanted]).mean(dim=0)
        assert relative(embeddings[s].detach(), embedding.detach()) < 1e-6


class NewShapes(TorchDispatchMode):
    """Shapes of all tensors that operations create, backward included, except views of ``known``."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.memory = known.untyped_storage().data_ptr()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        new = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        self.shapes += [t.shape for t in new if t.untyped_storage().data_ptr() != self.memory]
        return made


def test_the_embedding_matrix_gets_no_gradient_and_no_copy(tiny_model_dir):
    model = load_causal_lm(str(tiny_model_dir), torch.float32, "anchor_segments").requires_grad_(False)
    embedder = SpecialTokensEmbedder(model, new_special(model))
    matrix, first_id = model.get_input_embeddings().weight, embedder.special.first_id
    with NewShapes(matrix) as made:
        prompts, embeddings = embedder.encode(to_tensors(text_pack([4, 6], first_id), torch.device("cpu")))
        (prompts.sum() + embeddings.square().sum()).backward()
    assert torch.Size([4 + 6 + 2 * P, 32]) in made.shapes
    assert [shape for shape in made.shapes if max(shape, default=0) >= first_id] == []
    assert [n for n, p in model.named_parameters() if p.grad is not None] == []
    assert all(float(p.grad.norm()) > 0 for p in embedder.special.parameters())


def test_the_start_is_a_function_of_the_seed_and_near_the_mean_of_the_embeddings(tiny_model_dir):
    model = load_causal_lm(str(tiny_model_dir), torch.float32, "anchor_segments")
    first, again, other = new_special(model), new_special(model), new_special(model, seed=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])
    known = model.get_input_embeddings().weight[:390]
    away = ((first.rows - known.mean(dim=0)) / known.std(dim=0)).detach()
    assert 0.05 < float(away.abs().mean()) < 0.12
    assert float((first.rows[0] - first.rows[1]).detach().norm()) > 0


@pytest.fixture
def folder(tmp_path, tiny_model_dir) -> Path:
    model = load_causal_lm(str(tiny_model_dir), torch.float32, "anchor_segments")
    about = {
        "objective": "self_supervised",
        "special_tokens": {"count": P, "first_id": 390},
        "dimension": D,
        "base": {"path": str(tiny_model_dir), "fingerprint": base_fingerprint(model)},
    }
    (tmp_path / "anchor.json").write_text(json.dumps(about))
    (tmp_path / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    save_file(dict(new_special(model).state_dict()), tmp_path / WEIGHTS_NAME)
    return tmp_path


def test_a_stored_folder_comes_back_bit_for_bit(folder, tiny_model_dir):
    special = load_special_tokens(folder)
    wanted = new_special(load_causal_lm(str(tiny_model_dir), torch.float32, "anchor_segments"))
    assert special.first_id == 390
    assert list(special.state_dict()) == list(wanted.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(special.parameters(), wanted.parameters(), strict=True))


def test_a_folder_that_does_not_fit_is_refused_by_name(folder):
    about = json.loads((folder / "anchor.json").read_text())
    (folder / "anchor.json").write_text(json.dumps(about | {"special_tokens": {"count": P + 1, "first_id": 390}}))
    with pytest.raises(ModelError) as error:
        load_special_tokens(folder)
    assert str(error.value) == (
        f"{folder / WEIGHTS_NAME}: rows is 3 x 32, expected 4 x 32 by anchor.json and config.json; export again"
    )
    (folder / WEIGHTS_NAME).write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match=r"missing or unreadable \(SafetensorError\); export again"):
        load_special_tokens(folder)
    (folder / "anchor.json").write_text(json.dumps({"objective": "contrastive"}))
    with pytest.raises(ModelError, match="names no special tokens; its objective is 'contrastive'"):
        load_special_tokens(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimension": None}, "dimension is None, expected a number, at least 1; export again"),
        ({"dimension": "12"}, "dimension is '12', expected a number, at least 1; export again"),
        ({"base": None}, "base.path is None, expected a text; export again"),
        ({"base": {"path": "x"}}, "base.fingerprint is None, expected a text; export again"),
        ({"special_tokens": [3]}, "special_tokens.count is None, expected a number, at least 1; export again"),
        ({"special_tokens": {"count": 0}}, "special_tokens.count is 0, expected a number, at least 1; export again"),
    ],
)
def test_an_anchor_json_that_lacks_something_is_one_line(folder, change, message):
    file = folder / "anchor.json"
    about = json.loads(file.read_text()) | change
    file.write_text(json.dumps({name: value for name, value in about.items() if value is not None}))
    for load in (load_special_tokens, lambda f: load_special_tokens_embedder(f, torch.float32, "anchor_segments")):
        with pytest.raises(ModelError) as error:
            load(folder)
        assert str(error.value) == f"{file}: {message}"


def test_a_base_with_a_broken_anchor_json_is_one_line(tmp_path, tiny_model_dir):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    for content, message in (
        ("{", "malformed JSON: Expecting property name"),
        ("[]", "expected an object"),
        ("\xff", "malformed JSON: 'utf-8' codec"),
    ):
        (base / "anchor.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(ModelError) as error:
            load_causal_lm(str(base), torch.float32, "anchor_segments")
        assert str(error.value).startswith(f"{base / 'anchor.json'}: {message}")
        assert "\n" not in str(error.value)
    (base / "anchor.json").write_text('{"base": "elsewhere"}')
    with pytest.raises(ModelError, match="holds special tokens for elsewhere, not a model of its own"):
        load_causal_lm(str(base), torch.float32, "anchor_segments")


def test_the_fingerprint_knows_another_base_and_does_not_depend_on_the_dtype(folder, tiny_model_dir):
    for dtype in (torch.float32, torch.bfloat16):
        check_base(load_causal_lm(str(tiny_model_dir), dtype, "anchor_segments"), "base", folder)
    # The smallest change that makes another base: an adapter merged into it.
    other = load_causal_lm(str(tiny_model_dir), torch.float32, "anchor_segments")
    other.get_parameter("model.layers.1.self_attn.q_proj.weight").data.add_(0.01)
    with pytest.raises(ModelError) as error:
        check_base(other, "elsewhere", folder)
    assert str(error.value).startswith(f"elsewhere: not the base of {folder}: fingerprint ")
    assert str(error.value).endswith(f" of {tiny_model_dir}; give that model")
