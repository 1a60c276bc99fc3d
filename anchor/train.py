"""``python -m anchor.train RECIPE [section.key=value ...]``: train an embedder and export it.

Under a launcher (``deepspeed --module anchor.train ...``, ``srun python -m anchor.train ...``) every process is a
rank; without one it is a single process.
"""

import argparse
import sys

from anchor import log
from anchor.config.load import load_recipe
from anchor.config.schema import TrainRecipe
from anchor.errors import exit_on_user_error

_EXAMPLE = """example:
  python -m anchor.train launch/recipes/quickstart/stage1.yaml --dry-run
  deepspeed --num_gpus 8 --module anchor.train recipe.yaml optim.lr=1e-5 --resume
"""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m anchor.train",
        description="Train a text embedder from packed shards and export it.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML recipe, see anchor/config/schema.py")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace a value of the recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint, or start")
    parser.add_argument("--dry-run", action="store_true", help="check recipe, shards and ranks; train nothing")
    parser.add_argument("--ranks", type=int, default=1, help="with --dry-run: number of ranks to check for")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the DeepSpeed launcher adds it
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    arguments = _arguments(argv)
    log.setup()
    with exit_on_user_error():
        recipe = load_recipe(arguments.recipe, TrainRecipe, arguments.overrides)
        # Only now torch: a mistake in a recipe is answered at once.
        from anchor import dist
        from anchor.engine.loop import make_plan, train

        if arguments.dry_run:
            make_plan(recipe, arguments.recipe, arguments.ranks)
            return
        ranks = dist.init()
        plan = make_plan(recipe, arguments.recipe, ranks.world_size)
        train(plan, ranks, resume=arguments.resume)
        dist.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
