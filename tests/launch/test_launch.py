"""Invariants: every shipped recipe is valid; every command of the README parses and names files that exist; shell
scripts are well-formed; requirements are pinned; no path of one machine is in the tree."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from anchor.config.load import load_recipe
from anchor.config.pack_recipe import PackRecipe
from anchor.config.train_recipe import TrainRecipe

ROOT = Path(__file__).parents[2]
# test_study.py loads them.
STUDIES = {ROOT / f"launch/recipes/study/{name}.yaml" for name in ("arms", "cpu", "cpu_mteb", "gpu")}
RECIPES = sorted(set((ROOT / "launch/recipes").rglob("*.yaml")) - STUDIES)
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_recipe_is_valid(path):
    recipe = load_recipe(path, PackRecipe if path.stem.startswith("pack") else TrainRecipe)
    assert recipe.seed == 0
    if isinstance(recipe, TrainRecipe):
        assert (ROOT / recipe.engine.deepspeed).is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_parses(command):
    words = shlex.split(command)
    while words[0] in ("deepspeed", "srun") or words[0].startswith("-") or words[0].isdigit() or "hostfile" in words[0]:
        words = words[1:]
    if words[0] in ("bash", "sbatch") or words[0].startswith("launch/"):
        script = next(word for word in words if word.startswith("launch/"))
        assert (ROOT / script).is_file()
        return
    if words[0] == ".":
        assert words == [".", ".venv/bin/activate"]
        return
    words = [word for word in words if word not in ("python", "-m", "--module")]
    module, arguments = words[0], words[1:]
    for word in arguments:
        assert not word.startswith("launch/") or (ROOT / word).is_file(), word
    if module == "anchor.train":
        from anchor.train import _arguments

        assert _arguments(arguments).recipe.endswith(".yaml")
    elif module == "eval":
        from eval.options import make_parser

        assert make_parser().parse_args(arguments).command == arguments[0]
    elif module == "anchor.doctor":
        from anchor.doctor.__main__ import _arguments as doctor_arguments

        doctor_arguments(arguments)
    else:
        from data_prep.options import make_parser as data_prep_parser

        assert module == "data_prep"
        assert data_prep_parser().parse_args(arguments).command == arguments[0]


@pytest.mark.parametrize("readme", ["launch/README.md", "launch/recipes/README.md"])
def test_every_file_that_a_command_of_the_guides_names_is_there(readme):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)
    words = [word for block in blocks for line in block.splitlines() for word in shlex.split(line)]
    named = [word for word in words if word.startswith(("launch/", "ds_configs/"))]
    assert len(named) > 3
    assert [word for word in named if not (ROOT / word).exists()] == []


def test_job_scripts_are_well_formed_and_mark_what_a_site_must_edit():
    scripts = sorted((ROOT / "launch/slurm").glob("*.sbatch"))
    assert [script.stem for script in scripts] == ["merge", "mteb", "pack", "train"]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
        site = [line for line in directives if re.search(r"--(nodes|gpus-per-node|time|signal|array|cpus)", line)]
        assert site
        assert [line for line in site if "# EDIT" not in line] == []


@pytest.mark.parametrize("script", sorted((ROOT / "launch").rglob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_are_well_formed(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o100


def test_requirements_are_pinned():
    lines = [
        line.split("#")[0].strip()
        for file in ROOT.glob("requirements*.txt")
        for line in file.read_text().splitlines()
        if line.split("#")[0].strip()
    ]
    assert len(lines) > 15
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines), lines
