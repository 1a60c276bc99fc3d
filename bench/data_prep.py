"""`data_prep pack` end to end, against the tokenizer alone and `datasets.map` with the same tokenizer.

    python bench/data_prep.py [--data ../shared/data/pairs --tokenizer MODEL_FOLDER --rows 3000 --max-tokens 512
                               --processes 1 --growth 2100] [--json PATH]

All contestants work on the same texts (query with its instruction, positive, one negative), on the same number of
processes:

* ours: read gzipped JSON lines, check, tokenise, shuffle, pack, checksum and write shards;
* encode_batch: only the tokenizer's own call, on texts already in memory;
* encode_batch, distinct: the same on distinct texts only, because ours encodes equal texts within 2,048 rows once;
* datasets.map: read the same files, tokenise with the same number of processes, write its cache.

``tokens`` counts the uncut texts without template. Growth runs the command on 1, 4 and 16 times the rows of the first
two sources and reads its peak memory. Each further copy has a number before its texts, so that no texts are equal.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from anchor.data.tokenizer_files import load_tokenizer
from anchor.errors import exit_on_user_error
from bench.harness import alternate, arguments, report
from data_prep.packing.pack import pack

# Run the command, then print what its main process used. `wait4` would also count this process's memory before exec.
PROGRAM = """
import re, sys, time
from data_prep.__main__ import main
main(sys.argv[1:])
print(time.process_time(), re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
INSTRUCTION = "Given a question, retrieve passages that answer the question"


def read(data: Path, rows: int) -> dict[str, list[dict[str, str]]]:
    """Read the first rows of every source."""
    out = {}
    for file in sorted(data.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            out[file.name.removesuffix(".jsonl.gz")] = [json.loads(line) for line in islice(lines, rows)]
    return out


def write(folder: Path, sources: dict[str, list[dict[str, str]]], copies: int = 1) -> Path:
    """Write the rows as gzipped files of an E5 folder, ``copies`` times.

    Each further copy has a number before every text.
    """
    folder.mkdir(parents=True)
    for name, rows in sources.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8", compresslevel=1) as out:
            for copy in range(copies):
                for row in rows:
                    numbered = {k: f"{copy} {v}" if copy else v for k, v in row.items()}
                    out.write(json.dumps(numbered, ensure_ascii=False) + "\n")
    return folder


def recipe(folder: Path, data: Path, names: list[str], options: Any) -> Path:
    """Write a pack recipe for the rows."""
    content = {
        "output_dir": str(folder / "shards"),
        "seed": 0,
        "tokenizer": str(options.tokenizer),
        "template": {"kind": "preset", "name": "chatml"},
        "sources": [{"kind": "e5", "path": str(data), "instructions": {name: [INSTRUCTION] for name in names}}],
        "text": {"max_tokens": options.max_tokens, "hard_negatives": 1},
        "batch": {"pairs": 256, "pack_tokens": 16384, "pack_multiple": 8},
    }
    file = folder / "pack.json"  # JSON is YAML
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def growth(folder: Path, sources: dict[str, list[dict[str, str]]], options: Any) -> list[dict[str, Any]]:
    """Measure seconds and peak memory of the command on 1, 4 and 16 copies of the rows."""
    rows = []
    small = {name: sources[name][: options.growth] for name in sorted(sources)[:2]}
    for copies in (1, 4, 16):
        place = folder / f"x{copies}"
        data = write(place / "data", small, copies)
        path = recipe(place, data, list(small), options)
        command = [sys.executable, "-c", PROGRAM, "pack", str(path), "--workers", str(options.processes)]
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
        cpu_seconds, peak_kib = done.stdout.split()
        rows.append(
            {
                "contestant": f"ours, {copies} x {sum(map(len, small.values())):,} rows",
                "seconds": time.perf_counter() - start,
                "cpu_seconds": float(cpu_seconds),
                "peak_gib": int(peak_kib) / 2**20,
                "input_mib": sum(file.stat().st_size for file in data.iterdir()) / 2**20,
            }
        )
        shutil.rmtree(place)
    return rows


def main() -> None:
    options = arguments(
        __doc__ or "",
        data=Path("../shared/data/pairs"),
        tokenizer=Path("runs/quickstart/model.gguf"),
        rows=3000,
        max_tokens=512,
        processes=1,
        growth=2100,
    )
    os.environ["RAYON_NUM_THREADS"] = str(options.processes)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if options.processes > 1 else "false"
    import datasets

    datasets.disable_progress_bars()
    everything = read(options.data, max(options.rows, options.growth))
    sources = {name: rows[: options.rows] for name, rows in everything.items()}
    tokenizer = load_tokenizer(str(options.tokenizer))
    head = f"{INSTRUCTION}: "
    texts = [t for rows in sources.values() for r in rows for t in (head + r["query"], r["positive"], r["negative"])]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write(folder / "data", sources)
        path = recipe(folder, data, list(sources), options)
        tokens = sum(map(len, tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)))

        def ours() -> dict[str, float]:
            shutil.rmtree(folder / "shards", ignore_errors=True)
            pack(str(path), [], options.processes)
            return {"tokens": tokens}

        def alone() -> dict[str, float]:
            tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            return {"tokens": tokens}

        def distinct() -> dict[str, float]:
            tokenizer.backend_tokenizer.encode_batch(list(dict.fromkeys(texts)), add_special_tokens=False)
            return {"tokens": tokens}

        def tokenised(rows: dict[str, list[str]]) -> dict[str, Any]:
            queries = tokenizer([head + text for text in rows["query"]])["input_ids"]
            out = {name: tokenizer(rows[name])["input_ids"] for name in ("positive", "negative")}
            return {"query": queries, **out}

        def mapped() -> dict[str, float]:
            cache = folder / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            files = [str(file) for file in sorted(data.iterdir())]
            rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(cache))
            processes = options.processes if options.processes > 1 else None
            rows.map(tokenised, batched=True, num_proc=processes, load_from_cache_file=False)
            return {"tokens": tokens}

        contestants = {"ours": ours, "encode_batch": alone, "encode_batch, distinct": distinct, "datasets.map": mapped}
        table = alternate(contestants, options.turns)
        grown = growth(folder, everything, options)
    by_name = {row["contestant"]: row for row in table}
    for row in table:
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
    mine = by_name["ours"]
    ratios = {f"speed over {name}": by_name[name]["seconds"] / mine["seconds"] for name in list(contestants)[1:]}
    ratios["peak_memory of 16 x over 1 x"] = grown[-1]["peak_gib"] / grown[0]["peak_gib"]
    # 1 if time is linear: a constant start, plus the same time for each further row.
    first, second, third = (row["cpu_seconds"] for row in grown)
    ratios["cpu_time per row of 4 x to 16 x over 1 x to 4 x"] = (third - second) / (second - first) / 4
    report("data_prep", table + grown, ratios, options)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
