"""Invariants of `launch/slurm` from raw pairs on: an array of packing jobs and their merge give the bytes of one
process; `pipeline.sh` goes from raw pairs to a score by itself; what cannot be packed stops what depends on it.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from clusters import Slurm

pytestmark = pytest.mark.cluster
_TASK_CARD = """---
configs:
- {config_name: default, data_files: [{split: test, path: qrels/test.jsonl}]}
- {config_name: corpus, data_files: [{split: corpus, path: corpus.jsonl}]}
- {config_name: queries, data_files: [{split: queries, path: queries.jsonl}]}
---
"""


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_an_array_of_parts_and_their_merge_equal_one_process_byte_for_byte(
    slurm: Slurm, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    from data_prep.packing.pack import pack

    recipe = make_recipe(num_rows=256)
    shards = recipe.parent / "shards"
    pack(str(recipe), [])
    alone = digests(shards)
    assert len(alone) > 3
    shards.rename(tmp_path / "alone")
    small = ("--cpus-per-task=1", "-o", tmp_path / "%x-%a")
    parts = slurm.submit("--array=0-2", *small, "launch/slurm/pack.sbatch", recipe)
    after = (f"--dependency=afterok:{parts}", "--kill-on-invalid-dep=yes", "-o", tmp_path / "merge")
    merge = slurm.submit(*after, "launch/slurm/merge.sbatch", recipe)
    assert slurm.finished(merge)["JobState"] == "COMPLETED", (tmp_path / "merge").read_text()
    assert digests(shards) == alone


def test_a_part_that_fails_cancels_the_merge(slurm: Slurm, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe()
    (recipe.parent / "pairs.jsonl").write_text("{broken\n")
    parts = slurm.submit("--array=0-1", "--cpus-per-task=1", "-o", tmp_path / "%a", "launch/slurm/pack.sbatch", recipe)
    after = (f"--dependency=afterok:{parts}", "--kill-on-invalid-dep=yes", "-o", tmp_path / "merge")
    merge = slurm.submit(*after, "launch/slurm/merge.sbatch", recipe)
    assert slurm.finished(merge)["JobState"] == "CANCELLED"
    assert "pairs.jsonl" in (tmp_path / "0").read_text()


def test_the_pipeline_goes_from_raw_pairs_to_a_score(
    slurm: Slurm, make_recipe: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    recipes, runs = tmp_path / "recipes", tmp_path / "runs"
    recipes.mkdir()
    pack = make_recipe()
    (recipes / "pack.yaml").write_text(pack.read_text())
    common = {"seed": 0, "data": {"shards": str(pack.parent / "shards")}}
    common["engine"] = {"deepspeed": "ds_configs/zero3.json", "dtype": "fp32", "log_every_steps": 1}
    common["optim"] = {"lr": 1e-3, "warmup_steps": 1, "total_steps": 2}
    objectives = {
        "stage1": ({"kind": "reconstruction", "alpha": 0.2}, {"kind": "full"}, tiny_model_dir),
        "stage2": (
            {"kind": "contrastive", "temperature": 0.02},
            {"kind": "lora", "r": 2, "alpha": 4, "dropout": 0.0},
            runs / "stage1/export",
        ),
    }
    for name, (objective, trained, path) in objectives.items():
        backbone = {"path": str(path), "trained": trained, "attention": "segments"}
        recipe = common | {"output_dir": str(runs / name), "objective": objective, "backbone": backbone}
        (recipes / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    task = write_retrieval_task(tmp_path / "heldout")
    pipeline = ("launch/slurm/pipeline.sh", "--parts", 2, "--nodes", 2, "--gpus-per-node", 1, recipes)
    submitted = slurm.nodes[0].run(*pipeline, "--retrieval", task, SBATCH_OUTPUT=str(tmp_path / "%x.out"))
    jobs = [line.split("job ")[1] for line in submitted.stdout.splitlines() if ": job " in line]
    assert len(jobs) == 5
    last = slurm.finished(jobs[-1], seconds=400)
    logs = "\n".join(file.read_text() for file in tmp_path.glob("*.out"))
    assert last["JobState"] == "COMPLETED", logs
    scores = json.loads((runs / "stage2/export/mteb/scores.json").read_text())
    assert scores, logs


def write_retrieval_task(folder: Path) -> Path:
    """Four documents and two queries, in the layout of mteb's retrieval tasks."""
    (folder / "qrels").mkdir(parents=True)
    (folder / "README.md").write_text(_TASK_CARD)
    documents = [{"_id": f"d{i}", "title": "", "text": f"the river number {i} crosses the forest"} for i in range(4)]
    queries = [{"_id": f"q{i}", "text": f"which river has number {i}"} for i in range(2)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels/test.jsonl").write_text(
        "".join(json.dumps({"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1}) + "\n" for i in range(2))
    )
    return folder
