"""Invariants: every shipped training recipe dry-runs, with its shards and with its pack recipe alone; the tables fit 80
columns and say what the JSON says; what does not fit, and what is missing, is said with what to do."""

import json
from pathlib import Path

import pytest

from anchor.train import main

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch/recipes").rglob("stage*.yaml"))
RECIPE = ROOT / "launch/recipes/quickstart/stage1.yaml"
PACK = RECIPE.parent / "pack.yaml"


def run(capsys, *argv: str) -> str:
    main([*argv, "--dry-run"])
    return capsys.readouterr().out


def error_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*argv, "--dry-run"])
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def shards(make_shards):
    return make_shards(pairs=16, pack_multiple=2, pack_tokens=1024, num_rows=80)


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # shipped recipes name ds_configs/ from here
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_recipe_dry_runs(recipe, capsys, tmp_path, tiny_model_dir, shards):
    changes = [f"backbone.path={tiny_model_dir}", f"data.shards={shards}"]
    out = run(capsys, str(recipe), *changes, "--ranks", "2", "--json", str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert max(len(line) for line in out.splitlines()) <= 80
    assert f"{report['model']['parameters']:,}" in out
    assert f"{report['model']['trained']:,}" in out
    assert out.count("fits: ") == 2
    assert report["memory"]["fits"]
    assert report["batch"]["pairs_per_step"] == 16
    assert 0 < report["batch"]["largest_sampled_pack_tokens"] <= 1024
    assert report["memory"]["peak_of_largest_sampled_pack"] <= report["memory"]["peak_bytes"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_recipe_dry_runs_before_its_data_is_packed(recipe, capsys, tmp_path, long_model_dir):
    changes = [f"backbone.path={long_model_dir}", f"data.shards={tmp_path / 'none'}"]
    packing = ["--pack", str(recipe.parent / "pack.yaml"), "--json", str(tmp_path / "report.json")]
    out = run(capsys, str(recipe), *changes, *packing, "--ranks", "2")
    batch = json.loads((tmp_path / "report.json").read_text())["batch"]
    assert batch["upper_bound"]
    assert batch["epochs"] is None
    assert f"at most {batch['tokens_per_step']:,.0f}" in out


def test_a_pack_recipe_bounds_what_its_shards_hold(capsys, tmp_path, long_model_dir, make_recipe, shards):
    pack = make_recipe(batch__pairs=16, batch__pack_tokens=1024, batch__pack_multiple=2, num_rows=80)
    reports = []
    for source in ([], ["--pack", str(pack)]):
        path = tmp_path / "report.json"
        changes = [f"backbone.path={long_model_dir}", f"data.shards={shards}"]
        run(capsys, str(RECIPE), *changes, *source, "--json", str(path))
        reports.append(json.loads(path.read_text()))
    sampled, bound = (report["batch"] for report in reports)
    assert 0 < sampled["tokens_per_step"] <= bound["tokens_per_step"]
    assert 0 < sampled["decode_tokens_per_step"] <= bound["decode_tokens_per_step"]


def test_memory_that_does_not_fit_is_said_with_what_to_do(capsys, tmp_path, long_model_dir):
    big = tmp_path / "big"
    big.mkdir()
    config = json.loads((long_model_dir / "config.json").read_text())
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False}
    (big / "config.json").write_text(json.dumps(config | sizes))
    pack = ["--pack", str(PACK), "--gpu", "a100-40gb"]
    path = tmp_path / "report.json"
    out = run(capsys, str(RECIPE), f"backbone.path={big}", *pack, "--json", str(path))
    report = json.loads(path.read_text())
    assert report["model"]["parameters"] == 8_030_261_248  # Llama-3.1-8B's own number
    assert not report["memory"]["fits"]
    assert "DOES NOT FIT: " in out
    assert "use more ranks" in " ".join(out.split())


def test_a_model_that_is_not_here_is_named_with_what_to_do(capsys, shards):
    message = error_of(capsys, str(RECIPE), "backbone.path=HuggingFaceTB/nothing", f"data.shards={shards}")
    assert message == (
        f"error: {RECIPE}: backbone.path: HuggingFaceTB/nothing: no such model folder (its cache has none either, and "
        "hub names are looked up only when HF_HUB_OFFLINE is not 1); a dry run reads the configuration only: give any "
        "folder with this model's config.json, as backbone.path=FOLDER"
    )


def test_shards_that_do_not_exist_yet_are_named_with_what_to_do(capsys, tmp_path, long_model_dir):
    missing = tmp_path / "missing"
    changes = [f"backbone.path={long_model_dir}", f"data.shards={missing}"]
    assert error_of(capsys, str(RECIPE), *changes) == (
        f"error: {missing}: no such folder of shards; run `python -m data_prep pack` first; or dry-run before packing "
        "with --pack PACK_RECIPE"
    )


def test_ranks_that_do_not_divide_the_pack_recipe_are_refused(capsys, long_model_dir):
    changes = [f"backbone.path={long_model_dir}", "--pack", str(PACK), "--ranks", "3"]
    assert f"3 ranks do not divide pack_multiple (2) of {PACK}" in error_of(capsys, str(RECIPE), *changes)


def test_a_share_of_the_peak_above_one_is_refused(capsys, tiny_model_dir, shards):
    changes = [f"backbone.path={tiny_model_dir}", f"data.shards={shards}", "--mfu", "40"]
    assert error_of(capsys, str(RECIPE), *changes) == (
        "error: --mfu: got 40.0, expected a share of the peak above 0 and at most 1, such as 0.4"
    )


@pytest.mark.parametrize(
    ("changes", "at_once"),
    [
        ([], 1),
        (["engine.checkpoint_every_steps=10"], 3),
        (["engine.checkpoint_every_steps=60"], 2),  # of 100 steps: at 60 and at the end
        (["engine.checkpoint_every_steps=10", "engine.keep_every_steps=20"], 8),
        (["engine.checkpoint_every_steps=10", "engine.keep_every_steps=15"], 6),  # a checkpoint at 30, 60 and 90
    ],
)
def test_checkpoints_that_are_kept_for_good_take_their_disk(capsys, tmp_path, tiny_model_dir, shards, changes, at_once):
    words = [f"data.shards={shards}", f"backbone.path={tiny_model_dir}", "optim.total_steps=100", *changes]
    run(capsys, str(RECIPE), *words, "--json", str(tmp_path / "report.json"))
    disk = json.loads((tmp_path / "report.json").read_text())["disk"]
    assert disk["checkpoints_at_once"] == at_once
    assert disk["needed_bytes"] == at_once * disk["checkpoint_bytes"] + disk["export_bytes"]


@pytest.mark.parametrize("option", ["--ranks", "--ranks-per-node"])
def test_fewer_than_one_rank_is_refused(capsys, option):
    assert error_of(capsys, str(RECIPE), option, "0").endswith("expected a number, at least 1, got '0'")
