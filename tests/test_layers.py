"""Invariants: imports point only downwards (design.md, section 2); preparing data needs no torch; no assert, no print.

Layers: 6 launch, bench; 5 anchor.train, anchor.dry_run, anchor.doctor, data_prep, eval, which never import one another;
4 anchor.engine, the only one to import deepspeed, and anchor.encoding; 3.5 anchor.estimate and anchor.model_folder;
3 anchor.objectives; 2 anchor.models; 1.5 anchor.data; 1 anchor.arguments, anchor.config, anchor.dist,
anchor.json_files, anchor.locks, anchor.log, anchor.progress, anchor.recent; 0 anchor.errors. Within a layer nothing
imports a sibling. anchor.train and anchor.doctor use the dry run.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "anchor.errors": 0,
    "anchor.arguments": 1,
    "anchor.config": 1,
    "anchor.dist": 1,
    "anchor.json_files": 1,
    "anchor.locks": 1,
    "anchor.log": 1,
    "anchor.progress": 1,
    "anchor.recent": 1,
    "anchor.data": 1.5,
    "anchor.models": 2,
    "anchor.objectives": 3,
    "anchor.estimate": 3.5,
    "anchor.model_folder": 3.5,
    "anchor.engine": 4,
    "anchor.encoding": 4,
    "anchor.train": 5,
    "anchor.dry_run": 5,
    "anchor.doctor": 5,
    "data_prep": 5,
    "eval": 5,
    "launch": 6,
    "bench": 6,
}
SIBLINGS_ALLOWED = {("anchor.train", "anchor.dry_run"), ("anchor.doctor", "anchor.dry_run")}
ONLY_IN = {"deepspeed": "anchor.engine", "peft": "anchor.models"}
# What transformers offers without a model: tokenizers, and configurations by name. `PreTrainedModel` is abstract: upper
# layers name it as the type of what anchor.models hands them, and cannot make one of it.
TRANSFORMERS_EVERYWHERE = {
    *("AutoTokenizer", "PreTrainedTokenizerFast", "PreTrainedTokenizerBase", "AutoConfig", "PreTrainedModel"),
}


def package_files() -> dict[str, Path]:
    """Map the name of each module that is imported, not run as a script, to its file."""
    files = [
        file
        for package in ("anchor", "data_prep", "eval", "launch", "bench/study")
        for file in sorted((ROOT / package).rglob("*.py"))
    ]
    files = [file for file in files if file.parent.name != "remote_code"]  # for other libraries to run
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Return (module, name) of every import, also inside functions; name is "" for ``import module``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def layer_of(module: str) -> str | None:
    return next((name for name in LAYERS if module == name or module.startswith(name + ".")), None)


def test_every_module_has_a_layer() -> None:
    modules = [name for name in package_files() if name != "anchor"]
    assert len(modules) > 15
    assert [name for name in modules if layer_of(name) is None] == []


def test_imports_point_only_downwards() -> None:
    checked, wrong = 0, []
    for name, file in package_files().items():
        here = layer_of(name)
        if here is None:
            continue
        for module, attribute in imports(ast.parse(file.read_text(encoding="utf-8"))):
            there = layer_of(f"{module}.{attribute}" if module == "anchor" else module)
            if there is None or there == here:
                continue
            checked += 1
            if LAYERS[there] >= LAYERS[here] and (here, there) not in SIBLINGS_ALLOWED:
                wrong.append(f"{name} imports {module}")
    assert checked > 30
    assert wrong == []


def test_deepspeed_and_peft_are_imported_in_one_place() -> None:
    seen, wrong = set(), []
    for name, file in package_files().items():
        for module, _ in imports(ast.parse(file.read_text(encoding="utf-8"))):
            owner = ONLY_IN.get(module.split(".")[0])
            if owner is not None:
                seen.add(module.split(".")[0])
                if layer_of(name) != owner:
                    wrong.append(f"{name} imports {module}")
    assert seen == set(ONLY_IN)
    assert wrong == []


def test_transformers_models_are_imported_only_by_anchor_models() -> None:
    seen, wrong = 0, []
    for name, file in package_files().items():
        for module, attribute in imports(ast.parse(file.read_text(encoding="utf-8"))):
            if module.split(".")[0] != "transformers":
                continue
            seen += 1
            if layer_of(name) != "anchor.models" and attribute not in TRANSFORMERS_EVERYWHERE:
                wrong.append(f"{name} imports {module}.{attribute}")
    assert seen >= 2
    assert wrong == []


def test_packages_neither_assert_nor_print() -> None:
    files, wrong = package_files(), []
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            printed = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if isinstance(node, ast.Assert) or printed:
                wrong.append(f"{name}:{node.lineno}")
    assert len(files) > 15
    assert wrong == []


TORCH_FREE = """
import sys
sys.modules["torch"] = None  # from here on `import torch` is an ImportError
import importlib
for name in (
    "anchor.config.load", "anchor.config.train_recipe", "anchor.config.model_path", "anchor.data.records",
    "anchor.data.templates", "anchor.data.tokenization", "anchor.data.packing", "anchor.data.shards",
    "data_prep.decontamination.decontaminate", "data_prep.documentation.docs", "data_prep.inspection.inspect",
    "data_prep.mining.mine", "data_prep.packing.pack",
):
    importlib.import_module(name)
from data_prep.__main__ import main
main(["pack", sys.argv[1]])
main(["inspect", sys.argv[2], "--verify", "--show", "1"])
"""


def test_data_is_prepared_on_a_machine_without_torch(make_recipe: Callable[..., Path]) -> None:
    recipe = make_recipe()
    shards = recipe.parent / "shards"
    command = [sys.executable, "-c", TORCH_FREE, str(recipe), str(shards)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 of 16 pairs" in done.stdout
    assert (shards / "index.json").is_file()
    # The same program with torch forbidden does fail when torch is asked for.
    broken = TORCH_FREE.replace("import importlib", "import torch")
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, timeout=60, check=False)
    assert "import of torch halted" in done.stderr


@pytest.mark.parametrize("module", ["anchor.config.load", "data_prep.__main__"])
def test_importing_neither_configures_logging_nor_reads_arguments(module: str) -> None:
    program = f"import sys, logging; sys.argv = ['x', '--nonsense']; import {module}; print(logging.root.handlers)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[]\n")
