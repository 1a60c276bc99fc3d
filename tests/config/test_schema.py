"""Invariants: every knob is read somewhere, documented, and checked against the others; recipes cannot be changed."""

import ast
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from anchor.config import objectives, pack_recipe, train_recipe
from anchor.config.load import validate
from anchor.config.pack_recipe import PackRecipe
from anchor.config.train_recipe import TrainRecipe
from anchor.errors import ConfigError

ROOT = Path(__file__).parents[2]
MODULES = (objectives, pack_recipe, train_recipe)
SECTIONS = [
    value
    for module in MODULES
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == module.__name__
]
FIELDS = [(model.__name__, name) for model in SECTIONS for name in model.model_fields]
PACK: dict[str, Any] = {
    "output_dir": "out",
    "seed": 0,
    "tokenizer": "m",
    "template": {"kind": "preset", "name": "chatml"},
    "sources": [{"kind": "files", "name": "a", "path": "p", "instructions": []}],
    "text": {"max_tokens": 128, "hard_negatives": 0},
    "batch": {"pairs": 8, "pack_tokens": 512, "pack_multiple": 2},
}


def attributes_read() -> set[str]:
    """Return the names that any module outside `anchor.config` reads as ``something.name``."""
    files = [file for package in ("anchor", "data_prep", "eval") for file in (ROOT / package).rglob("*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files if file.parent.name != "config"]
    assert len(trees) > 15
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.ctx, ast.Load)}


def test_every_field_is_read_somewhere() -> None:
    # `kind` chooses the class of a tagged union: pydantic reads it.
    read = attributes_read() | {"kind"}
    assert len(FIELDS) > 40
    assert sorted(f"{model}.{name}" for model, name in FIELDS if name not in read) == []


def test_every_field_is_documented() -> None:
    silent = [
        f"{model.__name__}.{name}"
        for model in SECTIONS
        for name, field in model.model_fields.items()
        if name != "kind" and not field.description and not issubclass(_model_of(field.annotation), BaseModel)
    ]
    assert silent == []


def _model_of(annotation: Any) -> type:
    return annotation if isinstance(annotation, type) else object


def test_a_recipe_cannot_be_changed() -> None:
    recipe = validate(PACK, PackRecipe, "x.yaml")
    with pytest.raises(ValidationError):
        recipe.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"batch": {"pairs": 8, "pack_tokens": 255, "pack_multiple": 2}},
            "x.yaml: batch.pack_tokens (255) is smaller than the longest pair, 2 segments x text.max_tokens (128) = "
            "256; raise pack_tokens or lower max_tokens",
        ),
        (
            {"batch": {"pairs": 9, "pack_tokens": 512, "pack_multiple": 2}},
            "x.yaml: batch.pairs (9) is not a multiple of batch.pack_multiple (2); choose a multiple",
        ),
        (
            {"template": {"kind": "preset", "name": "chatml", "instruction_format": "{text} {instruction}"}},
            "x.yaml: template.instruction_format is '{text} {instruction}'; it must end in '{text}'",
        ),
        (
            {"text": {"max_tokens": 128, "hard_negatives": 1}},
            "x.yaml: text.hard_negatives is 1, but sources.0 ('a') names no columns.negatives; name them or set "
            "text.hard_negatives to 0",
        ),
        (
            {"sources": [{"kind": "files", "name": "a/b", "path": "p", "instructions": []}]},
            r"x.yaml: sources.0.name: got 'a/b', string should match pattern '^\w[\w.-]*$' (and 1 more)",
        ),
        (
            {
                "sources": [
                    {
                        "kind": "files",
                        "name": "a",
                        "path": "p",
                        "instructions": [],
                        "format": "tevatron",
                        "columns": {"query": "q"},
                    }
                ]
            },
            "x.yaml: sources.0: format 'tevatron' brings its own columns; remove columns or use format: columns "
            "(and 1 more)",
        ),
        (
            {"sources": [{"kind": "e5", "path": "p", "symmetric": ["a", "b"], "symmetric_documents": "bare"}]},
            "x.yaml: sources.0: symmetric_documents is bare, so symmetric (a, b) has no effect; remove one "
            "(and 1 more)",
        ),
        (
            {"sources": []},
            "x.yaml: sources: got [], tuple should have at least 1 item after validation, not 0",
        ),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(change: dict[str, Any], expected: str) -> None:
    validate(PACK, PackRecipe, "x.yaml")
    with pytest.raises(ConfigError) as caught:
        validate(PACK | change, PackRecipe, "x.yaml")
    assert str(caught.value) == expected


TRAIN: dict[str, Any] = {
    "output_dir": "out",
    "seed": 0,
    "data": {"shards": "s"},
    "backbone": {"path": "m", "trained": {"kind": "full"}, "attention": "varlen"},
    "objective": {"kind": "reconstruction", "alpha": 0.2},
    "optim": {"lr": 1e-3, "warmup_steps": 1, "total_steps": 6},
    "engine": {"deepspeed": "ds.json", "dtype": "bf16"},
}


@pytest.mark.parametrize("kernel", ["varlen", "flash"])
def test_a_kernel_without_float32_is_refused(kernel: str) -> None:
    backbone = {"backbone": TRAIN["backbone"] | {"attention": kernel}}
    validate(TRAIN | backbone, TrainRecipe, "x.yaml")
    with pytest.raises(ConfigError) as caught:
        validate(TRAIN | backbone | {"engine": TRAIN["engine"] | {"dtype": "fp32"}}, TrainRecipe, "x.yaml")
    assert str(caught.value) == (
        f"x.yaml: backbone.attention is {kernel}, whose kernel knows no engine.dtype fp32; use engine.dtype: bf16 or "
        "backbone.attention: segments"
    )
