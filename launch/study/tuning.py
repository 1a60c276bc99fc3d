"""Learning rates chosen on held-out training pairs, before any test set is looked at.

Every rate is one run of an arm, of a seed that the study does not use; the objective's own loss on the first held-out
batches decides. What is chosen is written into the scale (`learning_rates`) by hand.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from anchor.config.load import load_recipe
from anchor.config.schema import TrainRecipe
from anchor.errors import ConfigError
from eval.vectors import write_json
from launch.study.plan import StudyPlan
from launch.study.programs import shown, training
from launch.study.run import train
from launch.study.tables import markdown

log = logging.getLogger(__name__)

TUNING_SEED = 1000
MAX_BATCHES = 8


def tune(plan: StudyPlan, name: str, rates: Sequence[float]) -> str:
    """Run an arm at several learning rates; a Markdown table of held-out losses, also kept as JSON.

    Raises:
        ConfigError: an arm that does not train, a study that uses the tuning seed, losses of other settings.
        AnchorError: a run failed.
    """
    if not plan.steps(name) or TUNING_SEED in plan.study.seeds:
        raise ConfigError(f"--tune: arm '{name}' does not train, or seed {TUNING_SEED} is one of the study's")
    last = plan.cells(name, TUNING_SEED)[-1]
    file = plan.study.results_dir / f"tuning-{name}.json"
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    held_out = {"shards": str(plan.data.heldout_shards), "every_steps": last.step, "max_batches": MAX_BATCHES}
    for rate in dict.fromkeys((*map(float, known), *rates)):
        folder = plan.run_folder(name, TUNING_SEED).with_name(f"tuning-lr{rate:g}")
        more = [f"output_dir={folder}", f"optim.lr={rate:g}", f"evaluation={json.dumps(held_out)}"]
        command = shown(training(plan.recipe_file(name), [*plan.overrides(last), *more], plan.study.ranks))
        settings = json.dumps(plan.run_settings(last, more), sort_keys=True)
        made = {"command": command, "settings_sha256": hashlib.sha256(settings.encode()).hexdigest()}
        if f"{rate:g}" in known:
            # Losses of other shards or recipes do not compare.
            if known[f"{rate:g}"]["settings_sha256"] != made["settings_sha256"]:
                raise ConfigError(
                    f"{file}: {rate:g} was run with other settings; delete it, or choose another results_dir"
                )
        else:
            train(plan, last, more)
            lines = (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
            losses = {row["step"]: row["held_out/loss_total_nats"] for row in map(json.loads, lines)}
            known[f"{rate:g}"] = {"before": losses[0], "after": losses[last.step], **made}
            plan.study.results_dir.mkdir(parents=True, exist_ok=True)
            write_json(file, known)
    best = min(known, key=lambda rate: known[rate]["after"])
    chosen = load_recipe(plan.recipe_file(name), TrainRecipe, plan.overrides(last)).optim.lr
    log.info("%s: lowest held-out loss at %s; the recipes say %g", name, best, chosen)
    rows = [[rate, f"{known[rate]['before']:.4f}", f"{known[rate]['after']:.4f}"] for rate in sorted(known, key=float)]
    return markdown(["learning rate", "held-out loss before, nats", f"after {last.step} steps"], rows)
