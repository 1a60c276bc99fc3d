"""Cells of a study and the exact command of every run: pure functions of the recipes.

A cell is an arm, a seed and a number of steps. Its run continues from the cell before it. The recipe states the
learning rate's horizon (``optim.decay_steps``), so a run can stop at every step of the curve, be exported, and
continue.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchor.config.load import load_recipe
from anchor.config.train_recipe import TrainRecipe
from anchor.data.index import index_hash
from bench.study.prepare import StudyData, pack_recipe
from bench.study.recipe import Arm, ArmsRecipe, StudyRecipe


@dataclass(frozen=True, slots=True)
class Cell:
    """One result of a study.

    Attributes:
        arm: name of the arm.
        seed: the study's seed; :meth:`StudyPlan.recipe_seed` gives the run's.
        step: steps of the arm's own run.
        final: True if this is the run's last step.
    """

    arm: str
    seed: int
    step: int
    final: bool

    @property
    def name(self) -> str:
        """File name of the cell's JSON, without suffix."""
        return f"{self.arm}-seed{self.seed}-step{self.step}"


@dataclass(frozen=True)
class StudyPlan:
    """A scale and its arms.

    Attributes:
        study: the scale.
        arms: the arms to compare.
        data: where shards and tasks are or will be.
        matched_steps: steps of the arms with ``compute_of``, once their FLOPs are known.
        tuned: learning rates chosen from the scale's lists, once the losses are known.
    """

    study: StudyRecipe
    arms: ArmsRecipe
    data: StudyData
    matched_steps: dict[str, int]
    tuned: dict[str, float] = field(default_factory=dict)

    def arm(self, name: str) -> Arm:
        return self.arms.arms[name]

    def steps(self, name: str) -> int | None:
        """Return the steps of an arm's run, or None until the FLOPs that decide them are known."""
        arm = self.arm(name)
        if arm.compute_of:
            return self.matched_steps.get(name)
        return {"none": 0, "stage1": self.study.stage1_steps, "stage2": self.study.stage2_steps, None: None}[arm.steps]

    def seeds(self, name: str) -> tuple[int, ...]:
        """Return all seeds of the study, or only one for an arm that does not train."""
        return self.study.seeds[:1] if self.arm(name).steps == "none" else self.study.seeds

    def cells(self, name: str, seed: int) -> list[Cell]:
        """Return the cells of an arm and a seed in the order of steps; empty until its steps are known."""
        last = self.steps(name)
        if last is None:
            return []
        points = [step for step in self.study.curve_steps if step < last] if self.arm(name).steps == "stage2" else []
        return [Cell(name, seed, step, final=step == last) for step in (*points, last)]

    def run_folder(self, name: str, seed: int) -> Path:
        return self.study.work_dir / "runs" / name / f"seed{seed}"

    def _rate_key(self, name: str) -> str | None:
        """Return the key of an arm's learning rate in the scale, or None if it has none or states its own."""
        arm, rates = self.arm(name), self.study.learning_rates
        if name in rates:
            return name
        stated = arm.steps == "none" or any(override.startswith("optim.lr=") for override in arm.overrides)
        return arm.recipe if arm.recipe in rates and not stated else None

    def _rate(self, key: str) -> float | None:
        rate = self.study.learning_rates[key]
        return self.tuned.get(key) if isinstance(rate, tuple) else rate

    def untuned(self, name: str) -> list[str]:
        """Return the keys of learning rates that an arm and its predecessors still await, in the order to tune them."""
        after, key = self.arm(name).after, self._rate_key(name)
        out = [] if after is None else self.untuned(after)
        if key is not None and self._rate(key) is None:
            out += [*(self.untuned(key) if key != name else ()), key]
        return list(dict.fromkeys(out))

    def recipe_file(self, name: str) -> Path:
        return self.study.recipes / f"{self.arm(name).recipe}.yaml"

    def recipe_seed(self, cell: Cell) -> int:
        """Return the seed of batch order, dropout and adapters: 2 x seed in Stage I, one more in Stage II.

        With Stage I's order, Stage II would only repeat the batches that Stage I began with, while the longer control
        saw others. All arms of a seed have the same order in Stage II.
        """
        return 2 * cell.seed + self.arm(cell.arm).has_curve

    def overrides(self, cell: Cell) -> list[str]:
        """Return the recipe overrides of a cell's training command."""
        arm, last = self.arm(cell.arm), self.steps(cell.arm) or 0
        start = self.study.base if arm.after is None else str(self.run_folder(arm.after, cell.seed) / "export")
        schedule = [f"optim.total_steps={cell.step}", "optim.warmup_steps=0"]
        if last:
            warmup = max(1, round(self.study.warmup_fraction * last))
            schedule = [f"optim.total_steps={cell.step}", f"optim.decay_steps={last}", f"optim.warmup_steps={warmup}"]
        key = self._rate_key(cell.arm)
        rate = None if key is None else self._rate(key)
        return [
            *self.study.train,
            *arm.overrides,
            *([] if rate is None else [f"optim.lr={rate:g}"]),
            f"output_dir={self.run_folder(cell.arm, cell.seed)}",
            f"seed={self.recipe_seed(cell)}",
            f"data.shards={self.data.shards}",
            f"backbone.path={start}",
            *schedule,
        ]

    def run_settings(self, cell: Cell, more: Sequence[str] = ()) -> dict[str, Any]:
        """Return all settings that decide the weights of a cell's run at any step: recipe, shards, starting point.

        Args:
            cell: any cell of the run.
            more: further overrides.
        """
        recipe = load_recipe(self.recipe_file(cell.arm), TrainRecipe, [*self.overrides(cell), *more])
        settings = recipe.model_dump(mode="json", exclude={"output_dir": True, "data": {"shards"}})
        del settings["backbone"]["path"], settings["optim"]["total_steps"]
        settings = {"arm": cell.arm, **settings, "data_index_sha256": index_hash(self.data.shards)}
        after = self.arm(cell.arm).after
        if after is None:
            return settings | {"base": self.study.base}
        last = self.cells(after, cell.seed)[-1]
        return settings | {"after": {"total_steps": last.step, **self.run_settings(last)}}

    def settings_sha256(self, cell: Cell) -> str:
        """Return the hash of all settings that decide a cell's numbers, without paths.

        It covers the recipes of the arm and of its predecessors, the data and the evaluation.
        """
        chain: list[dict[str, Any]] = []
        link: Cell | None = cell
        while link is not None:
            recipe = load_recipe(self.recipe_file(link.arm), TrainRecipe, self.overrides(link)).model_dump(mode="json")
            recipe["backbone"].pop("path")
            kept = {key: recipe[key] for key in ("seed", "backbone", "objective", "optim")}
            chain.append(kept | {"dtype": recipe["engine"]["dtype"]})
            after = self.arm(link.arm).after
            link = None if after is None else self.cells(after, link.seed)[-1]
        packed = pack_recipe(self.study).model_dump(mode="json", exclude={"output_dir", "tokenizer"})
        for source in packed["sources"]:
            source.pop("path")
        settings = {
            "base": Path(self.study.base).name,
            "chain": chain,
            "pack": packed,
            "heldout_pairs": self.study.heldout_pairs,
            "retrieval_source": self.study.retrieval_source,
            "evaluation": self.study.evaluation.model_dump(mode="json"),
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
