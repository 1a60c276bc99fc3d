"""``python -m bench.study SCALE``: run a study, list what is missing, or draw its tables and plots."""

import argparse
import math
import sys

from rich.console import Console

from anchor import log
from anchor.arguments import count
from anchor.config.load import load_recipe
from anchor.errors import ConfigError, exit_on_user_error, shortened
from bench.study.plan import StudyPlan
from bench.study.prepare import StudyData, prepare
from bench.study.recipe import StudyRecipe, chosen_arms, load_arms
from bench.study.run import commands, matched_steps, missing, results_of, run_study
from bench.study.tables import markdown, write_tables
from bench.study.tuning import tune, tuned

_EXAMPLE = """examples:
  python -m bench.study launch/recipes/study/cpu.yaml --list
  python -m bench.study launch/recipes/study/cpu.yaml --only stage2,stage1_stage2 --seeds 0
  python -m bench.study launch/recipes/study/cpu.yaml --tables
"""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.study",
        description="Reconstruction first, then contrastive, against contrastive alone. Started again, it goes on.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scale", help="YAML file of a scale, see bench/study/recipe.py: StudyRecipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace a value of the scale")
    parser.add_argument("--only", metavar="ARM,...", help="these arms, and what they start from")
    parser.add_argument("--seeds", metavar="N,...", help="these seeds instead of the scale's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show what is done and missing")
    what.add_argument("--commands", action="store_true", help="print the commands of every missing cell")
    what.add_argument("--tables", action="store_true", help="write tables.md and curves from the results alone")
    what.add_argument("--tune", metavar="RATE,...", help="held-out loss of the one arm of --only at learning rates")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    arguments = _arguments(argv)
    log.setup()
    with exit_on_user_error():
        study = load_recipe(arguments.scale, StudyRecipe, arguments.overrides)
        arms = load_arms(study)
        names = chosen_arms(arms, arguments.only)
        seeds = study.seeds if arguments.seeds is None else _seeds(arguments.seeds)
        rates = [] if arguments.tune is None else _rates(arguments.tune, names)
        console = Console(soft_wrap=True, markup=False, highlight=False)
        if arguments.tables:
            path = write_tables(study.results_dir, arms)
            if path is None:
                raise ConfigError(f"{study.results_dir}: holds no result; run the study first")
            console.print(str(path))
            return
        study = study.model_copy(update={"seeds": tuple(dict.fromkeys((*study.seeds, *seeds)))})
        data = StudyData(study.work_dir / "data")
        if not (arguments.list or arguments.commands):
            data = prepare(study)
        plan = StudyPlan(study, arms, data, {})
        if (data.shards / "index.json").is_file():
            plan = StudyPlan(study, arms, data, matched_steps(plan))
            plan = tuned(plan, names, run=False)
        if arguments.list or arguments.commands:
            console.print((_listed if arguments.list else _commands)(plan, names, seeds))
        elif rates:
            console.print(tune(plan, names[0], rates))
        else:
            run_study(tuned(plan, names), names, seeds)
            console.print((study.results_dir / "tables.md").read_text(encoding="utf-8"))


def _seeds(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    try:
        return tuple(count(number) for number in numbers)
    except argparse.ArgumentTypeError as error:
        message = f"--seeds: got {shortened(text)}, expected numbers separated by commas, such as 0,1,2"
        raise ConfigError(message) from error


def _listed(plan: StudyPlan, names: list[str], seeds: tuple[int, ...]) -> str:
    rows = []
    for name in names:
        for seed in (s for s in seeds if s in plan.seeds(name)):
            cells = plan.cells(name, seed)
            left = cells if plan.untuned(name) else missing(plan, name, seed)
            steps = "after packing" if not cells else " ".join(str(cell.step) for cell in left) or "none"
            steps += ", after tuning" if plan.untuned(name) else ""
            # Before the steps are known, there may already be results from another checkout.
            done = len(cells) - len(left) if cells else len(results_of(plan, name, seed))
            rows.append([name, seed, f"{done}/{len(cells) if cells else '?'}", steps])
    return markdown(["arm", "seed", "cells done", "missing steps"], rows)


def _commands(plan: StudyPlan, names: list[str], seeds: tuple[int, ...]) -> str:
    ready = [name for name in names if not plan.untuned(name)]
    cells = [cell for seed in seeds for name in ready if seed in plan.seeds(name) for cell in missing(plan, name, seed)]
    lines = [f"# {cell.name}\n" + "\n".join(commands(plan, cell)) for cell in cells]
    waiting = [f"# {name}: after tuning {', '.join(plan.untuned(name))}" for name in names if name not in ready]
    return "\n".join([*lines, *waiting])


def _rates(text: str, names: list[str]) -> list[float]:
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = [math.nan]
    if not all(0 < rate < math.inf for rate in rates):
        raise ConfigError(f"--tune: got {shortened(text)}, expected learning rates such as 1e-4,2e-4")
    if len(names) != 1:
        raise ConfigError("--tune: needs --only with the one arm whose learning rate it is")
    return rates


if __name__ == "__main__":
    main(sys.argv[1:])
