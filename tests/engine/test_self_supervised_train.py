"""Invariants: of a run only special tokens and projections (and adapters, if asked for) are trained, the base stays bit
for bit; two ranks under ZeRO-3 equal one process; resuming equals never having stopped, also on another number of
ranks; a checkpoint holds trained parameters alone; sentence-transformers gets the engine's vectors from the exported
folder, with either padding side; what does not fit is refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file
from taught import DIMENSION, TEMPLATE, TOKENS, teach_at_random
from test_train import losses, train_ranks, write_recipe

from anchor.config.load import load_recipe
from anchor.config.pack_recipe import PackRecipe
from anchor.config.train_recipe import TrainRecipe
from anchor.data.batches import to_tensors
from anchor.data.index import read_index
from anchor.data.shards import Pack, ShardReader
from anchor.engine.deepspeed import whole
from anchor.engine.plan import make_plan
from anchor.errors import ModelError, ShardError
from anchor.estimate.memory import state_bytes
from anchor.estimate.model_shape import shape_of, special_tokens_shape
from anchor.estimate.setting import setting_of
from anchor.model_folder.description import base_fingerprint
from anchor.model_folder.special_tokens import load_special_tokens, load_special_tokens_embedder
from anchor.models.backbone import load_causal_lm, meta_model, read_config
from anchor.objectives.self_supervised import new_special_tokens

PAPER = {"kind": "self_supervised", "alignment_weight": 1.0, "reconstruction_weight": 1.0}
FROZEN = {"kind": "frozen"}
LORA = {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.1}
COUNT = TOKENS * 32 + 32**2 + 32 + 32 * DIMENSION + DIMENSION
SHAPE = {"pairs": 16, "pack_multiple": 2, "pack_tokens": 1024}


@pytest.fixture(scope="module")
def shards(make_shards):
    """Training shards and held-out shards."""
    return tuple(teach_at_random(make_shards(**SHAPE, num_rows=n, template=TEMPLATE)) for n in (80, 48))


def case_of(name: str, shards, tied: Path, untied: Path) -> tuple[int, Path, dict]:
    """Return ranks, model and changes of the recipe."""
    evaluation = {"shards": str(shards[1]), "every_steps": 3, "max_batches": 2}
    joint = {**PAPER, "contrastive": {"weight": 0.3, "temperature": 0.1}}
    adapted = {"objective": joint, "backbone__trained": LORA, "backbone__gradient_checkpointing": True}
    return {
        "one": (1, tied, {"evaluation": evaluation}),
        "two": (2, tied, {"evaluation": evaluation}),
        "lora": (2, untied, {"evaluation": evaluation, **adapted}),
        "untrained": (1, tied, {"optim__total_steps": 0}),
        "bf16": (1, untied, {"engine__dtype": "bf16", "optim__total_steps": 2}),
    }[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_dir, tiny_untied_model_dir, shards) -> Callable[[str], Path]:
    """``runs(name)`` returns the folder of a run, trained on first use."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            world_size, model, changes = case_of(name, shards, tiny_model_dir, tiny_untied_model_dir)
            defaults = {"objective": PAPER, "backbone__trained": FROZEN}
            recipe = write_recipe(tmp_path_factory.mktemp(name), model, shards[0], **defaults | changes)
            run_distributed(train_ranks, world_size, recipe, False)
            done[name] = recipe.parent / "run"
        return done[name]

    return run


@pytest.mark.slow
def test_two_ranks_under_zero_3_equal_one_process(runs):
    one, two = (losses(runs(name)) for name in ("one", "two"))
    assert len(one) == 6
    assert one[-1] < one[0]
    assert one == pytest.approx(two, rel=1e-5)
    a, b = (load_file(runs(name) / "export/special_tokens.safetensors") for name in ("one", "two"))
    assert all(float((a[key] - b[key]).norm() / b[key].norm()) < 1e-4 for key in b)


def test_every_trained_parameter_moves(runs):
    trained, before = (load_special_tokens(runs(name) / "export") for name in ("two", "untrained"))
    assert sum(p.numel() for p in trained.parameters()) == COUNT
    for name, parameter in trained.named_parameters():
        assert float((parameter - before.state_dict()[name]).detach().norm()) > 0, name


def engine_after_three_steps(ranks, recipe_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, int], int]:
    """Return frozen parameters, bytes of this rank by name as :func:`state_bytes`, and a count of the trained ones."""
    from anchor.engine.build import load_engine
    from anchor.engine.step import train_step

    plan = make_plan(load_recipe(recipe_path, TrainRecipe), "x.yaml", ranks.world_size)
    engine = load_engine(plan, ranks, universal=False)
    for step in range(3):
        train_step(engine, plan.reader.read(step), step=step, seed=0, lr=1e-2)
    inner = engine._engine.optimizer
    moments = [t for s in inner.optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.dim()]
    held = {
        "weights": sum(p.ds_tensor.nbytes for p in engine.objective.parameters()),
        "optimiser": sum(t.nbytes for t in moments),
        "master": sum(t.nbytes for t in inner.fp32_partitioned_groups_flat),
        "gradients": inner.grad_partitions_flat_buffer.nbytes,
    }
    causal_lm = engine.objective.supervisor.embedder.embedder.causal_lm
    frozen = {n: engine.gathered(p) for n, p in causal_lm.named_parameters()}
    return frozen, held, engine.num_parameters(trained=True)


def test_the_base_stays_bit_for_bit_and_costs_neither_optimiser_nor_gradients(runs, tiny_model_dir):
    recipe = runs("two").parent / "recipe.yaml"
    frozen, held, trained = run_distributed(engine_after_three_steps, 2, recipe)[0]
    assert trained == COUNT
    base = load_causal_lm(str(tiny_model_dir), torch.float32, "eager").state_dict()
    assert len(frozen) == 20
    assert all(torch.equal(tensor, base[name]) for name, tensor in frozen.items())
    loaded = load_recipe(recipe, TrainRecipe)
    index = read_index(loaded.data.shards)
    packing = PackRecipe.model_validate(index.recipe)
    shape = special_tokens_shape(shape_of(meta_model(loaded.backbone)), loaded, packing, index.teacher)
    assert shape.count(trained=True) == COUNT
    assert held == state_bytes(shape, setting_of(loaded, {"stage": 3}, num_ranks=2))


@pytest.mark.slow
def test_with_adapters_they_alone_are_trained_beside_the_special_tokens(runs):
    adapter = load_file(runs("lora") / "export/adapter/adapter_model.safetensors")
    assert len(adapter) == 28
    assert all(float(t.norm()) > 0 for n, t in adapter.items() if "lora_B" in n)
    assert not list((runs("lora") / "export").glob("model*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "lora"])
def test_resuming_equals_never_having_stopped(runs, name):
    run = runs(name)
    whole, weights = losses(run), load_file(run / "export/special_tokens.safetensors")
    shutil.rmtree(run / "checkpoints/step-00000006")
    shutil.rmtree(run / "export")
    run_distributed(train_ranks, 2, run.parent / "recipe.yaml", True)
    assert losses(run) == whole
    again = load_file(run / "export/special_tokens.safetensors")
    assert set(again) == set(weights)
    assert all(torch.equal(again[key], weights[key]) for key in weights)


@pytest.mark.slow
def test_resuming_on_another_number_of_ranks_goes_on_alike(runs, tmp_path):
    run = tmp_path / "case/run"
    shutil.copytree(runs("two").parent, run.parent)
    whole = losses(run)
    shutil.rmtree(run / "checkpoints/step-00000006")
    recipe = run.parent / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(runs("two")), str(run)))
    run_distributed(train_ranks, 1, recipe, True)
    assert losses(run)[:3] == whole[:3]
    assert losses(run) == pytest.approx(whole, rel=1e-5)


def test_a_checkpoint_holds_trained_parameters_alone(runs):
    folder = runs("two") / "checkpoints/step-00000006/engine"
    names = set()
    for file in folder.glob("*model_states.pt"):
        names |= set(torch.load(file, weights_only=False)["param_shapes"][0])
    assert {name.rpartition("special.")[2] for name in names} == {
        *("rows", "reconstruction.weight", "alignment.weight"),
    } | {name.rpartition("special.")[2] for name in names if name.endswith("bias")}
    assert not [name for name in names if "causal_lm" in name]
    assert sum(f.stat().st_size for f in folder.glob("*optim_states.pt")) < 12 * COUNT + 2 * 20_000


def held_out(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_held_out_loss_and_cosine_do_not_depend_on_the_ranks(runs):
    one, two = held_out(runs("one")), held_out(runs("two"))
    assert [row["step"] for row in one] == [0, 3, 6]
    assert {
        "held_out/loss_alignment_mean_square",
        "held_out/loss_reconstruction_nats",
        "held_out/embedding_teacher_cosine",
        "held_out/ndcg_at_10",
    } <= set(one[0])
    assert one[0]["held_out/loss_total_nats"] > one[-1]["held_out/loss_total_nats"]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


TEXTS = ["short", "a longer text about a river and a castle " * 6, "<|im_end|> forged <|anchor_0|>", "日本 🙂", "x"]


def our_vectors(folder: Path, texts: list[str]) -> torch.Tensor:
    """Compute vectors with the training code: packs of token ids from the exported tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [np.asarray(tokenizer(t, truncation=True)["input_ids"], dtype=np.int32) for t in texts]
    assert max(map(len, ids)) == json.loads((folder / "anchor.json").read_text())["max_tokens"]
    lengths, zeros = np.asarray([len(i) for i in ids], dtype=np.int32), np.zeros(len(ids), dtype=np.int32)
    pack = Pack(np.concatenate(ids), lengths, zeros, zeros, zeros.astype(np.int8), zeros, zeros)
    with torch.no_grad():
        embedder = load_special_tokens_embedder(folder, torch.float32, "anchor_segments").eval()
        return embedder(to_tensors(pack, torch.device("cpu")))


NAMES = ["two", "untrained", pytest.param("lora", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_sentence_transformers_reads_the_exported_folder(runs, name, side, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = runs(name) / "export"
    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    model[0].tokenizer.padding_side = side
    theirs = torch.from_numpy(model.encode(TEXTS, batch_size=len(TEXTS)))
    assert theirs.shape == (len(TEXTS), DIMENSION) == (len(TEXTS), model.get_embedding_dimension())
    assert model.prompts["query"] == "Answer it: "
    assert float((our_vectors(folder, TEXTS) * theirs).sum(dim=1).min()) > 0.9999
    assert float((theirs - theirs[0]).abs().max()) > 0.001
    model.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu", trust_remote_code=True).encode(TEXTS)
    assert np.abs(again - theirs.numpy()).max() < 1e-5


@pytest.mark.parametrize("name", ["two", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_exported_folder_is_what_the_engine_held(runs, shards, name):
    """The exported folder alone reproduces the cosine that the engine measured after its last step."""
    folder, reader = runs(name) / "export", ShardReader(shards[1])
    embedder = load_special_tokens_embedder(folder, torch.float32, "anchor_segments").eval()
    means = []
    for number in range(2):
        cosines = []
        for pack in reader.read(number).packs:
            with torch.no_grad():
                vectors = embedder(to_tensors(pack.select(pack.roles == 0), torch.device("cpu")))
            teacher = torch.nn.functional.normalize(torch.from_numpy(pack.teacher.astype("float32")), dim=1)
            cosines.append((vectors * teacher).sum(dim=1))
        means.append(float(torch.cat(cosines).mean()))
    last = held_out(runs(name))[-1]["held_out/embedding_teacher_cosine"]
    assert last == pytest.approx(np.mean(means), abs=1e-5)
    assert abs(last - held_out(runs(name))[0]["held_out/embedding_teacher_cosine"]) > 1e-3


def test_anchor_json_says_what_belongs_to_the_special_tokens(runs, shards, tiny_model_dir):
    folder = runs("two") / "export"
    about, index = json.loads((folder / "anchor.json").read_text()), read_index(shards[0])
    base = load_causal_lm(str(tiny_model_dir), torch.float32, "eager")
    assert about["base"] == {"path": str(tiny_model_dir), "fingerprint": base_fingerprint(base)}
    assert about["special_tokens"] == {"count": TOKENS, "first_id": 400}
    assert (about["end_token_id"], about["dimension"], about["teacher"]) == (2, DIMENSION, index.teacher)
    assert load_special_tokens(folder).first_id == 400


@pytest.mark.slow
def test_the_fingerprint_of_a_base_trained_over_in_bfloat16_is_that_of_the_base(runs):
    untied = json.loads((runs("bf16") / "export/anchor.json").read_text())
    assert untied["base"]["fingerprint"] == base_fingerprint(
        load_causal_lm(untied["base"]["path"], torch.float32, "eager")
    )
    assert read_config(untied["base"]["path"]).vocab_size == 400


def test_a_folder_of_special_tokens_is_no_base(runs):
    folder = runs("two") / "export"
    with pytest.raises(ModelError, match=r"holds special tokens for .*, not a model of its own; give that model"):
        read_config(str(folder))


def error_of(folder: Path, model: Path, data: Path, **changes) -> str:
    recipe = write_recipe(folder, model, data, **{"objective": PAPER, "backbone__trained": FROZEN} | changes)
    with pytest.raises(ShardError) as error:
        make_plan(load_recipe(recipe, TrainRecipe), "x.yaml", 1)
    return str(error.value)


def test_shards_that_do_not_fit_are_refused(tmp_path, tiny_model_dir, make_shards, shards):
    plain, untaught = make_shards(**SHAPE), make_shards(**SHAPE, template=TEMPLATE)
    assert error_of(tmp_path, tiny_model_dir, plain) == (
        f"x.yaml: objective.kind is self_supervised, but {plain} was packed without special tokens; pack with "
        "template.kind: special_tokens"
    )
    assert error_of(tmp_path, tiny_model_dir, untaught) == (
        f"x.yaml: objective.kind is self_supervised, but {untaught} has no teacher's embeddings; run "
        f"`python -m data_prep teach {untaught} --output NEW` and set data.shards to NEW"
    )
    other = {"objective": {"kind": "contrastive", "temperature": 0.1}, "backbone__trained": {"kind": "full"}}
    assert error_of(tmp_path, tiny_model_dir, shards[0], **other) == (
        f"x.yaml: objective.kind is contrastive, but {shards[0]} was packed with 3 special tokens, which only "
        "self_supervised trains; pack with a template of another kind"
    )
    wider = teach_at_random(untaught, DIMENSION + 1)
    for held, words in ((wider, "dimension is 13 there, 12 in data.shards"), (untaught, "has no teacher's embeddings")):
        evaluation = {"shards": str(held), "every_steps": 1}
        message = error_of(tmp_path, tiny_model_dir, shards[0], evaluation=evaluation)
        assert message.startswith(f"x.yaml: evaluation.shards ({held}) ")
        assert words in message


def test_an_index_that_counts_other_special_tokens_is_refused(tmp_path, tiny_model_dir, shards):
    copy = Path(shutil.copytree(shards[0], tmp_path / "shards"))
    stored = json.loads((copy / "index.json").read_text())
    stored["template"]["special_tokens"] = TOKENS - 1
    (copy / "index.json").write_text(json.dumps(stored))
    assert error_of(tmp_path, tiny_model_dir, copy) == (
        f"{copy}/tokenizer/tokenizer.json: its special tokens are not the 2 from id 401 on that index.json says; "
        "pack again"
    )


def test_new_special_tokens_are_the_same_partitioned_or_not(runs, tiny_model_dir):
    """The untrained export of a ZeRO-3 engine holds what one process computes from the whole matrix."""
    model = load_causal_lm(str(tiny_model_dir), torch.float32, "eager")
    wanted = new_special_tokens(model, TOKENS, DIMENSION, 400, 0, whole).state_dict()
    found = load_file(runs("untrained") / "export/special_tokens.safetensors")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
