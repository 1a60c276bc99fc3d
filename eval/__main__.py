"""``python -m eval {embed,mteb,fetch,decode,report,table,convert}``."""

import argparse
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from anchor import log as anchor_log
from anchor.errors import ConfigError, DataError, exit_on_user_error
from eval.options import make_parser

if TYPE_CHECKING:
    from mteb.abstasks.abstask import AbsTask
    from mteb.benchmarks.benchmark import Benchmark

    from anchor.encoding.encoder import PackedEncoder
    from anchor.encoding.plain import PlainEncoder

log = logging.getLogger("eval")


def _mteb(arguments: argparse.Namespace) -> None:
    from anchor.encoding.opening import SELF_SUPERVISED, objective_of
    from anchor.encoding.ranks import RankedEncoder, joined
    from eval.reporting.table import main_scores, published, task_results
    from eval.scoring.benchmark import run_tasks
    from eval.scoring.prompts import load_prompts
    from eval.scoring.tasks import BRIGHT_TOKENS, is_bright

    with_published = "published" in arguments.compare
    if with_published and not arguments.benchmark:
        raise ConfigError("eval mteb: --compare published shows a benchmark's rows; add --benchmark or leave it out")
    benchmark, tasks = _tasks(arguments)
    of_objective = "llm2vec_gen" if objective_of(arguments.model) == SELF_SUPERVISED else "anchor"
    name = arguments.prompts or of_objective
    prompts = None if name == "folder" else load_prompts(name)
    output = arguments.output or arguments.model / "mteb"
    labelled = _labelled([f"this={output}", *(item for item in arguments.compare if item != "published")])
    for _, folder in labelled[1:]:  # fail before hours of scoring if a result cannot be shown
        main_scores(folder) if benchmark is None else task_results(folder)
    if benchmark is not None and with_published:
        published(benchmark.name)
    with joined():
        local = _open(arguments)
        if arguments.max_tokens is not None:
            local.limit(arguments.max_tokens)
        encoder = RankedEncoder(local)
        if encoder.rank > 0:
            encoder.serve()
            return
        if name == "llm2vec_gen" and encoder.max_tokens < BRIGHT_TOKENS and any(map(is_bright, tasks)):
            log.warning(
                "BRIGHT: texts are cut to %d tokens, the paper's scores are of %d; add --max-tokens %d",
                *(encoder.max_tokens, BRIGHT_TOKENS, BRIGHT_TOKENS),
            )
        try:
            run_tasks(encoder, tasks, output, prompts, cache=not arguments.no_cache, at_once=arguments.at_once)
        finally:
            encoder.stop()
        _show(benchmark, labelled, published=with_published)
        log.info("results in %s", output)


def _tasks(arguments: argparse.Namespace) -> tuple["Benchmark | None", list["AbsTask"]]:
    """Return the benchmark, if any, and all tasks to run; report tasks without data before loading a model."""
    from eval.scoring.tasks import find_benchmark, local_retrieval_task, named_tasks, with_data

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
    from eval.scoring.fetch import fetch, verify
    from eval.scoring.tasks import find_benchmark, named_tasks

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
    from anchor.encoding.ranks import PATIENCE, joined
    from eval.embedding.embed import Options, embed
    from eval.embedding.texts import Source

    source = Source(_path(arguments.input), arguments.format, arguments.text_field, arguments.id_field)
    options = Options(
        prompt=arguments.prompt,
        normalize=not arguments.raw,
        dimension=arguments.dimension,
        dtype=arguments.output_dtype,
        format=arguments.output_format,
        shard_texts=arguments.shard_texts,
    )
    with joined(PATIENCE):  # merging large parts on rank 0 may take long
        embed(_open(arguments), source, arguments.output, options, overwrite=arguments.overwrite)


def _open(arguments: argparse.Namespace) -> "PackedEncoder | PlainEncoder":
    """Open the encoder for `eval embed` and `eval mteb`."""
    from anchor.encoding.opening import open_encoder

    encoder = open_encoder(
        arguments.model,
        dtype=arguments.dtype,
        attention=arguments.attention,
        pack_tokens=arguments.pack_tokens,
        base=arguments.base,
    )
    _warn_of_fp32(encoder)
    return encoder


def _warn_of_fp32(encoder: "PackedEncoder | PlainEncoder") -> None:
    from anchor import dist
    from anchor.encoding.encoder import PackedEncoder

    if encoder.dtype == "fp32" and encoder.device.type == "cuda" and dist.is_first_rank():
        of_kernel = " and attention, which no packed kernel knows in fp32, is one call per text and layer"
        why = of_kernel if isinstance(encoder, PackedEncoder) else ""
        log.warning(
            "fp32 on CUDA: matrices are multiplied in full precision%s; if half precision will do, give --dtype bf16",
            why,
        )


def _path(given: str) -> Path | None:
    """Return the path of a source, or None for standard input."""
    return None if given == "-" else Path(given)


def _decode(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from anchor.encoding.opening import open_encoder
    from eval.decode import Decoder, check_output, means, read_pairs, write_decoded
    from eval.embedding.texts import Source, read_texts

    if arguments.prompt is not None and (arguments.pairs is not None or arguments.vectors is not None):
        raise ConfigError("eval decode: --prompt is of --text and --input; leave it out")
    if arguments.direction is not None and arguments.pairs is None:
        raise ConfigError("eval decode: --direction is of --pairs; leave it out")
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
        wanted = decoder.directions if arguments.direction in (None, "both") else (arguments.direction,)
        decoded = [one for direction in wanted for one in decoder.pairs(pairs, direction)]
    else:
        texts = arguments.text or read_texts(Source(_path(arguments.input)))[1]
        decoded = decoder.texts(texts[: arguments.limit], prompt)
    if arguments.output is not None:
        write_decoded(arguments.output, decoded, overwrite=arguments.overwrite)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for one in decoded if arguments.output is None else []:
        console.print(f"{one.source}\n  -> {one.decoded}")
    for direction, (f1, rouge, number) in means(decoded).items():
        console.print(f"{direction}: token F1 {100 * f1:.2f}, ROUGE-L {100 * rouge:.2f} over {number} pairs")


def _report(arguments: argparse.Namespace) -> None:
    from anchor.encoding.opening import open_encoder
    from eval.reporting.report import Looks, write_report
    from eval.reporting.report_data import read_run
    from eval.scoring.tasks import find_benchmark

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
    from eval.scoring.tasks import find_benchmark

    benchmark = find_benchmark(arguments.benchmark) if arguments.benchmark else None
    if arguments.published and benchmark is None:
        raise ConfigError("eval table: --published shows a benchmark's rows; add --benchmark or leave it out")
    _show(benchmark, _labelled(arguments.results), published=arguments.published)


def _convert(arguments: argparse.Namespace) -> None:
    from eval.conversion.convert import convert

    convert(
        arguments.model,
        arguments.output,
        base=arguments.base,
        max_tokens=arguments.max_tokens,
        overwrite=arguments.overwrite,
    )


def _labelled(items: Iterable[str]) -> list[tuple[str, Path]]:
    labelled: dict[str, Path] = {}
    for item in items:
        label, equals, folder = item.partition("=")
        if not equals:
            raise ConfigError(f"expected LABEL=DIR, got '{item}'")
        if label in labelled:
            raise ConfigError(f"'{item}': the label '{label}' is that of {labelled[label]} already; labels must differ")
        labelled[label] = Path(folder)
    return list(labelled.items())


def _show(benchmark: "Benchmark | None", labelled: list[tuple[str, Path]], *, published: bool) -> None:
    from eval.reporting.table import absent_line, benchmark_table, print_table, score_table, summarise, task_results

    if benchmark is None:
        print_table(score_table(labelled))
        return
    summaries = {label: summarise(benchmark, task_results(folder)) for label, folder in labelled}
    print_table(benchmark_table(benchmark, summaries, compare_published=published))
    for label, summary in summaries.items():
        line = absent_line(label, summary)
        if line is not None:
            sys.stderr.write(f"{line}\n")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = make_parser().parse_args(argv)
    anchor_log.setup()
    with exit_on_user_error():
        commands = {"embed": _embed, "mteb": _mteb, "fetch": _fetch, "decode": _decode, "report": _report}
        {**commands, "table": _table, "convert": _convert}[arguments.command](arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
