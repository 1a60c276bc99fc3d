"""``python -m eval {embed,mteb,table}``."""

import argparse
import logging
import sys
from pathlib import Path

from anchor import log as anchor_log
from anchor.errors import ConfigError, exit_on_user_error

log = logging.getLogger("eval")

_EXAMPLES = {
    "embed": "python -m eval embed runs/quickstart/stage2/export --input texts.jsonl --output vectors --prompt query",
    "mteb": "python -m eval mteb runs/quickstart/stage2/export --tasks SciFact,STSBenchmark --data-root mteb-data",
    "table": "python -m eval table untrained=runs/a/mteb trained=runs/b/mteb",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval", description="Embeddings and scores of a model folder.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, epilog=f"example: {_EXAMPLES[name]}")

    embed = command("embed", "Embed the texts of a file.")
    mteb = command("mteb", "Score a model on mteb tasks.")
    for one in (embed, mteb):
        one.add_argument("model", type=Path, help="folder exported by anchor.train")
        one.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="compute dtype (fp32)")
        one.add_argument("--attention", choices=("segments", "varlen", "flash"), help="kernel (by the device)")
        one.add_argument("--pack-tokens", type=int, default=8192, help="tokens of one forward pass (8192)")
    embed.add_argument("--input", required=True, help=".jsonl with 'text' and 'id', .parquet, .txt, or - (stdin)")
    embed.add_argument("--output", type=Path, required=True, help="folder of the vectors")
    embed.add_argument("--prompt", help="name of a prompt of the folder: query, document, ...")
    embed.add_argument("--format", choices=("jsonl", "parquet", "txt"), help="of the input (by its suffix)")
    embed.add_argument("--text-field", default="text", help="field or column of the text (text)")
    embed.add_argument("--id-field", default="id", help="field or column of the id (id)")
    embed.add_argument("--output-format", choices=("npy", "parquet", "safetensors"), default="npy", help="(npy)")
    embed.add_argument("--output-dtype", choices=("fp32", "fp16"), default="fp32", help="of the stored vectors (fp32)")
    embed.add_argument("--dimension", type=int, help="keep the first so many components (Matryoshka)")
    embed.add_argument("--raw", action="store_true", help="anchor states as they are, not of length 1")
    embed.add_argument("--shard-texts", type=int, default=2048, help="texts of a part, the unit of resuming (2048)")
    embed.add_argument("--overwrite", action="store_true", help="replace vectors that the folder holds")
    mteb.add_argument("--tasks", default="", help="names of mteb tasks, separated by commas")
    mteb.add_argument("--retrieval", type=Path, action="append", default=[], help="folder of a local retrieval task")
    mteb.add_argument("--data-root", type=Path, help="offline copy of the tasks' data, by hub path")
    mteb.add_argument("--output", type=Path, help="folder of the results (MODEL/mteb)")
    table = command("table", "Main scores of several result folders side by side.")
    table.add_argument("results", nargs="+", metavar="LABEL=DIR", help="folder written by `eval mteb`")
    return parser


def _mteb(arguments: argparse.Namespace) -> None:
    from eval.benchmark import local_retrieval_task, run_tasks, tasks_by_name
    from eval.encoder import Encoder

    names = [name for name in arguments.tasks.split(",") if name]
    tasks = tasks_by_name(names, arguments.data_root) if names else []
    tasks += [local_retrieval_task(folder) for folder in arguments.retrieval]
    if not tasks:
        raise ConfigError("eval mteb: nothing to score; give --tasks or --retrieval")
    encoder = Encoder(
        arguments.model, dtype=arguments.dtype, attention=arguments.attention, pack_tokens=arguments.pack_tokens
    )
    output = arguments.output or arguments.model / "mteb"
    for name, score in run_tasks(encoder, tasks, output).items():
        log.info("%s %.4f", name, score)
    log.info("results in %s", output)


def _embed(arguments: argparse.Namespace) -> None:
    from anchor import dist
    from eval.embed import Options, embed
    from eval.encoder import open_encoder
    from eval.texts import Source

    path = None if arguments.input == "-" else Path(arguments.input)
    source = Source(path, arguments.format, arguments.text_field, arguments.id_field)
    options = Options(
        prompt=arguments.prompt,
        normalize=not arguments.raw,
        dimension=arguments.dimension,
        dtype=arguments.output_dtype,
        format=arguments.output_format,
        shard_texts=arguments.shard_texts,
    )
    dist.init()
    try:
        encoder = open_encoder(
            arguments.model, dtype=arguments.dtype, attention=arguments.attention, pack_tokens=arguments.pack_tokens
        )
        embed(encoder, source, arguments.output, options, overwrite=arguments.overwrite)
    finally:
        dist.shutdown()


def _table(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from eval.table import score_table

    labelled = []
    for item in arguments.results:
        label, equals, folder = item.partition("=")
        if not equals:
            raise ConfigError(f"eval table: expected LABEL=DIR, got '{item}'")
        labelled.append((label, Path(folder)))
    Console().print(score_table(labelled))


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    arguments = _parser().parse_args(argv)
    anchor_log.setup()
    with exit_on_user_error():
        {"embed": _embed, "mteb": _mteb, "table": _table}[arguments.command](arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
