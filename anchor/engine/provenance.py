"""Record where a run comes from."""

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from anchor import dist
from anchor.data.index import index_hash
from anchor.engine.plan import Plan

_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "pyarrow")


def provenance(plan: Plan, ranks: dist.Ranks) -> dict[str, Any]:
    """Return the record for ``run.yaml`` and ``anchor.json``: recipe, data, ranks, device, commit, package versions."""
    recipe = plan.recipe.model_dump(mode="json")
    return {
        "recipe": recipe,
        "recipe_sha256": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        "data_index_sha256": index_hash(plan.recipe.data.shards),
        "num_ranks": ranks.world_size,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        "commit": provenance_commit(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def provenance_commit() -> str | None:
    """Return the commit of this checkout, marked if files other than results are altered; None without git."""
    if shutil.which("git") is None:
        return None
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=False, cwd=here)
    if not done.stdout.strip():
        return None
    # A study rewrites its own tables between its runs, so results do not count.
    compare = ["git", "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)bench/results"]
    altered = subprocess.run(compare, capture_output=True, check=False, cwd=here).returncode != 0
    return done.stdout.strip() + "-dirty" * altered
