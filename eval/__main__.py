"""``python -m eval {embed,mteb,fetch,decode,report,table,convert}``."""

import argparse
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from anchor import log as anchor_log
from anchor.errors import ConfigError, DataError, exit_on_user_error

if TYPE_CHECKING:
    from mteb.abstasks.abstask import AbsTask
    from mteb.benchmarks.benchmark import Benchmark

log = logging.getLogger("eval")

_EXAMPLES = {
    "embed": "python -m eval embed runs/quickstart/stage2/export --input texts.jsonl --output vectors --prompt query",
    "mteb": "python -m eval mteb runs/quickstart/stage2/export --tasks SciFact,STSBenchmark --data-root mteb-data",
    "fetch": "python -m eval fetch --benchmark 'MTEB(eng, v2)' --data-root mteb-data",
    "decode": "python -m eval decode runs/quickstart/stage1/export --text 'An anchor holds a ship in place.'",
    "report": "python -m eval report runs/quickstart/stage1 runs/quickstart/stage2 --output report.html",
    "table": "python -m eval table untrained=runs/a/mteb trained=runs/b/mteb",
    "convert": "python -m eval convert LLM2Vec-Gen-Qwen3-8B --output models/llm2vec-gen --base models/Qwen3-8B",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval", description="Embeddings and scores of a model folder.")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the DeepSpeed launcher adds it
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, epilog=f"example: {_EXAMPLES[name]}")

    embed = command("embed", "Embed the texts of a file.")
    mteb = command("mteb", "Score a model on mteb tasks.")
    for one in (embed, mteb):
        one.add_argument("--base", help="where a self-supervised folder's base model lies (as anchor.json says)")
        one.add_argument("model", type=Path, help="folder exported by anchor.train")
        one.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="compute dtype (fp32)")
        one.add_argument("--attention", choices=("segments", "varlen", "flash"), help="kernel (by the device)")
        one.add_argument("--pack-tokens", type=_positive, default=8192, help="tokens of one forward pass (8192)")
    embed.add_argument("--input", required=True, help=".jsonl with 'text' and 'id', .parquet, .txt, or - (stdin)")
    embed.add_argument("--output", type=Path, required=True, help="folder of the vectors")
    embed.add_argument("--prompt", help="name of a prompt of the folder: query, document, ...")
    embed.add_argument("--format", choices=("jsonl", "parquet", "txt"), help="of the input (by its suffix)")
    embed.add_argument("--text-field", default="text", help="field or column of the text (text)")
    embed.add_argument("--id-field", default="id", help="field or column of the id (id)")
    embed.add_argument("--output-format", choices=("npy", "parquet", "safetensors"), default="npy", help="(npy)")
    embed.add_argument("--output-dtype", choices=("fp32", "fp16"), default="fp32", help="of the stored vectors (fp32)")
    embed.add_argument("--dimension", type=_positive, help="keep the first so many components (Matryoshka)")
    embed.add_argument("--raw", action="store_true", help="anchor states as they are, not of length 1")
    embed.add_argument(
        "--shard-texts", type=_positive, default=2048, help="texts of a part, the unit of resuming (2048)"
    )
    embed.add_argument("--overwrite", action="store_true", help="replace vectors that the folder holds")
    mteb.add_argument("--benchmark", help="all tasks of 'MTEB(eng, v1)', 'MTEB(eng, v2)', lite, ...")
    mteb.add_argument("--tasks", default="", help="names of mteb tasks, separated by commas; AdvBench-IR")
    mteb.add_argument("--prompts", help="anchor, llm2vec_gen, a YAML file, or folder (by the objective)")
    mteb.add_argument("--retrieval", type=Path, action="append", default=[], help="folder of a local retrieval task")
    mteb.add_argument("--data-root", type=Path, help="offline copy of the tasks' data, by hub path")
    mteb.add_argument("--partial", action="store_true", help="score the tasks whose data is there")
    mteb.add_argument("--output", type=Path, help="folder of the results (MODEL/mteb)")
    mteb.add_argument("--no-cache", action="store_true", help="keep no vectors on disk while a task is scored")
    mteb.add_argument("--at-once", type=int, choices=(1, 2), default=2, help="2: embed while a task is scored (2)")
    mteb.add_argument("--compare", action="append", default=[], metavar="LABEL=DIR", help="also show; or 'published'")
    fetch = command("fetch", "Copy the data of tasks for machines without a network.")
    fetch.add_argument("--benchmark", help="all tasks of a benchmark")
    fetch.add_argument("--tasks", default="", help="names of tasks, separated by commas")
    fetch.add_argument("--data-root", type=Path, required=True, help="the offline copy")
    fetch.add_argument("--source", type=Path, help="copy from this offline copy instead of the hub")
    fetch.add_argument("--verify", action="store_true", help="only check the files of the copy")
    decode = command("decode", "Say in words what an embedding holds, by the language model that made it.")
    decode.add_argument("model", type=Path, help="folder exported by anchor.train")
    what = decode.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", action="append", help="a text to embed and decode")
    what.add_argument("--input", type=Path, help="texts, as eval embed reads them")
    what.add_argument("--vectors", type=Path, help="folder of eval embed")
    what.add_argument("--pairs", type=Path, help="JSON lines with 'query' and 'positive': also scores the decoding")
    decode.add_argument("--base", help="where a self-supervised folder's base model lies (as anchor.json says)")
    decode.add_argument("--prompt", help="with --text, --input: name of a prompt of the folder")
    directions = ("both", "document_to_query", "query_to_document")
    decode.add_argument("--direction", choices=directions, default="both", help="with --pairs (both)")
    decode.add_argument("--beams", type=_positive, default=1, help="1 is greedy (1)")
    decode.add_argument("--max-new-tokens", type=_positive, default=64, help="of a decoded text (64)")
    decode.add_argument("--limit", type=_positive, help="only the first so many")
    decode.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="compute dtype (fp32)")
    decode.add_argument("--pack-tokens", type=_positive, default=8192, help="tokens of one forward pass (8192)")
    decode.add_argument("--output", type=Path, help="JSON lines instead of the terminal")
    decode.add_argument("--overwrite", action="store_true", help="replace the output file")
    report = command("report", "One HTML file of runs, scores and embeddings, readable offline.")
    report.add_argument("folders", nargs="+", metavar="[LABEL=]DIR", help="run folder, or output of eval mteb")
    report.add_argument("--output", type=Path, required=True, help="the file")
    report.add_argument("--title", default="Anchor report", help="of the page")
    report.add_argument("--benchmark", help="also categories and averages of a benchmark, beside published rows")
    report.add_argument("--model", type=Path, help="model folder whose embeddings are looked at")
    report.add_argument("--base", help="where a self-supervised folder's base model lies (as anchor.json says)")
    report.add_argument("--pairs", type=Path, help="similarities and neighbours: JSON lines, or a retrieval folder")
    report.add_argument("--labelled", type=Path, help="2-D map: JSON lines with 'text' and 'label'")
    report.add_argument("--decoded", type=Path, help="output of eval decode")
    report.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="compute dtype (fp32)")
    report.add_argument("--pack-tokens", type=_positive, default=8192, help="tokens of one forward pass (8192)")
    report.add_argument("--overwrite", action="store_true", help="replace the file")
    table = command("table", "Main scores of several result folders side by side.")
    table.add_argument("--benchmark", help="categories and averages of a benchmark instead of single tasks")
    table.add_argument("--published", action="store_true", help="with --benchmark: published rows too")
    table.add_argument("results", nargs="+", metavar="LABEL=DIR", help="folder written by `eval mteb`")
    convert = command("convert", "Make a model folder of this project from one in LLM2Vec-Gen's published layout.")
    convert.add_argument("model", type=Path, metavar="FOLDER", help="with encoder/, reconstruction_mlp, ...")
    convert.add_argument("--output", type=Path, required=True, help="the new folder")
    convert.add_argument("--base", help="where the base model lies (as run_config.yml says)")
    convert.add_argument(
        "--max-tokens", type=_positive, default=512, help="longest text, special tokens included (512)"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace the new folder")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number, at least 1, got '{text}'")
    return int(text)


def _mteb(arguments: argparse.Namespace) -> None:
    from anchor import dist
    from eval.benchmark import run_tasks
    from eval.opening import SELF_SUPERVISED, objective_of, open_encoder
    from eval.prompts import load_prompts
    from eval.ranks import RankedEncoder

    benchmark, tasks = _tasks(arguments)
    of_objective = "llm2vec_gen" if objective_of(arguments.model) == SELF_SUPERVISED else "anchor"
    name = arguments.prompts or of_objective
    prompts = None if name == "folder" else load_prompts(name)
    output = arguments.output or arguments.model / "mteb"
    labelled = [("this", output), *_labelled(item for item in arguments.compare if item != "published")]
    dist.init()
    try:
        encoder = RankedEncoder(
            open_encoder(
                arguments.model,
                dtype=arguments.dtype,
                attention=arguments.attention,
                pack_tokens=arguments.pack_tokens,
                base=arguments.base,
            )
        )
        if encoder.rank > 0:
            encoder.serve()
            return
        try:
            run_tasks(encoder, tasks, output, prompts, cache=not arguments.no_cache, at_once=arguments.at_once)
        finally:
            encoder.stop()
        _show(benchmark, labelled, published="published" in arguments.compare)
        log.info("results in %s", output)
    finally:
        dist.shutdown()


def _tasks(arguments: argparse.Namespace) -> tuple["Benchmark | None", list["AbsTask"]]:
    """The benchmark, if one is asked for, and all tasks to run; what has no data is named before a model is loaded."""
    from eval.tasks import find_benchmark, local_retrieval_task, named_tasks, with_data

    names = [name for name in arguments.tasks.split(",") if name]
    benchmark = find_benchmark(arguments.benchmark) if arguments.benchmark else None
    every = [*(benchmark.tasks if benchmark else []), *named_tasks(names)]
    wanted = list({task.metadata.name: task for task in every}.values())
    tasks, missing = with_data(wanted, arguments.data_root)
    if missing and not arguments.partial:
        what = f"{len(missing)} of {len(wanted)} tasks: {', '.join(missing)}"
        advice = "fetch them (python -m eval fetch), or add --partial to score the others"
        raise DataError(f"{arguments.data_root or 'eval mteb'}: no data for {what}; {advice}")
    if missing:
        log.warning("left out, no data: %s", ", ".join(missing))
    local = {folder.resolve().name: folder for folder in arguments.retrieval}
    if len(local) < len(arguments.retrieval):
        raise ConfigError("eval mteb: two --retrieval folders have one name, and results go by it; rename one")
    tasks += [local_retrieval_task(folder) for folder in local.values()]
    if not tasks:
        raise ConfigError("eval mteb: nothing to score; give --benchmark, --tasks or --retrieval")
    return benchmark, tasks


def _fetch(arguments: argparse.Namespace) -> None:
    from eval.fetch import fetch, verify
    from eval.tasks import find_benchmark, named_tasks

    if arguments.verify:
        log.info("%d files are as they were fetched", verify(arguments.data_root))
        return
    names = [name for name in arguments.tasks.split(",") if name]
    tasks = [*(find_benchmark(arguments.benchmark).tasks if arguments.benchmark else []), *named_tasks(names)]
    if not tasks:
        raise ConfigError("eval fetch: nothing to fetch; give --benchmark or --tasks")
    fetched = fetch(tasks, arguments.data_root, arguments.source)
    log.info("%d tasks, %d repositories fetched now, in %s", len(tasks), len(fetched), arguments.data_root)


def _embed(arguments: argparse.Namespace) -> None:
    from anchor import dist
    from eval.embed import Options, embed
    from eval.opening import open_encoder
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
            arguments.model,
            dtype=arguments.dtype,
            attention=arguments.attention,
            pack_tokens=arguments.pack_tokens,
            base=arguments.base,
        )
        embed(encoder, source, arguments.output, options, overwrite=arguments.overwrite)
    finally:
        dist.shutdown()


def _decode(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from eval.decode import Decoder, check_output, means, read_pairs, write_decoded
    from eval.opening import open_encoder
    from eval.texts import Source, read_texts

    if arguments.output is not None:
        check_output(arguments.output, overwrite=arguments.overwrite)
    encoder = open_encoder(
        arguments.model, dtype=arguments.dtype, pack_tokens=arguments.pack_tokens, base=arguments.base
    )
    decoder = Decoder(encoder, max_new_tokens=arguments.max_new_tokens, num_beams=arguments.beams)
    prompt = encoder.prompt(arguments.prompt) if arguments.prompt is not None else ""
    if arguments.vectors is not None:
        decoded = decoder.stored(arguments.vectors, arguments.limit)
    elif arguments.pairs is not None:
        pairs = read_pairs(arguments.pairs, arguments.limit)
        wanted = decoder.directions if arguments.direction == "both" else (arguments.direction,)
        decoded = [one for direction in wanted for one in decoder.pairs(pairs, direction)]
    else:
        texts = arguments.text or read_texts(Source(arguments.input))[1]
        decoded = decoder.texts(texts[: arguments.limit], prompt)
    if arguments.output is not None:
        write_decoded(arguments.output, decoded, overwrite=arguments.overwrite)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for one in decoded if arguments.output is None else []:
        console.print(f"{one.source}\n  -> {one.decoded}")
    for direction, (f1, rouge, number) in means(decoded).items():
        console.print(f"{direction}: token F1 {100 * f1:.2f}, ROUGE-L {100 * rouge:.2f} over {number} pairs")


def _report(arguments: argparse.Namespace) -> None:
    from eval.opening import open_encoder
    from eval.report import Looks, write_report
    from eval.report_data import read_run
    from eval.tasks import find_benchmark

    if arguments.model is None and (arguments.pairs or arguments.labelled):
        raise ConfigError("eval report: --pairs and --labelled show embeddings; add --model FOLDER")
    runs = [read_run(item) for item in arguments.folders]
    encoder = None
    if arguments.model is not None:
        encoder = open_encoder(
            arguments.model, dtype=arguments.dtype, pack_tokens=arguments.pack_tokens, base=arguments.base
        )
    write_report(
        runs,
        arguments.output,
        title=arguments.title,
        benchmark=find_benchmark(arguments.benchmark) if arguments.benchmark else None,
        looks=Looks(encoder, arguments.pairs, arguments.labelled, arguments.decoded),
        overwrite=arguments.overwrite,
    )
    log.info("report: %s", arguments.output)


def _table(arguments: argparse.Namespace) -> None:
    from eval.tasks import find_benchmark

    benchmark = find_benchmark(arguments.benchmark) if arguments.benchmark else None
    _show(benchmark, _labelled(arguments.results), published=arguments.published)


def _convert(arguments: argparse.Namespace) -> None:
    from eval.convert import convert

    convert(
        arguments.model,
        arguments.output,
        base=arguments.base,
        max_tokens=arguments.max_tokens,
        overwrite=arguments.overwrite,
    )


def _labelled(items: Iterable[str]) -> list[tuple[str, Path]]:
    labelled = []
    for item in items:
        label, equals, folder = item.partition("=")
        if not equals:
            raise ConfigError(f"expected LABEL=DIR, got '{item}'")
        labelled.append((label, Path(folder)))
    return labelled


def _show(benchmark: "Benchmark | None", labelled: list[tuple[str, Path]], *, published: bool) -> None:
    from rich.console import Console

    from eval.table import absent_line, benchmark_table, score_table, summarise, task_results

    if benchmark is None:
        Console().print(score_table(labelled))
        return
    summaries = {label: summarise(benchmark, task_results(folder)) for label, folder in labelled}
    Console().print(benchmark_table(benchmark, summaries, compare_published=published))
    for label, summary in summaries.items():
        line = absent_line(label, summary)
        if line is not None:
            Console(stderr=True).print(line)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    arguments = _parser().parse_args(argv)
    anchor_log.setup()
    with exit_on_user_error():
        commands = {"embed": _embed, "mteb": _mteb, "fetch": _fetch, "decode": _decode, "report": _report}
        {**commands, "table": _table, "convert": _convert}[arguments.command](arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
