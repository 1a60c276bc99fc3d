"""Communication of a step over the links of a cluster, beside its computing time: arithmetic, no GPU.

    python bench/cluster.py [--gpu h100-80gb] [--network 50] [--mfu 0.4] [--packs 2] [--json PATH]

The functions are those of ``anchor.train --dry-run``; `tests/engine/test_traffic.py` compares their volumes with the
bytes of real collectives. The table has Stage I (full fine-tuning, two passes) and Stage II (LoRA) of the shapes of
Llama-3.2-1B and Llama-3.1-8B. Each GPU gets ``--packs`` packs of 8,192 tokens per step, on 8, 64 and 512 GPUs, 8 per
node. Every file of ds_configs/ is in the table except the offloading ones. ``--reuse`` replaces
``stage3_max_reuse_distance`` (elements).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from anchor.config.train_recipe import BackboneSection
from anchor.dry_run.report import USABLE_FRACTION
from anchor.engine.deepspeed import read_ds_config
from anchor.errors import exit_on_user_error
from anchor.estimate.gpus import find_gpu
from anchor.estimate.memory import memory
from anchor.estimate.model_shape import ModelShape, shape_of
from anchor.estimate.setting import Setting, StepShape
from anchor.estimate.traffic import links_of, moving_seconds, transfers, waiting_seconds
from anchor.estimate.work import step_seconds, work
from anchor.models.backbone import choose_trained
from bench.harness import arguments
from bench.shapes import SHAPES, llama_config

ROOT = Path(__file__).parents[1]
PACK_TOKENS, TEXT_TOKENS, PER_NODE = 8192, 256, 8
LORA = {"kind": "lora", "r": 16, "alpha": 32, "dropout": 0.05}
STAGES = {"I": {"kind": "full"}, "II": LORA}


def shape(model: str, trained: dict[str, Any]) -> ModelShape:
    """Return the shape of a Llama of that size, built on the meta device with its adapters."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(llama_config(model))
        causal_lm.tie_weights()
        section = {"path": "none", "trained": trained, "attention": "flash"}
        choose_trained(causal_lm, BackboneSection.model_validate(section))
    return shape_of(causal_lm)


def step_of(stage: str, packs: int, num_ranks: int) -> StepShape:
    """Return a step of ``packs`` full packs per rank, in pairs of two texts (Stage I) or three (Stage II)."""
    tokens, texts = packs * PACK_TOKENS * num_ranks, 2 if stage == "I" else 3
    decode = tokens if stage == "I" else 0
    pairs, segments = tokens // TEXT_TOKENS // texts, tokens // TEXT_TOKENS
    return StepShape(
        num_pairs=pairs,
        num_packs=float(packs * num_ranks),
        pack_tokens=PACK_TOKENS,
        decode_tokens=PACK_TOKENS if stage == "I" else 0,
        step_tokens=float(tokens),
        step_decode_tokens=float(decode),
        squared_lengths=float((tokens + decode) * TEXT_TOKENS),
        step_segments=float(segments),
        gathered_segments=float(segments - pairs) if stage == "II" else 0.0,
    )


def row(model: str, stage: str, file: str, num_ranks: int, options: Any) -> dict[str, Any]:
    """Return one run: volume and time of its communication, its computing time, and whether it fits in memory."""
    zero = dict(read_ds_config(ROOT / "ds_configs" / f"{file}.json")["zero_optimization"])
    if options.reuse and zero["stage"] == 3:
        zero["stage3_max_reuse_distance"] = options.reuse
    gpu, lora = find_gpu(options.gpu), stage == "II"
    setting = Setting(
        num_ranks=num_ranks,
        ranks_per_node=PER_NODE,
        element_bytes=2,
        zero=zero,
        kernel="flash",
        checkpointing=model == "8B",
        lora_rank=LORA["r"] if lora else None,
        lora_dropout=lora,
        device="cuda",
    )
    dimensions, step = shape(model, STAGES[stage]), step_of(stage, options.packs, num_ranks)
    sent, links = transfers(dimensions, setting, step), links_of(gpu, options.network * 1e9, PER_NODE)
    peak = memory(dimensions, setting, step).peak
    return {
        "model": model,
        "stage": stage,
        "file": file,
        "gpus": num_ranks,
        "in_node_gb": sum(t.step_bytes for t in sent if t.inside_node) / 1e9,
        "between_gb": sum(t.step_bytes for t in sent if not t.inside_node) / 1e9,
        "moving_seconds": sum(moving_seconds(t, links) for t in sent),
        "waiting_seconds": sum(waiting_seconds(t, links) for t in sent),
        "computing_seconds": step_seconds(work(dimensions, setting, step), gpu, num_ranks, options.mfu),
        "peak_gib": peak / 2**30,
        "fits": peak <= USABLE_FRACTION * gpu.memory_bytes,
    }


def main() -> None:
    options = arguments(__doc__ or "", gpu="h100-80gb", network=50.0, mfu=0.4, packs=2, reuse=0)
    rows = [
        row(model, stage, file, num_ranks, options)
        for model in SHAPES
        for stage in STAGES
        for num_ranks in (8, 64, 512)
        for file in ("zero3", "zero3_hpz", "zero2")
    ]
    gpu = find_gpu(options.gpu)
    links = f"{gpu.link_bytes_per_second / 1e9:,.0f} GB/s in the node, {options.network:g} GB/s a GPU between nodes"
    title = f"{options.gpu}: {links}; {options.packs} packs of {PACK_TOKENS:,} tokens a GPU; {options.mfu:.0%} MFU"
    table = Table("model", "stage", "ds_configs", "GPUs", title=title)
    for column in ("GB in node", "GB between", "s on links", "s waiting", "s computing", "GiB", "fits"):
        table.add_column(column, justify="right")
    for r in rows:
        figures = ("in_node_gb", "between_gb", "moving_seconds", "waiting_seconds", "computing_seconds", "peak_gib")
        cells = (r["model"], r["stage"], r["file"], str(r["gpus"]), *(f"{r[key]:,.3g}" for key in figures))
        table.add_row(*cells, "yes" if r["fits"] else "no")
    Console(width=140).print(table)
    if options.json is not None:
        settings = {k: str(v) for k, v in vars(options).items() if k not in ("json", "turns")}
        result = {"name": "cluster", "hardware": "none: arithmetic", "settings": settings, "rows": rows, "ratios": {}}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
