"""Study small enough for tests, and results in the form that its runs write."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from anchor.config.load import load_recipe
from anchor.config.pack_recipe import E5Source, PackRecipe
from bench.study.plan import Cell, StudyPlan
from bench.study.prepare import StudyData
from bench.study.recipe import StudyRecipe, load_arms
from bench.study.run import result_file

ROOT = Path(__file__).parents[1]
RETRIEVAL_SOURCE = "squad_dev"
TINY = {
    "retrieval_source": RETRIEVAL_SOURCE,
    "seeds": [0],
    "ranks": 1,
    "stage1_steps": 2,
    "stage2_steps": 3,
    "curve_steps": [1],
    "warmup_fraction": 0.1,
    "heldout_pairs": 8,
    "pack": ["text.max_tokens=96", "batch.pairs=8", "batch.pack_tokens=1024"],
    "train": [f"engine.deepspeed={ROOT / 'ds_configs/zero3.json'}"],
    "evaluation": {
        **{"tasks": [], "retrieval_queries": 12, "retrieval_documents": 16, "decoded_pairs": 7, "dtype": "fp32"},
    },
}


def write_scale(folder: Path, base: Path) -> tuple[Path, list[str]]:
    """Write a scale of the shipped arms and recipes over ``folder/pairs``; return it and the source names."""
    recipes = Path(shutil.copytree(ROOT / "launch/recipes/study", folder / "recipes"))
    (source,) = load_recipe(recipes / "pack.yaml", PackRecipe).sources
    assert isinstance(source, E5Source)
    assert source.only is not None
    where = {"pairs": folder / "pairs", "mteb": folder / "none", "base": base}
    where |= {"work_dir": folder / "work", "results_dir": folder / "results", "arms": recipes / "arms.yaml"}
    path = recipes / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {key: str(value) for key, value in where.items()}))
    return path, [*source.only, RETRIEVAL_SOURCE]


def plan_of(scale: Path, **matched: int) -> StudyPlan:
    """Return the plan of a scale; ``matched`` gives the steps of the arms with equal compute."""
    study = load_recipe(scale, StudyRecipe)
    return StudyPlan(study, load_arms(study), StudyData(study.work_dir / "data"), matched)


def write_result(plan: StudyPlan, cell: Cell, score: float, **changes: Any) -> Path:
    """Write a result of the cell with a made-up score and cost."""
    cost = {"steps": cell.step, "pairs": 8, "tokens": 1000, "training_seconds": 60.0, "petaflops": 2.0}
    arm = plan.arm(cell.arm)
    result = {
        **{"arm": cell.arm, "label": arm.label, "after": arm.after, "seed": cell.seed, "step": cell.step},
        **{"final": cell.final, "curve": arm.has_curve, "scores": {"A": score, "B": score / 2}},
        **{
            "data_index_sha256": "a",
            "own": cost,
            "with_before": cost,
            "decoded": None,
            "settings_sha256": plan.settings_sha256(cell),
        },
    }
    file = result_file(plan, cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result | changes))
    return file
