"""Invariants: the self-supervised recipes hold the paper's numbers, pack what they train on, name an end token that is
the family's, and every ablation that launch/recipes/README.md names is a change of one line that loads.
"""

import re
import shlex
from pathlib import Path

import pytest

from anchor.config.load import load_recipe
from anchor.config.objectives import SelfSupervisedSection
from anchor.config.pack_recipe import FilesSource, PackRecipe, SpecialTokensTemplate
from anchor.config.train_recipe import FrozenTraining, TrainRecipe
from data_prep.options import make_parser

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launch/recipes"
README = (RECIPES / "README.md").read_text(encoding="utf-8")
# Method of arXiv:2603.10913: learning rate by family.
RATES = {
    **dict.fromkeys(("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"), 3e-4),
    **dict.fromkeys(("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"), 5e-4),
    **dict.fromkeys(("llama3.2-1b", "llama3.2-3b", "llama3.1-8b"), 5e-4),
}


def commands(program: str) -> list[list[str]]:
    """Return the arguments of every program call in the README."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    found = [line.split(program, 1)[1] for line in lines if program in line]
    return [shlex.split(arguments, comments=True) for arguments in found]


@pytest.mark.parametrize("model", RATES)
def test_the_recipes_hold_the_papers_numbers(model: str) -> None:
    train = load_recipe(RECIPES / model / "self_supervised.yaml", TrainRecipe)
    pack = load_recipe(RECIPES / model / "pack_self_supervised.yaml", PackRecipe)
    assert isinstance(train.objective, SelfSupervisedSection)
    assert isinstance(train.backbone.trained, FrozenTraining)
    assert (train.objective.alignment_weight, train.objective.reconstruction_weight) == (1.0, 1.0)
    assert train.objective.contrastive is None
    optim = train.optim
    assert (optim.lr, optim.warmup_steps, optim.total_steps, optim.decay_steps) == (RATES[model], 100, 5000, 20000)
    assert train.engine.dtype == "bf16"
    assert isinstance(pack.template, SpecialTokensTemplate)
    assert (pack.template.tokens, pack.template.suffix) == (10, "")
    # What the family's tokenizer adds by itself, and what ends a turn.
    expected = ("", "<|im_end|>") if model.startswith("qwen") else ("<|begin_of_text|>", "<|eot_id|>")
    assert (pack.template.prefix, pack.template.end) == expected
    assert (pack.batch.pairs, pack.text.max_tokens, pack.text.hard_negatives) == (32, 512, 0)
    assert train.backbone.path == pack.tokenizer
    # `teach` makes the ones of the others.
    assert f"{train.data.shards}-untaught" == str(pack.output_dir)
    (source,) = pack.sources
    assert isinstance(source, FilesSource)
    assert (source.columns.query, source.columns.positive, source.instructions) == ("question", "answer", ())
    assert str(source.path).endswith(f"{model}-responses/answers")


def test_the_readme_lists_the_recipes() -> None:
    folders = sorted(path.parent.name for path in RECIPES.glob("*/self_supervised.yaml"))
    assert folders == sorted([*RATES, "quickstart", "smollm2-135m"])
    for model in RATES:
        assert f"`{model}/`" in README


def test_the_commands_of_the_readme_fit_together() -> None:
    parsed = [make_parser().parse_args(arguments) for arguments in commands("python -m data_prep ")]
    by_name = {one.command: one for one in parsed if one.command in ("respond", "teach")}
    packs = [one for one in parsed if one.command == "pack" and "self_supervised" in one.recipe]
    recipe = load_recipe(ROOT / packs[0].recipe, PackRecipe)
    (source,) = recipe.sources
    assert isinstance(source, FilesSource)
    assert source.path == by_name["respond"].output / "answers"
    assert by_name["respond"].model == recipe.tokenizer
    assert by_name["teach"].shards == recipe.output_dir
    train = load_recipe(ROOT / packs[0].recipe.replace("pack_self", "self"), TrainRecipe)
    assert by_name["teach"].output == train.data.shards


def test_every_ablation_of_the_readme_is_a_change_that_loads() -> None:
    rows = re.findall(r"^\| [^|]+ \| `(pack|train)` \| `([^`]+)` \|", README, re.MULTILINE)
    assert len(rows) >= 6
    changed = set()
    for kind, text in rows:
        overrides = shlex.split(text)
        file = "pack_self_supervised.yaml" if kind == "pack" else "self_supervised.yaml"
        model = PackRecipe if kind == "pack" else TrainRecipe
        recipe = load_recipe(RECIPES / "qwen3-4b" / file, model, overrides)
        assert recipe != load_recipe(RECIPES / "qwen3-4b" / file, model)
        changed.add(text.split("=")[0])
    assert {"objective.alignment_weight", "objective.reconstruction_weight", "template.tokens"} <= changed
