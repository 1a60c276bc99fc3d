"""Invariants: every shipped self-supervised recipe dry-runs before anything is packed; with shards the tables count
what the objective encodes and decodes, exactly; trained parameters are P H + H^2 + H + H D + D."""

import json
from pathlib import Path

import pytest
from taught import DIMENSION, TEMPLATE, TOKENS, teach_at_random

from anchor.data.shards import ShardReader
from anchor.train import main

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch/recipes").rglob("self_supervised.yaml"))
RECIPE = ROOT / "launch/recipes/quickstart/self_supervised.yaml"


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")


def report_of(tmp_path: Path, *argv: str) -> dict:
    main([*argv, "--dry-run", "--json", str(tmp_path / "report.json")])
    return json.loads((tmp_path / "report.json").read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_a_shipped_recipe_dry_runs_before_its_data_is_packed(recipe, capsys, tmp_path, long_model_dir):
    pack = str(recipe.parent / "pack_self_supervised.yaml")
    report = report_of(tmp_path, str(recipe), f"backbone.path={long_model_dir}", "--pack", pack)
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80
    assert report["batch"]["upper_bound"]
    assert 0 < report["batch"]["tokens_per_step"] <= report["batch"]["decode_tokens_per_step"]
    groups = {group["group"]: group for group in report["model"]["groups"]}
    assert report["model"]["trained"] == groups["special tokens"]["trained"] > 32 * 32
    assert report["disk"]["export_bytes"] == 4 * report["model"]["trained"]


def test_with_shards_the_counts_are_those_of_the_texts(tmp_path, tiny_model_dir, make_shards):
    shards = teach_at_random(make_shards(pairs=16, pack_multiple=2, pack_tokens=1024, num_rows=16, template=TEMPLATE))
    batch = ShardReader(shards).read(0)
    changes = [f"backbone.path={tiny_model_dir}", f"data.shards={shards}", "evaluation=null"]
    report = report_of(tmp_path, str(RECIPE), *changes, "--gpu", "cpu")
    assert report["model"]["trained"] == TOKENS * 32 + 32**2 + 32 + 32 * DIMENSION + DIMENSION
    queries = sum(int(p.segment_lengths[p.roles == 0].sum()) for p in batch.packs)
    bodies = sum(int((p.body_ends - p.body_starts)[p.roles == 1].sum()) for p in batch.packs)
    assert report["batch"]["tokens_per_step"] == queries
    assert report["batch"]["decode_tokens_per_step"] == bodies + 16 * TOKENS
    encoded, decoded = [], []
    for pack in batch.packs:
        encoded += [int(n) for n in pack.segment_lengths[pack.roles == 0]]
        decoded += [int(n) + TOKENS for n in (pack.body_ends - pack.body_starts)[pack.roles == 1]]
    layers = report["model"]["parameters"] - report["model"]["trained"] - 400 * 32 - 5 * 32  # without norms
    attention = 2 * 4 * 2 * 32 * sum(n**2 for n in encoded + decoded)
    head = 2 * 400 * 32 * (bodies + 16)
    wanted = 2 * 2 * layers * (queries + bodies + 16 * TOKENS) + attention * 3 // 2 + 2 * head
    assert report["time"]["model_flops_per_step"] == pytest.approx(wanted, rel=1e-9)
    aligned = report_of(tmp_path, str(RECIPE), *changes, "--gpu", "cpu", "objective.reconstruction_weight=0")
    assert aligned["batch"]["decode_tokens_per_step"] == 0
    assert aligned["batch"]["tokens_per_step"] == queries
    assert aligned["time"]["model_flops_per_step"] < report["time"]["model_flops_per_step"]
    assert aligned["memory"]["peak_bytes"] < report["memory"]["peak_bytes"]


def test_a_pack_recipe_without_special_tokens_is_refused(capsys, tmp_path, long_model_dir):
    pack = RECIPE.parent / "pack.yaml"
    with pytest.raises(SystemExit) as exit_:
        main([str(RECIPE), f"backbone.path={long_model_dir}", "--pack", str(pack), "--dry-run"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --pack: objective.kind is self_supervised, but template.kind is not special_tokens"
    )
