"""Command-line options of ``python -m eval``, command by command."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from anchor.arguments import describe, positive

_MORE = "python -m eval COMMAND --help says more, with an example of each"


class _Command(NamedTuple):
    description: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``python -m eval``; it stores the command's name in ``command``."""
    parser = argparse.ArgumentParser(prog="python -m eval")
    describe(parser, "Embeddings and scores of a model folder.", f"{_COMMANDS['decode'].example}\n\n{_MORE}")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the DeepSpeed launcher adds it
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        command.options(
            describe(commands.add_parser(name, help=command.description), command.description, command.example)
        )
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="where a self-supervised folder's base model lies (as anchor.json says)")
    parser.add_argument("model", type=Path, help="folder exported by anchor.train")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="compute dtype (fp32)")
    parser.add_argument("--attention", choices=("segments", "varlen", "flash"), help="kernel (by device and dtype)")
    parser.add_argument("--pack-tokens", type=positive, default=8192, help="most tokens of one forward pass (8192)")


def _embed(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument(
        "--input", required=True, help=".jsonl, .csv, .tsv, .txt (or .gz, .zst), .parquet, or - (stdin)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the vectors")
    parser.add_argument("--prompt", help="name of a prompt of the folder: query, document, ...")
    parser.add_argument("--format", choices=("jsonl", "csv", "tsv", "parquet", "txt"), help="of the input (by suffix)")
    parser.add_argument("--text-field", default="text", help="field or column of the text (text)")
    parser.add_argument("--id-field", help="field or column of the id (id, or the text's number)")
    parser.add_argument("--output-format", choices=("npy", "parquet", "safetensors"), default="npy", help="(npy)")
    parser.add_argument("--output-dtype", choices=("fp32", "fp16"), default="fp32", help="of the stored vectors (fp32)")
    parser.add_argument("--dimension", type=positive, help="keep the first so many components (Matryoshka)")
    parser.add_argument("--raw", action="store_true", help="anchor states as they are, not of length 1")
    parser.add_argument(
        "--shard-texts", type=positive, default=2048, help="texts of a part, the unit of resuming (2048)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace vectors that the folder holds")


def _mteb(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--benchmark", help="all tasks of 'MTEB(eng, v1)', 'MTEB(eng, v2)', lite, anchor15, ...")
    parser.add_argument("--tasks", default="", help="names of mteb tasks, separated by commas; AdvBench-IR")
    parser.add_argument("--prompts", help="anchor, llm2vec_gen, a YAML file, or folder (by the objective)")
    parser.add_argument("--max-tokens", type=positive, help="longest text, template and prompt included (the folder's)")
    parser.add_argument("--retrieval", type=Path, action="append", default=[], help="folder of a local retrieval task")
    parser.add_argument("--data-root", type=Path, help="offline copy of the tasks' data, by hub path")
    parser.add_argument("--partial", action="store_true", help="score the tasks whose data is there")
    parser.add_argument("--output", type=Path, help="folder of the results (MODEL/mteb)")
    parser.add_argument("--no-cache", action="store_true", help="keep no vectors on disk while a task is scored")
    parser.add_argument("--at-once", type=int, choices=(1, 2), default=2, help="2: embed while a task is scored (2)")
    parser.add_argument("--compare", action="append", default=[], metavar="LABEL=DIR", help="also show; or 'published'")


def _fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--benchmark", help="all tasks of a benchmark")
    parser.add_argument("--tasks", default="", help="names of tasks, separated by commas")
    parser.add_argument("--data-root", type=Path, required=True, help="the offline copy")
    parser.add_argument("--source", type=Path, help="copy from this offline copy instead of the hub")
    parser.add_argument("--verify", action="store_true", help="only check the files of the copy")


def _decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder exported by anchor.train")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", action="append", help="a text to embed and decode")
    what.add_argument("--input", help="texts, as eval embed reads them; or - (stdin)")
    what.add_argument("--vectors", type=Path, help="folder of eval embed")
    what.add_argument("--pairs", type=Path, help="JSON lines with 'query' and 'positive': also scores the decoding")
    parser.add_argument("--base", help="where a self-supervised folder's base model lies (as anchor.json says)")
    parser.add_argument("--prompt", help="with --text, --input: name of a prompt of the folder")
    directions = ("both", "document_to_query", "query_to_document")
    parser.add_argument("--direction", choices=directions, help="with --pairs (both)")
    parser.add_argument("--beams", type=positive, default=1, help="1 is greedy (1)")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="of a decoded text (64)")
    parser.add_argument("--limit", type=positive, help="only the first so many")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="compute dtype (fp32)")
    parser.add_argument("--pack-tokens", type=positive, default=8192, help="most tokens of one forward pass (8192)")
    parser.add_argument("--output", type=Path, help="JSON lines instead of the terminal")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="[LABEL=]DIR", help="run folder, or output of eval mteb")
    parser.add_argument("--output", type=Path, required=True, help="the file")
    parser.add_argument("--title", default="Anchor report", help="of the page")
    parser.add_argument("--benchmark", help="also categories and averages of a benchmark, beside published rows")
    parser.add_argument("--model", type=Path, help="model folder whose embeddings are looked at")
    parser.add_argument("--base", help="where a self-supervised folder's base model lies (as anchor.json says)")
    parser.add_argument("--pairs", type=Path, help="similarities and neighbours: JSON lines, or a retrieval folder")
    parser.add_argument("--labelled", type=Path, help="2-D map: JSON lines with 'text' and 'label'")
    parser.add_argument("--decoded", type=Path, help="output of eval decode")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="compute dtype (fp32)")
    parser.add_argument("--pack-tokens", type=positive, default=8192, help="most tokens of one forward pass (8192)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")


def _table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--benchmark", help="categories and averages of a benchmark instead of single tasks")
    parser.add_argument("--published", action="store_true", help="with --benchmark: published rows too")
    parser.add_argument("results", nargs="+", metavar="LABEL=DIR", help="folder written by `eval mteb`")


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="FOLDER", help="with encoder/, reconstruction_mlp, ...")
    parser.add_argument("--output", type=Path, required=True, help="the new folder")
    parser.add_argument("--base", help="where the base model lies (as run_config.yml says)")
    parser.add_argument("--max-tokens", type=positive, default=512, help="longest text, special tokens included (512)")
    parser.add_argument("--overwrite", action="store_true", help="replace the new folder")


_COMMANDS = {
    "embed": _Command(
        "Embed the texts of a file.",
        "python -m eval embed runs/quickstart/stage2/export --input texts.jsonl --output vectors --prompt query",
        _embed,
    ),
    "mteb": _Command(
        "Score a model on mteb tasks.",
        "python -m eval mteb runs/quickstart/stage2/export --tasks SciFact,STSBenchmark --data-root mteb-data",
        _mteb,
    ),
    "fetch": _Command(
        "Copy the data of tasks for machines without a network.",
        "python -m eval fetch --benchmark 'MTEB(eng, v2)' --data-root mteb-data",
        _fetch,
    ),
    "decode": _Command(
        "Say in words what an embedding holds, by the language model that made it.",
        "python -m eval decode runs/quickstart/stage1/export --text 'An anchor holds a ship in place.'",
        _decode,
    ),
    "report": _Command(
        "One HTML file of runs, scores and embeddings, readable offline.",
        "python -m eval report runs/quickstart/stage1 runs/quickstart/stage2 --output report.html",
        _report,
    ),
    "table": _Command(
        "Main scores of several result folders side by side.",
        "python -m eval table untrained=runs/a/mteb trained=runs/b/mteb",
        _table,
    ),
    "convert": _Command(
        "Make a model folder of this project from one in LLM2Vec-Gen's published layout.",
        "python -m eval convert LLM2Vec-Gen-Qwen3-8B --output models/llm2vec-gen --base models/Qwen3-8B",
        _convert,
    ),
}
