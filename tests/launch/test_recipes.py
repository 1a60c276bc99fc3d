"""Invariants: the papers' recipes hold the papers' numbers, pass a dry run on 8 GPUs of 80 GB with the models' real
shapes, and the memory that launch/recipes/README.md names is what the dry run predicts.
"""

import json
import re
from pathlib import Path

import pytest

from anchor.config.load import load_recipe
from anchor.config.objectives import ContrastiveSection
from anchor.config.objectives import ReconstructionSection as Reconstruction
from anchor.config.pack_recipe import PackRecipe
from anchor.config.train_recipe import FullTraining, LoraTraining, TrainRecipe

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launch/recipes"
STAGES = ("stage1", "stage2", "baseline")
# The shapes of the models' own config.json, which no recipe repeats.
SHAPES = {
    "llama3.2-1b": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
    "qwen2.5-1.5b": ("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True),
    "llama3.2-3b": ("llama", 128256, 3072, 8192, 28, 24, 8, 128, True),
    "mistral-7b": ("mistral", 32768, 4096, 14336, 32, 32, 8, 128, False),
    "llama3.1-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, False),
    "qwen3-0.6b": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
}
NAMES = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings"),
)
# Stage I: effective batch per model, method of arXiv:2509.03020; decay over 3 epochs of 1.5M pairs.
STAGE1_PAIRS = {name: 1024 if name in ("qwen2.5-1.5b", "llama3.2-3b") else 512 for name in SHAPES}


def pack_recipe_of(recipe: TrainRecipe, folder: Path) -> Path:
    """Return the pack recipe that writes the training recipe's shards."""
    (found,) = [p for p in folder.glob("pack*.yaml") if load_recipe(p, PackRecipe).output_dir == recipe.data.shards]
    return found


def table_of_the_readme() -> dict[tuple[str, str], tuple[str, float]]:
    """Read launch/recipes/README.md: (model, stage) -> (file of ds_configs, GiB)."""
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (\w+) \| `(\S+)` \| [\d,]+ \| \w+ \| ([\d.]+) \|$", text, re.MULTILINE)
    return {(model, stage): (file, float(gib)) for model, stage, file, gib in rows}


@pytest.mark.parametrize("model", SHAPES)
def test_the_recipes_hold_the_papers_numbers(model: str) -> None:
    recipes = {stage: load_recipe(RECIPES / model / f"{stage}.yaml", TrainRecipe) for stage in STAGES}
    packs = {stage: load_recipe(pack_recipe_of(one, RECIPES / model), PackRecipe) for stage, one in recipes.items()}
    assert {pack.text.max_tokens for pack in packs.values()} == {512}
    for (source,) in (pack.sources for pack in packs.values()):
        assert source.kind == "e5"
        assert "symmetric_documents" in source.model_fields_set  # the recipe says which of the two ways it takes
    assert {pack.batch.pack_multiple for pack in packs.values()} == {32}
    assert {stage: pack.batch.pairs for stage, pack in packs.items()} == {
        "stage1": STAGE1_PAIRS[model],
        "stage2": 1024,
        "baseline": 1024,
    }
    first, second, baseline = (recipes[stage] for stage in STAGES)
    assert isinstance(first.objective, Reconstruction)
    assert isinstance(first.backbone.trained, FullTraining)
    assert (first.objective.alpha, first.optim.lr, first.optim.warmup_steps, first.optim.total_steps) == (
        *(0.2, 4e-5),
        *(300, 2000),
    )
    assert first.optim.decay_steps == round(3 * 1_500_000 / STAGE1_PAIRS[model])
    for one in (second, baseline):
        assert isinstance(one.objective, ContrastiveSection)
        assert isinstance(one.backbone.trained, LoraTraining)
        assert (one.objective.temperature, one.optim.lr, one.optim.warmup_steps, one.optim.total_steps) == (
            *(0.02, 2e-4),
            *(300, 1000),
        )
        # The released runs stop at 1,000 steps of a schedule of 3 epochs: the rate never comes near zero.
        assert one.optim.decay_steps == round(3 * 1_500_000 / 1024)
        adapter = one.backbone.trained
        assert (adapter.r, adapter.alpha, adapter.dropout, len(adapter.targets)) == (16, 32, 0.05, 7)
        assert packs["stage2"].text.hard_negatives == 1
    # The baseline is Stage II but for what it starts from and where it goes.
    assert second.backbone.path == str(first.output_dir / "export")
    assert baseline.backbone.path == first.backbone.path == packs["stage1"].tokenizer
    same = second.model_copy(update={"output_dir": baseline.output_dir, "backbone": baseline.backbone})
    assert same == baseline


@pytest.mark.parametrize("model", SHAPES)
def test_the_recipes_fit_eight_gpus_of_80_gb_as_the_readme_says(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anchor.dry_run.report import Options, dry_run

    for name in ("launch", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    said = table_of_the_readme()
    for stage in STAGES:
        path = f"launch/recipes/{model}/{stage}.yaml"
        recipe = load_recipe(path, TrainRecipe)
        folder = Path(recipe.backbone.path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dict(zip(NAMES, SHAPES[model], strict=True))))
        pack = pack_recipe_of(recipe, Path(f"launch/recipes/{model}"))
        options = Options(num_ranks=8, gpu="h100-80gb", pack_recipe=str(pack))
        report = dry_run(recipe, path, options)
        assert report["memory"]["fits"]
        file, gib = said[model, stage]
        assert str(recipe.engine.deepspeed) == f"ds_configs/{file}"
        assert gib == pytest.approx(report["memory"]["peak_bytes"] / 2**30, rel=0.1)
