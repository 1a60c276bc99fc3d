"""Run a study, cell by cell: train to the cell's step, score the export, write one small JSON.

A cell is done once its JSON exists, and never runs again. After a kill, the next start goes on: packing, training and
evaluation resume by themselves, and the study resumes with the first cell whose JSON is missing.
"""

import hashlib
import json
import logging
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchor.config.load import load_recipe
from anchor.config.train_recipe import TrainRecipe
from anchor.data.index import index_hash
from anchor.errors import ConfigError
from bench.study.plan import Cell, StudyPlan
from bench.study.programs import locked, run, shown, training
from bench.study.settings import keep_settings
from bench.study.tables import write_tables
from eval.embedding.vectors import write_json

log = logging.getLogger(__name__)

_ENDS = 10
"""Number of steps whose loss is averaged, at the beginning of a run and before a cell."""
_SHOWN = 10
"""Number of decoded texts kept per cell, each of the best and of the worst."""
_DECODED_TOKENS = 32


def run_study(plan: StudyPlan, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Run the missing cells of some arms and seeds, seed by seed, then write tables and plots.

    Raises:
        AnchorError: a command failed, or a result was made with other settings.
    """
    todo = [cell for seed in seeds for name in names if seed in plan.seeds(name) for cell in missing(plan, name, seed)]
    for number, cell in enumerate(todo, start=1):
        log.info("cell %d of %d: %s", number, len(todo), cell.name)
        _run_cell(plan, cell)
    write_tables(plan.study.results_dir, plan.arms)


def result_file(plan: StudyPlan, cell: Cell) -> Path:
    """Return the path of a cell's result."""
    return plan.study.results_dir / f"{cell.name}.json"


def results_of(plan: StudyPlan, name: str, seed: int) -> set[Path]:
    """Return the existing result files of an arm and a seed, whatever their steps."""
    return set(plan.study.results_dir.glob(f"{name}-seed{seed}-step*.json"))


def missing(plan: StudyPlan, name: str, seed: int) -> list[Cell]:
    """Return the cells of an arm and a seed that have no result.

    Raises:
        ConfigError: a result was made with other settings.
    """
    out = []
    for cell in plan.cells(name, seed):
        file = result_file(plan, cell)
        if not file.is_file():
            out.append(cell)
        elif json.loads(file.read_text(encoding="utf-8"))["settings_sha256"] != plan.settings_sha256(cell):
            raise ConfigError(
                f"{file}: made with other settings than the recipes now say; delete it, or choose another results_dir"
            )
    _refuse_strays(plan, name, seed)
    return out


def _refuse_strays(plan: StudyPlan, name: str, seed: int) -> None:
    """Refuse results of steps outside the plan unless they are of the same run.

    They would appear in the plan's tables.
    """
    cells = plan.cells(name, seed)
    files = results_of(plan, name, seed) if cells else set()
    for file in sorted(files - {result_file(plan, cell) for cell in cells}):
        result = json.loads(file.read_text(encoding="utf-8"))
        same = result["settings_sha256"] == plan.settings_sha256(Cell(name, seed, result["step"], final=False))
        if result["final"] or not same:
            what = "the last step of a study of" if result["final"] else "made with"
            raise ConfigError(f"{file}: {what} other settings; delete it, or choose another results_dir")


def _run_cell(plan: StudyPlan, cell: Cell) -> None:
    # Hold one lock from the first step to the result, so that the scored export is the one just trained.
    with locked(plan.run_folder(cell.arm, cell.seed)) as lock:
        if cell not in missing(plan, cell.arm, cell.seed):  # another process was faster
            return
        export = _train(plan, cell, lock)
        start = time.perf_counter()
        scores = _scores(plan, cell, export, lock)
        seconds = time.perf_counter() - start
        decoded = _decoded(plan, cell, export, lock) if plan.arm(cell.arm).decoded and cell.final else None
        plan.study.results_dir.mkdir(parents=True, exist_ok=True)
        about = json.loads((export / "anchor.json").read_text(encoding="utf-8"))
        arm = plan.arm(cell.arm)
        write_json(
            result_file(plan, cell),
            {
                "arm": cell.arm,
                "label": arm.label,
                "after": arm.after,
                "seed": cell.seed,
                "step": cell.step,
                "final": cell.final,
                "curve": arm.has_curve,
                "scores": scores,
                **_training_figures(plan, cell),
                "evaluation_seconds": seconds,
                "decoded": decoded,
                "settings_sha256": plan.settings_sha256(cell),
                **{key: about[key] for key in ("commit", "device", "num_ranks", "versions", "data_index_sha256")},
                "commands": commands(plan, cell),
            },
        )
        if cell.final:
            shutil.rmtree(plan.run_folder(cell.arm, cell.seed) / "checkpoints", ignore_errors=True)


def train(plan: StudyPlan, cell: Cell, more: Sequence[str] = ()) -> None:
    """Train an arm's run to a cell's step, after the run that it starts from.

    Args:
        plan, cell: the plan and the cell to train.
        more: further overrides, which make a different run of it.

    Raises:
        ConfigError: the folder belongs to a run with other settings.
        TrainingError: the run failed.
    """
    recipe = load_recipe(plan.recipe_file(cell.arm), TrainRecipe, [*plan.overrides(cell), *more])
    with locked(recipe.output_dir) as lock:
        _train(plan, cell, lock, more)


def _train(plan: StudyPlan, cell: Cell, lock: int, more: Sequence[str] = ()) -> Path:
    """Train under the run's lock and return the export."""
    arm = plan.arm(cell.arm)
    folder = load_recipe(plan.recipe_file(cell.arm), TrainRecipe, [*plan.overrides(cell), *more]).output_dir
    keep_settings(folder, plan.run_settings(cell, more))
    if arm.after is not None:
        train(plan, plan.cells(arm.after, cell.seed)[-1])
    command = training(plan.recipe_file(cell.arm), [*plan.overrides(cell), *more], plan.study.ranks)
    if _exported_step(folder / "export") != cell.step:
        if any(int(path.name[5:]) > cell.step for path in (folder / "checkpoints").glob("step-*")):
            log.info("%s: is further than step %d; trained again", folder, cell.step)
            shutil.rmtree(folder / "checkpoints")
        run(command, plan.study.work_dir / "logs" / f"{cell.arm}-seed{cell.seed}.log", lock)
    return folder / "export"


def _exported_step(export: Path) -> int | None:
    file = export / "anchor.json"
    return json.loads(file.read_text(encoding="utf-8"))["recipe"]["optim"]["total_steps"] if file.is_file() else None


def scoring(plan: StudyPlan, cell: Cell) -> list[str]:
    """Return the command that scores a cell's export."""
    section, folder = plan.study.evaluation, plan.run_folder(cell.arm, cell.seed)
    tasks = ["--tasks", ",".join(section.tasks), "--data-root", str(plan.study.mteb)] if section.tasks else []
    where = ["--retrieval", str(plan.data.retrieval), "--output", str(folder / f"scores-step{cell.step}")]
    return ["python", "-m", "eval", "mteb", str(folder / "export"), *tasks, *where, "--dtype", section.dtype]


def decoding(plan: StudyPlan, cell: Cell) -> list[str]:
    """Return the command that decodes held-out documents' embeddings into queries."""
    section, folder = plan.study.evaluation, plan.run_folder(cell.arm, cell.seed)
    how = ["--direction", "document_to_query", "--max-new-tokens", str(_DECODED_TOKENS), "--dtype", section.dtype]
    where = ["--pairs", str(plan.data.decoded), "--output", str(folder / "decoded.jsonl"), "--overwrite"]
    return ["python", "-m", "eval", "decode", str(folder / "export"), *how, *where]


def commands(plan: StudyPlan, cell: Cell) -> list[str]:
    """Return the commands that make a cell by hand, in order, once the data is prepared."""
    lines = [*_trainings(plan, cell), scoring(plan, cell)]
    lines += [decoding(plan, cell)] if plan.arm(cell.arm).decoded and cell.final else []
    return [shown(line) for line in lines]


def _trainings(plan: StudyPlan, cell: Cell) -> list[list[str]]:
    after = plan.arm(cell.arm).after
    before = [] if after is None else _trainings(plan, plan.cells(after, cell.seed)[-1])
    return [*before, training(plan.recipe_file(cell.arm), plan.overrides(cell), plan.study.ranks)]


def _scores(plan: StudyPlan, cell: Cell, export: Path, lock: int) -> dict[str, float]:
    run(scoring(plan, cell), plan.study.work_dir / "logs" / f"{cell.arm}-seed{cell.seed}.log", lock)
    file = export.parent / f"scores-step{cell.step}" / "scores.json"
    return json.loads(file.read_text(encoding="utf-8"))["scores"]


def _decoded(plan: StudyPlan, cell: Cell, export: Path, lock: int) -> dict[str, Any]:
    run(decoding(plan, cell), plan.study.work_dir / "logs" / f"{cell.arm}-seed{cell.seed}.log", lock)
    lines = (export.parent / "decoded.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted((json.loads(line) for line in lines), key=lambda row: -row["token_f1"])
    examples = {"best": rows[:_SHOWN], "worst": rows[-_SHOWN:]}
    return {
        "pairs": len(rows),
        "token_f1": statistics.fmean(row["token_f1"] for row in rows),
        "rouge_l": statistics.fmean(row["rouge_l"] for row in rows),
        "examples": {
            name: [{key: row[key] for key in ("reference", "decoded", "token_f1", "rouge_l")} for row in chosen]
            for name, chosen in examples.items()
        },
    }


def _training_figures(plan: StudyPlan, cell: Cell) -> dict[str, Any]:
    """Return the loss and cost of the arm's own run up to the cell, and the cost with all runs before it.

    Costs are steps, pairs, tokens, seconds and petaFLOPs.
    """
    file = plan.run_folder(cell.arm, cell.seed) / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [row for row in map(json.loads, lines) if row["step"] <= cell.step]
    losses = [row["loss/total_nats"] for row in rows]
    own = {
        "steps": cell.step,
        "pairs": sum(row["data/pairs"] for row in rows),
        "tokens": sum(row["data/tokens"] for row in rows),
        "training_seconds": sum(row["time/step_seconds"] for row in rows),
        "petaflops": cell.step * flops_per_step(plan, cell.arm) / 1e15 if cell.step else 0.0,
    }
    after = plan.arm(cell.arm).after
    before = {} if after is None else _training_figures(plan, plan.cells(after, cell.seed)[-1])["with_before"]
    return {
        "loss_nats": {"first": statistics.fmean(losses[:_ENDS]), "last": statistics.fmean(losses[-_ENDS:])}
        if losses
        else None,
        "own": own,
        "with_before": {key: value + before.get(key, 0) for key, value in own.items()},
    }


def flops_per_step(plan: StudyPlan, name: str) -> float:
    """Return the executed FLOPs of one step of an arm, from the dry run; kept in the working folder.

    It needs the shards but not the weights: the base model's configuration stands in for the arm's starting point.
    """
    from anchor.dry_run.report import Options, dry_run

    file = plan.study.work_dir / "flops.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    path = plan.recipe_file(name)
    more = [f"data.shards={plan.data.shards}", f"backbone.path={plan.study.base}"]
    recipe = load_recipe(path, TrainRecipe, [*plan.study.train, *plan.arm(name).overrides, *more])
    asked = [recipe.model_dump(mode="json"), index_hash(plan.data.shards), plan.study.ranks]
    key = f"{path.stem} {hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()}"
    if key not in kept:
        report = dry_run(recipe, str(path), Options(num_ranks=plan.study.ranks, gpu="cpu"))
        kept[key] = report["time"]["executed_flops_per_step"]
        write_json(file, kept)
    return kept[key]


def matched_steps(plan: StudyPlan) -> dict[str, int]:
    """Return the steps of the arms with ``compute_of``: the FLOPs of the named arms over one step's."""
    out = {}
    for name, arm in plan.arms.arms.items():
        if arm.compute_of:
            asked = sum((plan.steps(other) or 0) * flops_per_step(plan, other) for other in arm.compute_of)
            out[name] = max(1, round(asked / flops_per_step(plan, name)))
    return out
