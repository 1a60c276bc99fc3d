"""Measure whether the decoder uses the embedding: Stage I in several forms, and what a wrong partner costs in each.

    python bench/dependence.py [--arms "NAME; NAME"] [--steps 40] [--stage2-steps 0] [--json PATH]

1. Split four real sources once into training pairs and held-out pairs that share no text with them. A step is 16 pairs
   of one source, with texts of at most 40 tokens.
2. Run ``python -m anchor.train`` for each arm with the same batches, seed and learning rate; only the decode pass
   differs. A finished arm is not trained again, so the command can be stopped at any time.
3. With ``--stage2-steps``: train that many contrastive steps (LoRA) on each export. The arm "untrained" has no Stage I.
4. Print a table of the held-out figures.
"""

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from anchor.errors import DataError, exit_on_user_error

PAIRS = Path("../shared/data/pairs")
WORK = Path("runs/dependence")
BASE = "runs/smollm2-135m/model.gguf"
SOURCES = ("allnli", "squad", "medquad", "wiki_title_lead")
INSTRUCTIONS = {
    "medquad": ["Given a medical question, retrieve a passage that answers the question"],
    "wiki_title_lead": ["Given a title, retrieve the beginning of its Wikipedia article"],
}
HELD_OUT_PAIRS, TRAINED_PAIRS = 64, 1280
ARMS: dict[str, dict[str, Any] | None] = {
    "untrained": None,
    "paper": {},
    "bos": {"decode_prefix": "bos"},
    "bos, dropped 0.5": {"decode_prefix": "bos", "input_dropout": 0.5},
    "bos, centred": {"decode_prefix": "bos", "anchor_vector": "centred"},
    "bos, centred, dropped 0.5": {"decode_prefix": "bos", "anchor_vector": "centred", "input_dropout": 0.5},
    "bos, centred, dropped 0.9": {"decode_prefix": "bos", "anchor_vector": "centred", "input_dropout": 0.9},
    "template, centred, dropped 0.5": {"decode_prefix": "template", "anchor_vector": "centred", "input_dropout": 0.5},
    "centred, dropped 0.5": {"anchor_vector": "centred", "input_dropout": 0.5},
    "bos, centred, dropped 0.5, contrastive 0.1": {
        "decode_prefix": "bos",
        "anchor_vector": "centred",
        "input_dropout": 0.5,
        "contrastive": {"temperature": 0.02, "weight": 0.1},
    },
}
COLUMNS = {
    "loss d→q": "held_out/loss_document_to_query_nats",
    "loss q→d": "held_out/loss_query_to_document_nats",
    "wrong d→q": "held_out/dependence_document_to_query_nats",
    "wrong q→d": "held_out/dependence_query_to_document_nats",
    "no inputs d→q": "held_out/dependence_document_to_query_without_inputs_nats",
    "no inputs q→d": "held_out/dependence_query_to_document_without_inputs_nats",
    "nDCG@10": "held_out/ndcg_at_10",
}


def prepare() -> None:
    """Split and pack the pairs; keep what already exists."""
    for name in SOURCES:
        file = PAIRS / f"{name}.jsonl.gz"
        if not file.is_file():
            raise DataError(f"{file}: no such file; this measurement needs real pairs")
        rows = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines(keepends=True)
        random.Random(0).shuffle(rows)
        seen: set[str] = set()
        kept = []
        for row in rows:
            texts = {json.loads(row)[side] for side in ("query", "positive")}
            if not texts & seen:
                kept.append(row)
            seen |= texts
        for part, chosen in (("heldout", kept[:HELD_OUT_PAIRS]), ("train", kept[HELD_OUT_PAIRS:][:TRAINED_PAIRS])):
            (WORK / part).mkdir(parents=True, exist_ok=True)
            (WORK / part / f"{name}.jsonl").write_text("".join(chosen), encoding="utf-8")
    for part in ("heldout", "train"):
        recipe = {
            "output_dir": str(WORK / f"shards-{part}"),
            "seed": 0,
            "tokenizer": BASE,
            "template": {"kind": "preset", "name": "chatml"},
            "sources": [{"kind": "e5", "path": str(WORK / part), "instructions": INSTRUCTIONS}],
            "text": {"max_tokens": 40, "hard_negatives": 0},
            "batch": {"pairs": 16, "pack_tokens": 4096, "pack_multiple": 1},
        }
        run("data_prep", "pack", write(WORK / f"pack-{part}.yaml", recipe))


def train(arm: str, stage: int, objective: dict[str, Any], trained: dict[str, Any], base: str, steps: int) -> Path:
    """Train one arm; return its folder."""
    folder = WORK / f"{arm.replace(', ', '-').replace(' ', '-')}-stage{stage}"
    recipe = {
        "output_dir": str(folder),
        "seed": 0,
        "data": {"shards": str(WORK / "shards-train")},
        "backbone": {"path": base, "trained": trained, "attention": "segments"},
        "objective": objective,
        "optim": {"lr": 2e-4 if stage == 1 else 1.2e-3, "warmup_steps": 5, "total_steps": steps, "decay_steps": 1000},
        "engine": {"deepspeed": "ds_configs/zero3.json", "dtype": "bf16", "checkpoint_every_steps": 1000},
        "evaluation": {"shards": str(WORK / "shards-heldout"), "every_steps": 40, "max_batches": 8},
    }
    run("anchor.train", write(folder.with_suffix(".yaml"), recipe))
    return folder


def write(path: Path, recipe: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return str(path)


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def rows_of(arm: str, folder: Path) -> list[dict[str, Any]]:
    """Return the held-out figures of a run by step, with the median gradient norm of the 25 steps before."""
    norms = [json.loads(line)["optim/grad_norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = []
    for line in (folder / "held_out.jsonl").read_text().splitlines():
        found, step = json.loads(line), json.loads(line)["step"]
        figures = {title: found.get(name) for title, name in COLUMNS.items()}
        rows.append({"arm": arm, "step": step, **figures, "gradient": statistics.median(norms[:step][-25:] or [0.0])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="; ".join(ARMS), help="names, separated by '; '")
    parser.add_argument("--steps", type=int, default=40, help="of Stage I (40)")
    parser.add_argument("--stage2-steps", type=int, default=0, help="of Stage II on each export (0)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    prepare()
    rows: list[dict[str, Any]] = []
    for arm in options.arms.split("; "):
        base, form = BASE, ARMS[arm]
        if form is not None:
            objective = {"kind": "reconstruction", "alpha": 0.5, **form}
            folder = train(arm, 1, objective, {"kind": "full"}, BASE, options.steps)
            base = str(folder / "export")
            rows += rows_of(arm, folder)
        if options.stage2_steps:
            lora = {"kind": "lora", "r": 16, "alpha": 32, "dropout": 0.05}
            contrastive = {"kind": "contrastive", "temperature": 0.02}
            folder = train(arm, 2, contrastive, lora, base, options.stage2_steps)
            rows += rows_of(f"{arm} + II", folder)
        titles = list(rows[0])
        print("| " + " | ".join(titles) + " |\n|" + " --- |" * len(titles))
        for row in rows:
            shown = (f"{v:.3f}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values())
            print("| " + " | ".join(shown) + " |")
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
