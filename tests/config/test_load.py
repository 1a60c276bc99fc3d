"""Invariants: what the schema does not know is refused in one line that says where and what to do.

Unknown and duplicate keys, wrong types, missing values; ``2e-5`` is a number; overrides behave like the file.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from anchor.config.load import load_recipe, parse_yaml
from anchor.config.objectives import ContrastiveSection
from anchor.config.pack_recipe import HubSource, PackRecipe
from anchor.config.train_recipe import TrainRecipe
from anchor.errors import ConfigError

TRAIN = """\
output_dir: runs/x
seed: 0
data: {shards: data/x}
backbone: {path: m, trained: {kind: lora, r: 16, alpha: 32, dropout: 0.05}, attention: segments}
objective: {kind: contrastive, temperature: 0.02}
optim: {lr: 2e-5, warmup_steps: 3, total_steps: 10}
engine: {deepspeed: ds_configs/zero3.json, dtype: bf16}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(TRAIN, encoding="utf-8")
    return path


def message(path: Path, *overrides: str, schema: Any = TrainRecipe) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, schema, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "x.yaml")


def test_a_recipe_is_read(recipe: Path) -> None:
    loaded = load_recipe(recipe, TrainRecipe)
    assert loaded.optim.lr == 2e-5
    assert isinstance(loaded.objective, ContrastiveSection)
    assert loaded.optim.decay_steps is None


@pytest.mark.parametrize(
    ("text", "value"), [("2e-5", 2e-5), ("-1E3", -1000.0), ("1.5e+2", 150.0), ("3", 3), ("e5", "e5"), ("1e5x", "1e5x")]
)
def test_scientific_notation_is_a_number(text: str, value: object) -> None:
    parsed = parse_yaml(f"lr: {text}", "x")["lr"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed:", "sed:", "x.yaml: unknown key sed; did you mean 'seed'?"),
        ("warmup_steps", "warm_up_steps", "x.yaml: unknown key optim.warm_up_steps; did you mean 'warmup_steps'?"),
        ("temperature", "temprature", "x.yaml: unknown key objective.temprature; did you mean 'temperature'?"),
        ("dropout:", "dropuot:", "x.yaml: unknown key backbone.trained.dropuot; did you mean 'dropout'?"),
        ("data: {", "data: {zzz: 1, ", "x.yaml: unknown key data.zzz; known are shards"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(recipe: Path, old: str, new: str, expected: str) -> None:
    assert TRAIN.count(old) == 1
    recipe.write_text(TRAIN.replace(old, new), encoding="utf-8")
    assert message(recipe) == expected


def test_an_unknown_key_inside_a_list_of_unions_is_named_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    source = {"kind": "files", "name": "a", "path": "p", "instructions": [], "colums": {}}
    path.write_text(yaml.safe_dump({"sources": [source]}), encoding="utf-8")
    assert message(path, schema=PackRecipe) == "x.yaml: unknown key sources.0.colums; did you mean 'columns'?"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed: 0", "seed: 0\nseed: 1", "x.yaml: key 'seed' is given twice, in lines 2 and 3; keep one"),
        (
            "warmup_steps: 3",
            "lr: 3",
            "x.yaml: key 'lr' is given twice, in lines 6 and 6; keep one",
        ),
        ("seed: 0", "seed: [0", "x.yaml:3: did not find expected ',' or ']'"),
        ("seed: 0", "? [a]\n: 0", "x.yaml:2: a key must be text, got ['a']; put it in quotes"),
    ],
)
def test_malformed_yaml_and_duplicate_keys_are_refused(recipe: Path, old: str, new: str, expected: str) -> None:
    recipe.write_text(TRAIN.replace(old, new), encoding="utf-8")
    # PyYAML's own wording of a syntax error differs between its C and its Python parser.
    assert message(recipe).replace("expected ',' or ']', but got ':'", "did not find expected ',' or ']'") == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed: 0\n", "", "x.yaml: missing value seed; the recipe must state it"),
        (", temperature: 0.02", "", "x.yaml: missing value objective.temperature; the recipe must state it"),
        ("seed: 0", "seed: zero", "x.yaml: seed: got 'zero', input should be a valid integer, unable to parse string "
                                  "as an integer"),
        ("seed: 0", "seed: -1", "x.yaml: seed: got -1, input should be greater than or equal to 0"),
        ("dtype: bf16", "dtype: fp16", "x.yaml: engine.dtype: got 'fp16', input should be 'bf16' or 'fp32'"),
        ("kind: lora", "kind: qlora", "x.yaml: backbone.trained: input tag 'qlora' found using 'kind' does not "
                                      "match any of the expected tags: 'full', 'lora', 'frozen'"),
        ("kind: contrastive, ", "", "x.yaml: objective: unable to extract tag using discriminator 'kind'"),
        ("warmup_steps: 3", "warmup_steps: 3, decay_steps: 5",
         "x.yaml: optim: decay_steps (5) is less than total_steps (10)"),
    ],
)  # fmt: skip
def test_missing_values_and_wrong_types_are_refused(recipe: Path, old: str, new: str, expected: str) -> None:
    assert TRAIN.count(old) == 1
    recipe.write_text(TRAIN.replace(old, new), encoding="utf-8")
    assert message(recipe) == expected


def test_several_problems_are_counted(recipe: Path) -> None:
    recipe.write_text("seed: 0\n", encoding="utf-8")
    assert message(recipe) == "x.yaml: missing value output_dir; the recipe must state it (and 5 more)"


def test_a_missing_file_and_other_files_are_refused(tmp_path: Path) -> None:
    assert message(tmp_path / "x.yaml") == "x.yaml: no such recipe file; give the path of a .yaml file"
    (tmp_path / "x.yaml").write_text("- a\n", encoding="utf-8")
    assert message(tmp_path / "x.yaml") == "x.yaml: a recipe is a mapping of sections, got list"
    (tmp_path / "x.yaml").write_bytes(b"seed: \xff\n")
    assert message(tmp_path / "x.yaml") == (
        "x.yaml: cannot be read as UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 6: invalid start byte"
    )


def test_overrides_change_single_values(recipe: Path) -> None:
    changes = ["optim.lr=1e-4", "backbone.trained.r=8", "engine.checkpoint_every_steps=5", "seed=3"]
    loaded = load_recipe(recipe, TrainRecipe, changes)
    assert (loaded.optim.lr, loaded.engine.checkpoint_every_steps, loaded.seed) == (1e-4, 5, 3)
    assert loaded.backbone.trained.model_dump()["r"] == 8
    assert loaded.optim.total_steps == 10


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "override 'seed': expected section.key=value"),
        ("=3", "override '=3': expected section.key=value"),
        ("seed.x=3", "override 'seed.x=3': 'seed' is not a section"),
        ("optim.lr=[1", "override 'optim.lr=[1':1: expected ',' or ']', but got '<stream end>'"),
        ("optim.beta=1", "x.yaml: unknown key optim.beta; known are decay_steps, lr, max_grad_norm, total_steps, "
                         "warmup_steps, weight_decay"),
        ("seed=2024-13-45", "override 'seed=2024-13-45': month must be in 1..12; put text in quotes"),
        ("optim.total_steps=yes", "x.yaml: optim: total_steps is a truth value, as yes, no, on and off are; give a "
                                  "number, or quote a word"),
        ("optim.lr=", "x.yaml: optim.lr: got None, input should be a valid number"),
    ],
)  # fmt: skip
def test_bad_overrides_are_refused(recipe: Path, override: str, expected: str) -> None:
    assert message(recipe, override) == expected


def test_a_variable_in_a_path_is_the_environments(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a run wrote to a folder named "$SCRATCH" in the working directory."""
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    loaded = load_recipe(recipe, TrainRecipe, ["output_dir=$SCRATCH/run", "backbone.path='${SCRATCH}/model'"])
    assert (loaded.output_dir, loaded.backbone.path) == (Path("/scratch/me/run"), "/scratch/me/model")
    # A `~` of a model stays: runs that were begun with it go on.
    assert load_recipe(recipe, TrainRecipe, ["backbone.path='~/model'"]).backbone.path == "~/model"
    for path, name in (("$NOWHERE/run", "NOWHERE"), ("a/${EMPTY}/run", "EMPTY")):
        for field in ("output_dir", "backbone.path"):
            assert message(recipe, f"{field}='{path}'") == (
                f"x.yaml: {field}: {path}: the variable {name} is unset or empty; set it, or write the path out"
            )


def test_a_hub_dataset_may_lie_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    hub = {"kind": "hub", "name": "a", "split": "train", "instructions": ()}
    read = [HubSource.model_validate(hub | {"dataset": name}).dataset for name in ("~/d", "$HOME/d", "owner/d")]
    assert read == ["/home/someone/d", "/home/someone/d", "owner/d"]


def test_a_tilde_is_the_users_home(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pyarrow reads it so, pathlib does not: half of the shards once went to another folder.
    monkeypatch.setenv("HOME", "/home/someone")
    loaded = load_recipe(recipe, TrainRecipe, ["output_dir='~/run'", "data.shards='~/shards'"])
    assert (loaded.output_dir, loaded.data.shards) == (Path("/home/someone/run"), Path("/home/someone/shards"))
    assert message(recipe, "output_dir='~nobody-of-this-name/run'") == (
        "x.yaml: output_dir: ~nobody-of-this-name/run: no such user's home"
    )
