"""Encoder of ``eval embed`` against ``SentenceTransformer.encode``: same folder, texts, dtype and token budget.

    python bench/embed.py --model runs/x/export --pairs ../shared/data/pairs [--texts 5000] [--json PATH]

Texts are distinct queries and documents drawn evenly from all sources, so lengths are mixed. Both sides cut them to
``max_tokens``. The token budget is for a padded batch: ``SentenceTransformer`` gets ``pack_tokens // max_tokens`` texts
per batch (by default 32, which is its own default), ours packs of at most ``pack_tokens``. On a CPU ours limits its
passes to 4,096 tokens, so a third contestant is ``SentenceTransformer`` with batches of that budget. The table has the
smallest cosine to ours.
"""

import gzip
import json
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).parents[1]))

from anchor.encoding.encoder import Encoder
from anchor.errors import exit_on_user_error
from anchor.models.backbone import DTYPES
from bench.harness import alternate, arguments, report


def draw_texts(folder: Path, number: int) -> list[str]:
    """Draw distinct texts, as evenly from every source as possible."""
    draw = random.Random(0)
    sources = []
    for file in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        texts = sorted({row[side] for row in rows for side in ("query", "positive")})
        sources.append(draw.sample(texts, min(len(texts), number)))
    chosen: dict[str, None] = {}
    for rank in range(number):
        for texts in sources:
            if rank < len(texts) and len(chosen) < number:
                chosen[texts[rank]] = None
    return list(chosen)


def main() -> None:
    options = arguments(
        __doc__ or "",
        model="runs/smollm2-135m/stage2/export",
        pairs="../shared/data/pairs",
        texts=5000,
        dtype="bf16",
        max_tokens=512,
        pack_tokens=16384,
    )
    texts = draw_texts(Path(options.pairs), options.texts)
    encoder = Encoder(Path(options.model), dtype=options.dtype, pack_tokens=options.pack_tokens)
    encoder.backend.enable_truncation(options.max_tokens)
    device = str(encoder.device)
    theirs = SentenceTransformer(options.model, device=device, model_kwargs={"dtype": DTYPES[options.dtype]})
    theirs.max_seq_length = options.max_tokens
    batches = {max(1, budget // options.max_tokens) for budget in (options.pack_tokens, encoder.pack_tokens)}
    tokens = sum(len(one.ids) for one in encoder.backend.encode_batch_fast(texts))
    kept: dict[str, np.ndarray] = {}

    def ours() -> dict[str, float]:
        kept["ours"] = encoder.encode(texts)
        return {"texts": len(texts), "tokens": tokens}

    def sentence_transformers(batch_size: int) -> dict[str, float]:
        with torch.inference_mode():
            vectors = theirs.encode(texts, batch_size=batch_size, show_progress_bar=False)
        cosines = (np.asarray(vectors, dtype=np.float32) * kept["ours"]).sum(axis=1)
        return {"texts": len(texts), "tokens": tokens, "min_cosine": float(cosines.min())}

    others = {
        f"SentenceTransformer.encode, batches of {size}": partial(sentence_transformers, size)
        for size in sorted(batches, reverse=True)
    }
    rows = alternate({"eval embed": ours, **others}, options.turns)
    for row in rows:
        row["texts_per_second"] = len(texts) / row["seconds"]
    mine, *rest = rows
    ratios = {f"speed over {row['contestant']}": row["seconds"] / mine["seconds"] for row in rest}
    ratios["peak_memory"] = mine["peak_gib"] / rest[0]["peak_gib"]
    report("embed", rows, ratios, options)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
