"""``python -m data_prep``: the command line of data preparation."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from anchor import log
from anchor.errors import exit_on_user_error


def _parser() -> argparse.ArgumentParser:
    parser = _command(
        argparse.ArgumentParser(prog="python -m data_prep"),
        "Raw pairs -> packed shards, on a machine without GPU or torch.",
        "python -m data_prep pack launch/recipes/quickstart/pack.yaml",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    pack = _command(
        commands.add_parser("pack", help="tokenise and pack pairs as a recipe says"),
        "Tokenise and pack pairs as a recipe says; run again after an interruption, it continues.",
        "python -m data_prep pack launch/recipes/quickstart/pack.yaml batch.pairs=64",
    )
    pack.add_argument("recipe", metavar="RECIPE", help="YAML file, see anchor/config/schema.py: PackRecipe")
    pack.add_argument("overrides", nargs="*", metavar="section.key=value", help="instead of the recipe's value")
    pack.add_argument("--workers", type=_workers, default=1, metavar="N", help="processes; the result is the same")
    pack.add_argument(
        "--part", type=_part, metavar="I/N", help="only part I (from 0) of N, as one job of an array; then merge"
    )

    merge = _command(
        commands.add_parser("merge", help="make shards of the parts of `pack --part`"),
        "Make shards of the parts that `pack --part` has left: the same bytes as one `pack`.",
        "python -m data_prep merge launch/recipes/quickstart/pack.yaml --workers 8",
    )
    merge.add_argument("recipe", metavar="RECIPE", help="the recipe of the parts")
    merge.add_argument("overrides", nargs="*", metavar="section.key=value", help="those of the parts")
    merge.add_argument("--workers", type=_workers, default=1, metavar="N", help="processes; the result is the same")

    inspect = _command(
        commands.add_parser("inspect", help="report on a folder of shards"),
        "Report on a folder of shards: rows, drops, batches, fill, lengths, balance.",
        "python -m data_prep inspect data/quickstart --verify --show 3",
    )
    inspect.add_argument("folder", type=Path, metavar="DIR", help="folder written by pack")
    inspect.add_argument("--verify", action="store_true", help="check every file, checksum, span and count")
    inspect.add_argument("--show", type=_count, default=0, metavar="N", help="decode N pairs, bodies between ⟦ and ⟧")
    inspect.add_argument("--png", type=Path, metavar="FILE", help="draw the histogram of lengths, per source")
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of tables")

    docs = _command(
        commands.add_parser("docs", help="pairs from the documentation of installed Python packages"),
        "Summary -> body of the docstrings of installed packages: training pairs and a held-out retrieval task.",
        "python -m data_prep docs --output data/docs --packages scipy,numpy",
    )
    docs.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for pairs/ and heldout/")
    docs.add_argument(
        "--packages", type=_names, metavar="A,B", help="import names; well-known installed ones if absent"
    )
    docs.add_argument("--heldout-pairs", type=int, default=300, metavar="N", help="held-out queries (%(default)s)")
    docs.add_argument("--heldout-documents", type=int, default=400, metavar="N", help="held-out corpus (%(default)s)")
    docs.add_argument("--max-pairs", type=int, metavar="N", help="at most so many training pairs; all if absent")
    docs.add_argument("--seed", type=int, default=0, help="seed of split and order (%(default)s)")

    clean = _command(
        commands.add_parser("decontaminate", help="report or remove pairs that repeat evaluation texts"),
        "Report pairs in E5 layout whose query or positive repeats an evaluation text; with --output, remove them.",
        "python -m data_prep decontaminate data/e5 --against mteb/scifact mteb/nq/queries.jsonl --output data/e5-clean",
    )
    clean.add_argument("pairs", type=Path, metavar="PAIRS", help="folder of NAME.jsonl[.gz|.zst], or one such file")
    clean.add_argument("--against", type=Path, nargs="+", required=True, metavar="TASK", help="task folders or files")
    clean.add_argument("--output", type=Path, metavar="DIR", help="new folder for the pairs that match nothing")
    clean.add_argument("--overlap", type=float, default=0.5, help="least share of n-grams of a match (%(default)s)")
    clean.add_argument("--ngram-words", type=int, default=13, metavar="N", help="words of an n-gram (%(default)s)")
    clean.add_argument("--min-words", type=int, default=3, metavar="N", help="ignore shorter texts (%(default)s)")
    clean.add_argument("--examples", type=_count, default=2, metavar="N", help="shown per task (%(default)s)")
    clean.add_argument("--json", action="store_true", help="one JSON object instead of tables")

    mine = _command(
        commands.add_parser("mine", help="hard negatives by BM25 or an embedder"),
        "Give every pair in E5 layout hard negatives from the documents of its source, by BM25 or an embedder.",
        "python -m data_prep mine data/e5 --output data/e5-mined --negatives 2 --ranks 3-50 --model runs/m/export",
    )
    mine.add_argument("pairs", type=Path, metavar="PAIRS", help="folder of NAME.jsonl[.gz|.zst], or one such file")
    mine.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder, in the same layout")
    mine.add_argument("--negatives", type=int, required=True, metavar="N", help="hard negatives per query")
    mine.add_argument(
        "--ranks", type=_ranks, required=True, metavar="A-B", help="ranks to draw from, without positives"
    )
    mine.add_argument("--model", type=Path, metavar="DIR", help="sentence-transformers folder; BM25 if absent")
    mine.add_argument("--device", default="cpu", help="of the model (%(default)s)")
    mine.add_argument("--margin", type=float, metavar="M", help="leave out scores above the positive's - M")
    mine.add_argument(
        "--relative-margin", type=float, metavar="R", help="leave out scores above (1 - R) x the positive's"
    )
    mine.add_argument("--seed", type=_count, default=0, help="seed of the draw (%(default)s)")
    mine.add_argument("--json", action="store_true", help="one JSON object instead of a table")

    respond = _command(
        commands.add_parser("respond", help="a language model's own answers to questions"),
        "Let a language model answer questions, for self-supervised training; run again, it continues.",
        "python -m data_prep respond models/Qwen3-0.6B --questions data/questions.jsonl --output data/answers",
    )
    respond.add_argument("model", metavar="MODEL", help="model folder, hub name or .gguf file")
    respond.add_argument("--questions", type=Path, nargs="+", required=True, metavar="FILE", help="files or folders")
    respond.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for answers/ and rejects/")
    respond.add_argument("--column", default="question", metavar="NAME", help="field of the question (%(default)s)")
    respond.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="only part I (from 0) of N")
    respond.add_argument("--engine", choices=("auto", "vllm", "transformers"), default="auto", help="(%(default)s)")
    respond.add_argument("--batch-tokens", type=_positive, metavar="N", help="of a batch, prompts and answers")
    respond.add_argument("--max-new-tokens", type=_positive, default=500, metavar="N", help="(%(default)s)")
    respond.add_argument("--max-input-tokens", type=_positive, default=1024, metavar="N", help="(%(default)s)")
    respond.add_argument("--seed", type=_count, default=0, help="of the sampling (%(default)s)")
    respond.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the model (%(default)s)")
    respond.add_argument("--device", default="cpu", help="of the engine transformers (%(default)s)")
    respond.add_argument("--json", action="store_true", help="one JSON object instead of a table")

    teach = _command(
        commands.add_parser("teach", help="a teacher's embeddings of the positives of packed shards"),
        "Write shards anew with a teacher's embedding of every positive, as training will see its text.",
        "python -m data_prep teach data/answers-packed --teacher models/all-mpnet-base-v2 --output data/taught",
    )
    teach.add_argument("shards", type=Path, metavar="SHARDS", help="folder written by pack")
    teach.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder of shards")
    teach.add_argument("--teacher", type=Path, metavar="DIR", help="sentence-transformers folder; MiniLM if absent")
    teach.add_argument("--prompt", metavar="TEXT", help="before every text; the teacher's for documents if absent")
    teach.add_argument("--normalize", action="store_true", help="make the vectors unit vectors")
    teach.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="texts at once (%(default)s)")
    teach.add_argument("--part", type=_part, metavar="I/N", help="only embed part I (from 0) of N; then run without")
    teach.add_argument("--device", default="cpu", help="of the teacher (%(default)s)")
    return parser


def _command(parser: argparse.ArgumentParser, description: str, example: str) -> argparse.ArgumentParser:
    parser.description, parser.epilog = description, f"example: {example}"
    # argparse would wrap the example in the middle of the command.
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected import names with commas between them")
    return names


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of processes, at least 1, got '{text}'")
    return int(text)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"expected a part such as 0/4, from 0/4 to 3/4, got '{text}'")
    return int(part), int(parts)


def _ranks(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected two ranks such as 3-50, got '{text}'")
    return int(first), int(last)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number, at least 1, got '{text}'")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, got '{text}'")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run one command; a user's error is one line and exit code 2."""
    args = _parser().parse_args(arguments)
    log.setup()
    with exit_on_user_error():
        # Imported here, so that --help and a wrong option answer at once.
        if args.command == "pack":
            from data_prep.pack import pack

            pack(args.recipe, args.overrides, args.workers, args.part)
        elif args.command == "merge":
            from data_prep.pack import merge

            merge(args.recipe, args.overrides, args.workers)
        elif args.command == "inspect":
            from data_prep.inspect import inspect

            inspect(args.folder, verify_all=args.verify, show=args.show, as_json=args.json, png=args.png)
        elif args.command == "decontaminate":
            from data_prep.decontaminate import decontaminate

            decontaminate(
                args.pairs,
                args.against,
                args.output,
                overlap=args.overlap,
                ngram_words=args.ngram_words,
                min_words=args.min_words,
                examples=args.examples,
                as_json=args.json,
            )
        elif args.command == "mine":
            from data_prep.mine import Window, mine

            window = Window(
                negatives=args.negatives,
                first_rank=args.ranks[0],
                last_rank=args.ranks[1],
                seed=args.seed,
                margin=args.margin,
                relative_margin=args.relative_margin,
            )
            mine(args.pairs, args.output, window, as_json=args.json, model=args.model, device=args.device)
        elif args.command == "respond":
            from data_prep.respond import Options, respond

            given = {name: value for name, value in vars(args).items() if name not in ("command", "json", "questions")}
            respond(Options(questions=tuple(args.questions), **given), as_json=args.json)
        elif args.command == "teach":
            from data_prep.teach import teach

            teach(
                args.shards,
                args.output,
                teacher=args.teacher,
                prompt=args.prompt,
                normalize=args.normalize,
                batch_size=args.batch_size,
                part=args.part,
                device=args.device,
            )
        else:
            from data_prep.docs import write_docs

            write_docs(
                args.output,
                args.packages,
                heldout_pairs=args.heldout_pairs,
                heldout_documents=args.heldout_documents,
                max_pairs=args.max_pairs,
                seed=args.seed,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
