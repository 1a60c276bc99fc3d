"""Choose learning rates on held-out training pairs, before any test set is looked at.

Each rate is one run of an arm, with a seed that the study does not use. The objective's own loss on the first held-out
batches decides. If the scale lists rates, the study takes the best one itself. Rates found with ``--tune`` are written
into the scale (`learning_rates`) by hand.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anchor.config.load import load_recipe
from anchor.config.train_recipe import TrainRecipe
from anchor.errors import ConfigError
from bench.study.plan import StudyPlan
from bench.study.programs import shown, training
from bench.study.run import train
from bench.study.tables import markdown
from eval.embedding.vectors import write_json

log = logging.getLogger(__name__)

TUNING_SEED = 1000
MAX_BATCHES = 8

Losses = dict[str, dict[str, Any]]
"""Held-out loss before and after in nats, and the command, by rate."""


def tune(plan: StudyPlan, name: str, rates: Sequence[float]) -> str:
    """Run an arm at several learning rates; return a Markdown table of held-out losses, also kept as JSON.

    Raises:
        ConfigError: the arm does not train, the study uses the tuning seed, or kept losses were made with other
            settings.
        AnchorError: a run failed.
    """
    after = plan.arm(name).after
    plan = plan if after is None else tuned(plan, [after])
    losses = _losses(plan, name, rates)
    last = plan.cells(name, TUNING_SEED)[-1]
    chosen = load_recipe(plan.recipe_file(name), TrainRecipe, plan.overrides(last)).optim.lr
    log.info("%s: lowest held-out loss at %s; the recipes say %g", name, _best(losses), chosen)
    rows = [[rate, f"{losses[rate]['before']:.4f}", f"{losses[rate]['after']:.4f}"] for rate in losses]
    return markdown(["learning rate", "held-out loss before, nats", f"after {last.step} steps"], rows)


def tuned(plan: StudyPlan, names: Sequence[str], *, run: bool = True) -> StudyPlan:
    """Return the plan with a rate chosen from every list of the scale that these arms depend on.

    Args:
        plan: a plan with the steps of the arms of equal compute.
        names: names of the arms.
        run: True to train missing runs; False to leave a list with a missing loss unchosen.

    Raises:
        ConfigError: the study uses the tuning seed, or kept losses were made with other settings.
        AnchorError: a run failed.
    """
    for key in dict.fromkeys(key for name in names for key in plan.untuned(name)):
        candidates = plan.study.learning_rates[key]
        if not isinstance(candidates, tuple) or (not run and plan.untuned(key) != [key]):
            continue
        rates = [f"{rate:g}" for rate in sorted(candidates)]
        known = _losses(plan, key, candidates) if run else _known(plan, key)
        if not set(rates) <= set(known):
            continue
        best = _best({rate: known[rate] for rate in rates})
        log.info("%s: lowest held-out loss at %s, of %s", key, best, ", ".join(rates))
        if best in (rates[0], rates[-1]):
            log.warning("%s: %s is the first or the last of the list; one beyond it may be better", key, best)
        plan = replace(plan, tuned={**plan.tuned, key: float(best)})
    return plan


def _best(losses: Losses) -> str:
    return min(losses, key=lambda rate: losses[rate]["after"])


def _losses(plan: StudyPlan, name: str, rates: Sequence[float]) -> Losses:
    """Return the losses of these rates and of all known ones in ascending order; train what is missing."""
    if not plan.steps(name) or TUNING_SEED in plan.study.seeds:
        raise ConfigError(f"--tune: arm '{name}' does not train, or seed {TUNING_SEED} is one of the study's")
    last = plan.cells(name, TUNING_SEED)[-1]
    known = _known(plan, name)
    for rate in dict.fromkeys(f"{rate:g}" for rate in rates):
        if rate not in known:
            more = _more(plan, name, rate)
            train(plan, last, more)
            folder = _folder(plan, name, rate)
            lines = (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
            losses = {row["step"]: row["held_out/loss_total_nats"] for row in map(json.loads, lines)}
            command = shown(training(plan.recipe_file(name), [*plan.overrides(last), *more], plan.study.ranks))
            made = {"command": command, "settings_sha256": _settings_sha256(plan, name, rate)}
            # Read again: another process may have added losses in the meantime.
            known = _known(plan, name) | {rate: {"before": losses[0], "after": losses[last.step], **made}}
            plan.study.results_dir.mkdir(parents=True, exist_ok=True)
            write_json(_file(plan, name), known)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {rate: known[rate] for rate in sorted(known, key=float)}


def _known(plan: StudyPlan, name: str) -> Losses:
    """Return the kept losses; refuse those of other shards or recipes, which do not compare."""
    file = _file(plan, name)
    known: Losses = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for rate, made in known.items():
        if made["settings_sha256"] != _settings_sha256(plan, name, rate):
            raise ConfigError(f"{file}: {rate} was run with other settings; delete it, or choose another results_dir")
    return known


def _file(plan: StudyPlan, name: str) -> Path:
    return plan.study.results_dir / f"tuning-{name}.json"


def _folder(plan: StudyPlan, name: str, rate: str) -> Path:
    return plan.run_folder(name, TUNING_SEED).with_name(f"tuning-lr{rate}")


def _more(plan: StudyPlan, name: str, rate: str) -> list[str]:
    last = plan.cells(name, TUNING_SEED)[-1]
    held_out = {"shards": str(plan.data.heldout_shards), "every_steps": last.step, "max_batches": MAX_BATCHES}
    return [f"output_dir={_folder(plan, name, rate)}", f"optim.lr={rate}", f"evaluation={json.dumps(held_out)}"]


def _settings_sha256(plan: StudyPlan, name: str, rate: str) -> str:
    settings = plan.run_settings(plan.cells(name, TUNING_SEED)[-1], _more(plan, name, rate))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
