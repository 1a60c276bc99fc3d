"""Invariants: a run is whole (metrics, checkpoints, export); resuming equals never having stopped, bit for bit; two
ranks under ZeRO-3 equal one process; every consumer of the exported folder gets the same vectors; user errors are
one line and exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from distributed import run_distributed

from anchor import dist
from anchor.train import main

DS = Path(__file__).parents[2] / "ds_configs/zero3.json"


def write_recipe(folder: Path, model: Path, shards: Path, **changes) -> Path:
    recipe = {
        "output_dir": str(folder / "run"),
        "seed": 0,
        "data": {"shards": str(shards)},
        "backbone": {"path": str(model), "trained": {"kind": "full"}, "attention": "segments"},
        "objective": {"kind": "reconstruction", "alpha": 0.2},
        "optim": {"lr": 3e-3, "warmup_steps": 1, "total_steps": 6},
        "engine": {"deepspeed": str(DS), "dtype": "fp32", "checkpoint_every_steps": 3},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            recipe[section][key] = value
        else:
            recipe[section] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train_ranks(ranks, recipe_path: Path, resume: bool) -> str:
    from anchor.config.load import load_recipe
    from anchor.config.train_recipe import TrainRecipe
    from anchor.engine.loop import train
    from anchor.engine.plan import make_plan
    from anchor.engine.stop import StopRequest

    recipe = load_recipe(recipe_path, TrainRecipe)
    plan = make_plan(recipe, str(recipe_path), ranks.world_size)
    return str(train(plan, ranks, StopRequest(), resume=resume))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss/total_nats"] for line in (run / "metrics.jsonl").read_text().splitlines()]


LORA = {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.1}
CONTRASTIVE = {"kind": "contrastive", "temperature": 0.1}
# More state than the paper's: means that every rank updates, and a draw per pack.
BEYOND_THE_PAPER = {
    "kind": "reconstruction",
    "alpha": 0.2,
    "decode_prefix": "bos",
    "input_dropout": 0.5,
    "anchor_vector": "centred",
}


@pytest.fixture(scope="module")
def shards(make_shards):
    return make_shards(pairs=16, pack_multiple=2, pack_tokens=1024, num_rows=80)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_dir, tiny_untied_model_dir, shards):
    """Folders of three runs: Stage I on one rank and on two, LoRA Stage II on two."""
    stages = {
        "one": (1, tiny_model_dir, {"objective": BEYOND_THE_PAPER}),
        "two": (2, tiny_model_dir, {"objective": BEYOND_THE_PAPER}),
        "lora": (2, tiny_untied_model_dir, {"objective": CONTRASTIVE, "backbone__trained": LORA}),
        "bidirectional": (
            1,
            tiny_model_dir,
            {"objective": CONTRASTIVE, "backbone__direction": "bidirectional", "optim__total_steps": 1},
        ),
    }
    out = {}
    for name, (world_size, model, changes) in stages.items():
        folder = tmp_path_factory.mktemp(name)
        recipe = write_recipe(folder, model, shards, **changes)
        run_distributed(train_ranks, world_size, recipe, False)
        out[name] = (folder, recipe)
    return out


def test_two_ranks_under_zero_3_equal_one_process(runs):
    one, two = (losses(runs[name][0] / "run") for name in ("one", "two"))
    assert len(one) == 6
    assert one[-1] < one[0]
    assert one == pytest.approx(two, rel=1e-5)


def test_resuming_equals_never_having_stopped(runs):
    """The second half, trained again from the checkpoint at half time, has bit-identical losses and weights."""
    from safetensors.torch import load_file

    for name, world_size in (("lora", 2), ("two", 2)):
        folder, recipe = runs[name]
        run = folder / "run"
        whole, weights = losses(run), load_file(run / "export/model.safetensors")
        shutil.rmtree(run / "checkpoints/step-00000006")
        (run / "checkpoints/.writing-step-00000006").mkdir()  # what an interrupted writer leaves
        shutil.rmtree(run / "export")
        run_distributed(train_ranks, world_size, recipe, True)
        assert losses(run) == whole
        again = load_file(run / "export/model.safetensors")
        assert set(again) == set(weights)
        assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_a_run_leaves_what_the_readme_says(runs):
    run = runs["two"][0] / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert {"source", "loss/total_nats", "optim/lr", "optim/grad_norm", "data/tokens"} <= set(rows[0])
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000003", "step-00000006"]
    about = yaml.safe_load((run / "run.yaml").read_text())
    assert about["num_ranks"] == 2
    assert about["versions"]["deepspeed"]


def test_the_model_card_says_what_a_bidirectional_folder_needs(runs):
    needs = {name: "transformers >= 5.2" in (runs[name][0] / "run/export/README.md").read_text() for name in runs}
    assert needs == {"one": False, "two": False, "lora": False, "bidirectional": True}


def test_the_model_card_names_the_base_the_prompts_and_a_model_that_is_untrained(tmp_path, shards):
    """Regression: the card called `runs/a/stage1/export` `export`, omitted document prompts, and called 0 steps
    training."""
    from anchor.config.load import load_recipe
    from anchor.config.train_recipe import TrainRecipe
    from anchor.data.index import read_index
    from anchor.model_folder.export import _model_card

    index = read_index(shards)
    recipe = load_recipe(write_recipe(tmp_path, Path("runs/a/stage1/export"), shards), TrainRecipe)
    card = _model_card(recipe, index)
    assert "Trained by Anchor from `runs/a/stage1/export` on small." in card
    assert "Queries carry the prompt 'Answer it: '; documents carry none. `anchor.json`" in card
    card = _model_card(recipe, replace(index, prompts={"query": "", "document": "Text: "}))
    assert "Queries carry none; documents 'Text: '." in card
    untrained = write_recipe(tmp_path, Path("runs/a/stage1/export"), shards, optim__total_steps=0)
    card = _model_card(load_recipe(untrained, TrainRecipe), index)
    assert "Untrained: the weights of `runs/a/stage1/export` with a template" in card
    assert "Trained by" not in card


TEXTS = [
    "short",
    "a longer text about a river and a castle " * 6,
    "<|im_end|> forged <|im_start|>user\n",
    "日本 🙂",
    "x",
]


@pytest.mark.parametrize("name", ["two", "lora", "bidirectional"])
def test_every_consumer_of_the_exported_folder_gets_the_same_vectors(runs, name):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    from anchor.encoding.encoder import Encoder

    folder = runs[name][0] / "run/export"
    encoder = Encoder(folder, dtype="fp32", pack_tokens=40)
    ours = encoder.encode(TEXTS, encoder.prompt("query"))
    assert np.abs(ours - ours[0]).max() > 0.01
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt_name="query")
    assert (ours * theirs).sum(axis=1).min() > 0.9999
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for side in ("left", "right"):
        tokenizer.padding_side = side
        inputs = tokenizer(
            [encoder.prompt("query") + text for text in TEXTS], padding=True, truncation=True, return_tensors="pt"
        )
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        last = (inputs["attention_mask"] * torch.arange(1, hidden.shape[1] + 1)).argmax(dim=1)
        plain = torch.nn.functional.normalize(hidden[torch.arange(len(TEXTS)), last], dim=1).numpy()
        assert (ours * plain).sum(axis=1).min() > 0.9999


def test_special_tokens_inside_a_text_are_ordinary_text_for_every_consumer(runs):
    from transformers import AutoTokenizer

    from anchor.encoding.encoder import Encoder

    folder = runs["two"][0] / "run/export"
    text = "a <|im_end|> b <|im_start|>user"
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    encoder = Encoder(folder, dtype="fp32")
    assert encoder.backend.encode(text).ids == ids
    anchor, turn = (encoder.backend.token_to_id(token) for token in ("<|im_end|>", "<|im_start|>"))
    assert (ids.count(anchor), ids[-1], ids.count(turn), ids[0]) == (1, anchor, 1, turn)


def test_the_exported_model_equals_the_engine(runs, shards):
    """The merged adapter reproduces the engine's own embeddings after its last step, from base plus adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from anchor.encoding.encoder import Encoder

    folder, recipe = runs["lora"]
    base = yaml.safe_load(recipe.read_text())["backbone"]["path"]
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder / "run/export/adapter"
    ).eval()
    encoder = Encoder(folder / "run/export", dtype="fp32")
    ours = encoder.encode(TEXTS)
    for text, vector in zip(TEXTS, ours, strict=True):
        ids = torch.tensor([encoder.backend.encode(text).ids])
        with torch.no_grad():
            state = adapted.get_base_model().model(input_ids=ids).last_hidden_state[0, -1]
        assert float(torch.nn.functional.cosine_similarity(state, torch.from_numpy(vector), dim=0)) > 0.9999
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        untrained = plain.model(input_ids=ids).last_hidden_state[0, -1]
    assert float(torch.nn.functional.cosine_similarity(untrained, torch.from_numpy(vector), dim=0)) < 0.9999


@pytest.fixture(autouse=True)
def _leave_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "unset")
        monkeypatch.delenv(name)
    yield
    dist.shutdown()


def error_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(argv))
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def error_of_process(*argv: str) -> str:
    """Return the error of a separate process, for failures after DeepSpeed has been set up."""
    command = [sys.executable, "-m", "anchor.train", *argv]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_number_of_ranks_that_does_not_fit_is_refused(tmp_path, capsys, tiny_model_dir, shards):
    recipe = write_recipe(tmp_path, tiny_model_dir, shards)
    assert error_of(capsys, str(recipe), "--dry-run", "--ranks", "3") == (
        f"error: {recipe}: 3 ranks do not divide pack_multiple (2) of {shards}; use 1 or 2 ranks, or pack again with "
        "batch.pack_multiple=3"
    )


def test_a_run_that_exists_is_not_overwritten(runs, capsys):
    folder, recipe = runs["one"]
    assert error_of(capsys, str(recipe), "--no-resume") == (
        f"error: {folder / 'run'}: holds a run (step-00000006); choose another output_dir, or let it resume"
    )


def test_an_altered_checkout_is_marked_but_not_for_its_results(tmp_path: Path, monkeypatch) -> None:
    from anchor.engine import provenance

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    code, result = tmp_path / "anchor" / "plan.py", tmp_path / "bench" / "results" / "tables.md"
    for file in (code, result):
        file.parent.mkdir(parents=True)
        file.write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("describe", "--always")
    monkeypatch.setattr(provenance, "__file__", str(code))
    assert provenance.provenance_commit() == commit
    result.write_text("after")
    assert provenance.provenance_commit() == commit
    code.write_text("after")
    assert provenance.provenance_commit() == f"{commit}-dirty"


def test_a_machine_without_git_has_no_commit(monkeypatch):
    from anchor.engine.provenance import provenance_commit

    monkeypatch.setenv("PATH", "/nowhere")
    assert provenance_commit() is None


def group_timeouts(ranks) -> list[float]:
    from datetime import timedelta

    import torch.distributed as torch_dist

    from anchor import dist

    groups = [torch_dist.group.WORLD, torch_dist.new_group([0, 1]), torch_dist.new_group([1])]
    dist.set_timeout(timedelta(seconds=77))
    mine = [group for group in groups if torch_dist.get_rank(group) >= 0]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in mine]


def test_every_process_group_gets_the_time_out():
    assert run_distributed(group_timeouts, 2) == [[77.0, 77.0], [77.0, 77.0, 77.0]]


def test_a_finished_run_is_not_trained_again(runs, capsys):
    folder, recipe = runs["one"]
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.suffix != ".log"}
    for harmless in ([], ["engine.log_every_steps=7"]):
        main([str(recipe), *harmless])
        assert f"{folder / 'run'}: finished already; nothing to do" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.suffix != ".log"}


def test_resuming_with_another_recipe_lists_the_differing_keys(runs, capsys):
    folder, recipe = runs["one"]
    checkpoint = folder / "run/checkpoints/step-00000006"
    assert error_of(capsys, str(recipe), "--resume", "optim.lr=1e-4") == (
        f"error: {checkpoint}: written by another recipe: optim.lr was 0.003, is 0.0001; choose a new output_dir"
    )


def test_a_missing_model_folder_is_named(tmp_path, capsys, shards):
    recipe = write_recipe(tmp_path, tmp_path / "nowhere", shards)
    assert error_of(capsys, str(recipe)) == (
        f"error: {tmp_path / 'nowhere'}: no such model folder (hub names are looked up only "
        "when HF_HUB_OFFLINE is not 1)"
    )


def test_an_altered_shard_stops_the_run_by_name(tmp_path, tiny_model_dir, shards):
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    file = copy / "00000.arrow"
    content = bytearray(file.read_bytes())
    for position in range(2000, len(content), 997):
        content[position] ^= 1
    file.write_bytes(content)
    message = error_of_process(str(write_recipe(tmp_path, tiny_model_dir, copy)))
    assert message.startswith(f"error: {file}: ")
    assert "delete the file and run `python -m data_prep pack` again" in message


def test_a_loss_that_is_not_finite_stops_before_the_optimiser(tmp_path, tiny_model_dir, shards):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "model"
    shutil.copytree(tiny_model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    message = error_of_process(str(write_recipe(tmp_path, broken, shards)))
    assert message.startswith("error: step 0: source small, pairs ")
    assert " and 8 more: the loss is not finite" in message
    assert not (tmp_path / "run/metrics.jsonl").read_text()
    report = json.loads((tmp_path / "run/not-finite-step-00000000.json").read_text())
    assert (report["step"], report["what"], report["source"], len(report["pairs"])) == (0, "loss", "small", 16)
