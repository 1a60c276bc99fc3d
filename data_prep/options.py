"""Command-line options of data preparation, command by command."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from anchor.arguments import count, describe, part, positive
from anchor.errors import shortened


class _Command(NamedTuple):
    help: str
    description: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides of a recipe may stand before or after options."""
    parser = make_parser()
    # `parse_intermixed_args` does not support subcommands.
    found, others = parser.parse_known_args(arguments)
    if "overrides" in found and not any(other.startswith("-") for other in others):
        found.overrides += others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return found


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``python -m data_prep``; ``command`` holds the name of the command."""
    parser = describe(
        argparse.ArgumentParser(prog="python -m data_prep"),
        "Raw pairs -> packed shards, without GPU; only respond, teach and mine --model need torch.",
        "python -m data_prep pack launch/recipes/quickstart/pack.yaml",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        command.options(describe(commands.add_parser(name, help=command.help), command.description, command.example))
    return parser


def _pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, see anchor/config/pack_recipe.py")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="instead of the recipe's value")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes; the result is the same")
    parser.add_argument(
        "--part", type=part, metavar="I/N", help="only part I (from 0) of N, as one job of an array; then merge"
    )


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="the recipe of the parts")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="those of the parts")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes; the result is the same")


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder written by pack")
    parser.add_argument("--verify", action="store_true", help="check every file, checksum, span and count")
    parser.add_argument("--show", type=count, default=0, metavar="N", help="decode N pairs, bodies between ⟦ and ⟧")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the histogram of lengths, per source")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def _docs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for pairs/ and heldout/")
    parser.add_argument(
        "--packages", type=_names, metavar="A,B", help="import names; well-known installed ones if absent"
    )
    parser.add_argument(
        "--heldout-pairs", type=positive, default=300, metavar="N", help="held-out queries (%(default)s)"
    )
    parser.add_argument(
        "--heldout-documents", type=positive, default=400, metavar="N", help="held-out corpus (%(default)s)"
    )
    parser.add_argument("--max-pairs", type=positive, metavar="N", help="at most so many training pairs; all if absent")
    parser.add_argument("--seed", type=count, default=0, help="seed of split and order (%(default)s)")


def _decontaminate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pairs", type=Path, metavar="PAIRS", help="folder of NAME.jsonl[.gz|.zst], or one such file")
    parser.add_argument("--against", type=Path, nargs="+", required=True, metavar="TASK", help="task folders or files")
    parser.add_argument("--output", type=Path, metavar="DIR", help="new folder for the pairs that match nothing")
    parser.add_argument("--overlap", type=float, default=0.5, help="least share of n-grams of a match (%(default)s)")
    parser.add_argument(
        "--ngram-words", type=positive, default=13, metavar="N", help="words of an n-gram (%(default)s)"
    )
    parser.add_argument("--min-words", type=count, default=3, metavar="N", help="ignore shorter texts (%(default)s)")
    parser.add_argument("--examples", type=count, default=2, metavar="N", help="shown per task (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def _mine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pairs", type=Path, metavar="PAIRS", help="folder of NAME.jsonl[.gz|.zst], or one such file")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder, in the same layout")
    parser.add_argument("--negatives", type=positive, required=True, metavar="N", help="hard negatives per query")
    parser.add_argument(
        "--ranks", type=_ranks, required=True, metavar="A-B", help="ranks to draw from, without positives"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="sentence-transformers folder; BM25 if absent")
    parser.add_argument("--device", default="cpu", help="of the model (%(default)s)")
    parser.add_argument("--margin", type=float, metavar="M", help="leave out scores above the positive's - M")
    parser.add_argument(
        "--relative-margin", type=float, metavar="R", help="leave out scores above (1 - R) x the positive's"
    )
    parser.add_argument("--seed", type=count, default=0, help="seed of the draw (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def _respond(parser: argparse.ArgumentParser) -> None:
    parser.usage = "python -m data_prep respond MODEL --questions FILE --output DIR [options]"  # argparse's has 8 lines
    parser.add_argument("model", metavar="MODEL", help="model folder, hub name or .gguf file")
    parser.add_argument("--questions", type=Path, nargs="+", required=True, metavar="FILE", help="files or folders")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for answers/ and rejects/")
    parser.add_argument("--column", default="question", metavar="NAME", help="field of the question (%(default)s)")
    parser.add_argument("--part", type=part, default=(0, 1), metavar="I/N", help="only part I (from 0) of N")
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "transformers"),
        default="auto",
        metavar="NAME",
        help="vllm, transformers or auto (%(default)s)",
    )
    parser.add_argument("--batch-tokens", type=positive, metavar="N", help="of a batch, prompts and answers")
    parser.add_argument("--max-new-tokens", type=positive, default=500, metavar="N", help="of an answer (%(default)s)")
    parser.add_argument(
        "--max-input-tokens", type=positive, default=1024, metavar="N", help="of a prompt (%(default)s)"
    )
    parser.add_argument("--seed", type=count, default=0, help="of the sampling (%(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the model (%(default)s)")
    parser.add_argument("--device", default="cpu", help="of the engine transformers (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def _teach(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder written by pack")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder of shards")
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="sentence-transformers folder; MiniLM if absent")
    parser.add_argument("--prompt", metavar="TEXT", help="before every text; the teacher's for documents if absent")
    parser.add_argument("--normalize", action="store_true", help="make the vectors unit vectors")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="texts at once (%(default)s)")
    parser.add_argument("--part", type=part, metavar="I/N", help="only embed part I (from 0) of N; then run without")
    parser.add_argument("--device", default="cpu", help="of the teacher (%(default)s)")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected import names with commas between them")
    return names


def _ranks(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        return count(first), count(last)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected two ranks such as 3-50, got {shortened(text)}") from error


_COMMANDS = {
    "pack": _Command(
        "tokenise and pack pairs as a recipe says",
        "Tokenise and pack pairs as a recipe says; run again after an interruption, it continues.",
        "python -m data_prep pack launch/recipes/quickstart/pack.yaml batch.pairs=64",
        _pack,
    ),
    "merge": _Command(
        "make shards of the parts of `pack --part`",
        "Make shards of the parts that `pack --part` has left: the same bytes as one `pack`.",
        "python -m data_prep merge launch/recipes/quickstart/pack.yaml --workers 8",
        _merge,
    ),
    "inspect": _Command(
        "report on a folder of shards",
        "Report on a folder of shards: rows, drops, batches, fill, lengths, balance.",
        "python -m data_prep inspect data/quickstart --verify --show 3",
        _inspect,
    ),
    "docs": _Command(
        "pairs from the documentation of installed Python packages",
        "Summary -> body of the docstrings of installed packages: training pairs and a held-out retrieval task.",
        "python -m data_prep docs --output data/docs --packages scipy,numpy",
        _docs,
    ),
    "decontaminate": _Command(
        "report or remove pairs that repeat evaluation texts",
        "Report pairs in E5 layout whose query or positive repeats an evaluation text; with --output, remove them.",
        "python -m data_prep decontaminate data/e5 --against mteb/scifact mteb/nq/queries.jsonl --output data/e5-clean",
        _decontaminate,
    ),
    "mine": _Command(
        "hard negatives by BM25 or an embedder",
        "Give every pair in E5 layout hard negatives from the documents of its source, by BM25 or an embedder.",
        "python -m data_prep mine data/e5 --output data/e5-mined --negatives 2 --ranks 3-50 --model runs/m/export",
        _mine,
    ),
    "respond": _Command(
        "a language model's own answers to questions",
        "Let a language model answer questions, for self-supervised training; run again, it continues.",
        "python -m data_prep respond models/Qwen3-0.6B --questions data/questions.jsonl --output data/answers",
        _respond,
    ),
    "teach": _Command(
        "a teacher's embeddings of the positives of packed shards",
        "Write shards anew with a teacher's embedding of every positive, as training will see its text.",
        "python -m data_prep teach data/answers-packed --teacher models/all-mpnet-base-v2 --output data/taught",
        _teach,
    ),
}
