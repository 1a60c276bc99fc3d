"""The dry run's memory estimate against the resident memory of real steps on this CPU.

    python bench/memory_estimate.py --shards data/squad --model MODEL [--ranks 2 --stage 1 --trained full] [--json PATH]

The measurement is the growth of one rank's resident memory, from after the imports to the highest point of one step.
The peak of loading is left out, and a step of one pair per pack comes first, which creates the optimiser's state. Freed
memory goes back to the system at once (``MALLOC_MMAP_THRESHOLD_``); otherwise the C library's reserve would be
measured. ``--stage 1`` is reconstruction, ``2`` contrastive; ``--trained lora`` is the paper's adapter.
"""

import functools
import json
import os
import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from anchor.errors import exit_on_user_error
from bench.harness import arguments, peak_gib, report, reset_peak

OBJECTIVES = {1: {"kind": "reconstruction", "alpha": 0.2}, 2: {"kind": "contrastive", "temperature": 0.02}}
TRAINED = {"full": {"kind": "full"}, "lora": {"kind": "lora", "r": 16, "alpha": 32, "dropout": 0.05}}


def resident_gib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 2**20


def measure(rank: int, options: Namespace, folder: str) -> None:
    """Run two real steps on one rank, then write the measured and the estimated memory as JSON into the folder."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(options.ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    from anchor import dist
    from anchor.config.pack_recipe import PackRecipe
    from anchor.config.train_recipe import TrainRecipe
    from anchor.data.records import QUERY
    from anchor.data.shards import ShardReader, make_batch
    from anchor.engine.build import make_objective
    from anchor.engine.deepspeed import Engine, complete_ds_config, init_communication, read_ds_config
    from anchor.engine.step import train_step
    from anchor.estimate.memory import memory
    from anchor.estimate.model_shape import shape_of
    from anchor.estimate.setting import setting_of
    from anchor.estimate.step_shape import sampled_step
    from anchor.models.backbone import DTYPES, load_backbone, meta_model

    ranks = dist.init(f"file://{folder}/rendezvous")
    init_communication()
    baseline = resident_gib()
    recipe = TrainRecipe.model_validate(
        {
            "output_dir": folder,
            "seed": 0,
            "data": {"shards": options.shards},
            "backbone": {
                "path": options.model,
                "trained": TRAINED[options.trained],
                "attention": "segments",
                "gradient_checkpointing": bool(options.checkpointing),
            },
            "objective": OBJECTIVES[options.stage],
            "optim": {"lr": 1e-5, "warmup_steps": 0, "total_steps": 2},
            "engine": {"deepspeed": options.deepspeed, "dtype": options.dtype},
        }
    )
    ds_config = complete_ds_config(read_ds_config(Path(options.deepspeed)), recipe, ranks.world_size)
    causal_lm = load_backbone(recipe.backbone, DTYPES[options.dtype], "cpu", work_dir=Path(folder), ds_config=ds_config)
    objective = make_objective(causal_lm, recipe)
    engine = Engine(objective, ds_config, recipe.optim, ranks)
    reader = ShardReader(Path(options.shards))
    batch = reader.read(0)
    first = [pack.select(np.cumsum(pack.roles == QUERY) == 1) for pack in batch.packs]
    train_step(engine, make_batch(first, batch.source), step=0, seed=0, lr=1e-5)
    reset_peak()
    train_step(engine, batch, step=1, seed=0, lr=1e-5)
    measured = peak_gib() - baseline

    packing = PackRecipe.model_validate(reader.index.recipe)
    shape = shape_of(meta_model(recipe.backbone))
    setting = setting_of(recipe, ds_config["zero_optimization"], num_ranks=options.ranks, device="cpu")
    _, largest = sampled_step(objective, packing, [batch])
    estimated = memory(shape, replace(setting, ranks_per_node=options.ranks), largest)
    found = {"tokens": largest.pack_tokens, "measured_gib": measured, "estimated_gib": estimated.peak / 2**30}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.shutdown()


def main() -> None:
    options = arguments(
        __doc__ or "",
        shards="data/squad",
        model="MODEL",
        ranks=1,
        stage=1,
        trained="full",
        dtype="bf16",
        checkpointing=0,
        deepspeed="ds_configs/zero3.json",
    )
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read when the ranks' processes start
    with tempfile.TemporaryDirectory() as folder:
        run: Any = functools.partial(measure, options=options, folder=folder)
        torch.multiprocessing.spawn(run, nprocs=options.ranks)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.ranks)]
    rows = [{"contestant": f"rank {rank}", **figures} for rank, figures in enumerate(found)]
    ratios = {"estimate over measured": max(r["estimated_gib"] for r in rows) / max(r["measured_gib"] for r in rows)}
    report("memory_estimate", rows, ratios, options)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
