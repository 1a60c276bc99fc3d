"""Invariants: the four DeepSpeed files give the same losses on two ranks; what README says of every value is complete.

On CPU the second copy of `zero3_hpz.json` lies in one node (2 ranks instead of 8 share it) and offloading moves
nothing, but both take DeepSpeed's code for it, its compiled CPU Adam included.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from clusters import losses

ROOT = Path(__file__).parents[2]
FILES = ("zero3", "zero2", "zero3_hpz", "zero3_offload")


def test_the_readme_explains_every_file_and_every_value() -> None:
    text = (ROOT / "ds_configs/README.md").read_text(encoding="utf-8")
    for name in FILES:
        assert f"| `{name}.json` |" in text
        values = json.loads((ROOT / f"ds_configs/{name}.json").read_text())["zero_optimization"]
        assert [key for key in values if key != "stage" and f"`{key}`" not in text] == []


@pytest.mark.slow
def test_all_four_files_give_the_same_losses(
    make_shards: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    recipe = {
        "output_dir": "set below",
        "seed": 0,
        "data": {"shards": str(make_shards())},
        "backbone": {"path": str(tiny_model_dir), "trained": {"kind": "full"}, "attention": "segments"},
        "objective": {"kind": "reconstruction", "alpha": 0.2},
        "optim": {"lr": 1e-3, "warmup_steps": 1, "total_steps": 3},
        "engine": {"deepspeed": "set below", "dtype": "bf16"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = {}
    for number, name in enumerate(FILES):
        launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(29640 + number), "--module"]
        overrides = [f"output_dir={tmp_path / name}", f"engine.deepspeed=ds_configs/{name}.json"]
        done = subprocess.run(
            [*launcher, "anchor.train", tmp_path / "recipe.yaml", *overrides],
            cwd=ROOT,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=900,  # the first use of CPU Adam compiles it
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        found[name] = losses(tmp_path / name)
    assert len(found["zero3"]) == 3
    assert found["zero3"][0] > found["zero3"][-1] > 0
    for name in FILES[1:]:
        assert found[name] == pytest.approx(found["zero3"], rel=1e-4), name
