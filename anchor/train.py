"""``python -m anchor.train RECIPE [section.key=value ...]``: train an embedder and export it.

Exit codes: 0 finished; 2 user error; 85 stopped by SIGTERM or SIGUSR1 with a checkpoint (run the same command again to
resume); any other code is a failure. Under a launcher (``deepspeed --module anchor.train ...``,
``srun python -m anchor.train ...``) every process is a rank. Without a launcher, training runs in one process.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from anchor import log
from anchor.arguments import positive
from anchor.engine.stop import (
    EXIT_REQUEUE,
    PARENT_VARIABLE,
    PROOF_VARIABLE,
    StopRequest,
    end_with_parent,
    group_timeout,
    prove_finished,
)
from anchor.errors import EXIT_USER_ERROR, exit_on_user_error

if TYPE_CHECKING:
    from anchor.config.train_recipe import TrainRecipe

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
    parser.add_argument("recipe", help="YAML recipe, see anchor/config/train_recipe.py")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace a value of the recipe")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the newest intact checkpoint, or start (default); --no-resume refuses a folder with a run",
    )
    dry = parser.add_argument_group("dry run")
    dry.add_argument("--dry-run", action="store_true", help="check everything, estimate memory, time and disk; no GPU")
    dry.add_argument("--ranks", type=positive, default=1, help="ranks of the run (1)")
    dry.add_argument("--ranks-per-node", type=positive, default=8, help="ranks that share fast links (8)")
    dry.add_argument(
        "--gpu", default="h100-80gb", help="h100-80gb, h200, a100-80gb, a100-40gb, l40s, cpu ... (h100-80gb)"
    )
    dry.add_argument("--network", type=float, default=50.0, metavar="GB/S", help="of each GPU's network adapter (50)")
    dry.add_argument("--mfu", type=float, default=0.4, help="assumed share of the peak FLOP/s (0.4)")
    dry.add_argument(
        "--pack", metavar="PACK_RECIPE", help="before packing: the batch from this recipe, as an upper bound"
    )
    dry.add_argument("--json", type=Path, metavar="PATH", help="write the report here too")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the DeepSpeed launcher adds it
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = _arguments(argv)
    if arguments.dry_run:
        log.setup()
        with exit_on_user_error():
            _dry_run(_recipe(arguments), arguments)
        return
    # Listen before any slow import: without a handler, a signal would end the process as if it had failed.
    with StopRequest().listening() as stop:
        stop.nothing_to_lose = True
        end_with_parent(os.environ.get(PARENT_VARIABLE))
        log.setup()
        with _leaving_at_once(), exit_on_user_error():
            finished = _train(_recipe(arguments), arguments.recipe, stop, resume=arguments.resume)
        from anchor import dist

        code = 0 if finished else EXIT_REQUEUE
        if __name__ == "__main__":
            dist.leave(code)
    if code:
        sys.exit(code)


def _recipe(arguments: argparse.Namespace) -> "TrainRecipe":
    """Read the recipe before torch is imported, so that a mistake is reported at once."""
    from anchor.config.load import load_recipe
    from anchor.config.train_recipe import TrainRecipe

    return load_recipe(arguments.recipe, TrainRecipe, arguments.overrides)


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """On a user error, exit without tearing down the process group: NCCL could block on the other ranks."""
    try:
        yield
    except SystemExit as stop:
        alone = os.environ.get("WORLD_SIZE", "1") == "1" or "torch" not in sys.modules
        if __name__ != "__main__" or alone:
            raise
        from anchor import dist

        dist.leave(stop.code if isinstance(stop.code, int) else EXIT_USER_ERROR)


def _dry_run(recipe: "TrainRecipe", arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from anchor.dry_run.report import Options, dry_run, write_report
    from anchor.dry_run.tables import print_report

    options = Options(
        arguments.ranks, arguments.ranks_per_node, arguments.gpu, arguments.mfu, arguments.pack, arguments.network * 1e9
    )
    report = dry_run(recipe, arguments.recipe, options)
    print_report(report, Console())
    if arguments.json is not None:
        write_report(report, arguments.json)


def _train(recipe: "TrainRecipe", recipe_path: str, stop: StopRequest, *, resume: bool) -> bool:
    """Train as one rank of the run.

    Returns:
        True if the run is finished; False if a signal stopped it and the same command would resume it.
    """
    from anchor import dist
    from anchor.engine.loop import train
    from anchor.engine.plan import make_plan
    from anchor.engine.run_folder import only_writer

    sys.excepthook = log.crash_reporter(None)
    ranks = dist.init(timeout=group_timeout(recipe.engine.timeout_seconds))
    stop.nothing_to_lose = False
    plan = make_plan(recipe, recipe_path, ranks.world_size)
    with only_writer(recipe.output_dir):
        path = log.rank_file(recipe.output_dir / "logs")
        sys.excepthook = log.crash_reporter(path)
        with log.kept_in(path) as stacks:
            finished = train(plan, ranks, stop, resume=resume, stacks=stacks)
        dist.barrier()  # no rank exits before all have decided: a launcher kills the others when one exits
    if finished and dist.is_first_rank():
        prove_finished(os.environ.get(PROOF_VARIABLE))
    dist.shutdown()
    return finished


if __name__ == "__main__":
    main(sys.argv[1:])
