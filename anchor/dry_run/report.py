"""Dry run (``anchor.train RECIPE --dry-run``): estimate a run in seconds, without a GPU or weights.

1. Check the recipe, DeepSpeed file, shards, number of ranks and model configuration against one another.
2. Find the shape of a step from a sample of the shards' batches. Before packing, a pack recipe gives an upper bound
   instead: every text is as long as ``text.max_tokens`` allows.
3. Compute memory, work, communication and disk by arithmetic (:mod:`anchor.estimate`).
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from anchor.config.load import load_recipe, validate
from anchor.config.pack_recipe import PackRecipe
from anchor.config.train_recipe import TrainRecipe
from anchor.data.batches import check_ranks
from anchor.data.positions import check_positions
from anchor.data.shards import ShardReader
from anchor.engine.build import make_objective
from anchor.engine.checks import check_backbone
from anchor.engine.deepspeed import complete_ds_config, read_ds_config
from anchor.engine.plan import make_plan
from anchor.errors import ConfigError, ModelError, ShardError
from anchor.estimate.gpus import ADAPTER_BYTES_PER_SECOND, Gpu, find_gpu
from anchor.estimate.memory import memory
from anchor.estimate.model_shape import ModelShape, shape_of, special_tokens_shape
from anchor.estimate.setting import Setting, StepShape, setting_of
from anchor.estimate.step_shape import bounded_step, sampled_step
from anchor.estimate.traffic import links_of, moving_seconds, transfers, waiting_seconds
from anchor.estimate.work import (
    checkpoint_bytes,
    export_bytes,
    step_seconds,
    work,
)
from anchor.models.backbone import meta_model

SAMPLED_BATCHES = 8
USABLE_FRACTION = 0.9
"""Assumed usable share of a GPU's memory; CUDA's context, NCCL and fragmentation take the rest."""


@dataclass(frozen=True, slots=True)
class Options:
    """Command-line options.

    Attributes:
        num_ranks: ranks of the run.
        ranks_per_node: ranks per node, which decides the links.
        gpu: name of the accelerator.
        mfu: share of the peak FLOP/s that the run reaches, recomputation included.
        pack_recipe: pack recipe that stands in for shards that do not exist yet.
        adapter_bytes_per_second: speed of one GPU's network adapter, one direction.
    """

    num_ranks: int = 1
    ranks_per_node: int = 8
    gpu: str = "h100-80gb"
    mfu: float = 0.4
    pack_recipe: str | None = None
    adapter_bytes_per_second: float = ADAPTER_BYTES_PER_SECOND


def dry_run(recipe: TrainRecipe, recipe_path: str, options: Options) -> dict[str, Any]:
    """Check a recipe and estimate its run.

    Args:
        recipe: the training recipe.
        recipe_path: its name in messages.
        options: command-line options.

    Returns:
        The report that the tables show and ``--json`` writes; bytes, seconds, FLOPs and counts are plain numbers.

    Raises:
        AnchorError: the recipe, DeepSpeed file, shards, ranks or model are missing or do not fit together.
    """
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu: got {options.mfu}, expected a share of the peak above 0 and at most 1, such as 0.4")
    if not 0 < options.adapter_bytes_per_second < math.inf:
        raise ConfigError(f"--network: got {options.adapter_bytes_per_second / 1e9:g}, expected GB/s above 0")
    gpu = find_gpu(options.gpu, options.num_ranks)
    ds_config = read_ds_config(recipe.engine.deepspeed)
    complete_ds_config(ds_config, recipe, options.num_ranks)
    # Check the data first, so that a missing model does not hide a wrong number of ranks.
    if options.pack_recipe is None:
        reader = _plan_reader(recipe, recipe_path, options)
        packing = validate(reader.index.recipe, PackRecipe, f"{recipe.data.shards}/index.json: recipe")
    else:
        reader, packing = None, load_recipe(options.pack_recipe, PackRecipe)
        check_ranks(packing.batch.pack_multiple, options.num_ranks, Path(options.pack_recipe), recipe_path)
    try:
        model = meta_model(recipe.backbone)
    except ModelError as error:
        raise ModelError(
            f"{recipe_path}: backbone.path: {error}; a dry run reads the configuration only: give any folder with this "
            "model's config.json, as backbone.path=FOLDER"
        ) from error
    teacher = None if reader is None else reader.index.teacher
    shape = special_tokens_shape(shape_of(model), recipe, packing, teacher)
    if reader is not None:
        check_backbone(model.config, recipe.backbone.path, reader.index, recipe.data.shards)
        objective = make_objective(model, recipe)
        sample = [reader.read(int(i)) for i in np.linspace(0, len(reader) - 1, min(len(reader), SAMPLED_BATCHES))]
        step, largest = sampled_step(objective, packing, sample)
    else:
        limit = f"{options.pack_recipe}: text.max_tokens"
        check_positions(model.config.to_dict(), recipe.backbone.path, packing.text.max_tokens, limit)
        step, largest = bounded_step(recipe, packing), None
    setting = setting_of(
        recipe,
        ds_config["zero_optimization"],
        num_ranks=options.num_ranks,
        ranks_per_node=options.ranks_per_node,
        device="cpu" if options.gpu == "cpu" else "cuda",
    )
    return {
        "recipe": recipe_path,
        "num_ranks": options.num_ranks,
        "gpu": asdict(gpu),
        "batch": _batch(recipe, packing, step, largest, reader, options),
        "model": _model(shape),
        "memory": _memory(shape, setting, step, largest, gpu),
        "time": _time(recipe, shape, setting, step, gpu, options),
        "disk": _disk(recipe, shape, setting),
    }


def _plan_reader(recipe: TrainRecipe, recipe_path: str, options: Options) -> ShardReader:
    try:
        return make_plan(recipe, recipe_path, options.num_ranks).reader
    except ShardError as error:
        if (recipe.data.shards / "index.json").is_file():
            raise
        raise ShardError(f"{error}; or dry-run before packing with --pack PACK_RECIPE") from error


def _batch(
    recipe: TrainRecipe,
    packing: PackRecipe,
    step: StepShape,
    largest: StepShape | None,
    reader: ShardReader | None,
    options: Options,
) -> dict[str, Any]:
    steps = recipe.optim.total_steps
    return {
        "source": str(recipe.data.shards) if reader is not None else options.pack_recipe,
        "upper_bound": reader is None,
        "pairs_per_step": step.num_pairs,
        "packs_per_step": step.num_packs,
        "packs_per_rank": step.num_packs / options.num_ranks,
        "pack_tokens": packing.batch.pack_tokens,
        "largest_sampled_pack_tokens": None if largest is None else largest.pack_tokens,
        "tokens_per_step": step.step_tokens,
        "decode_tokens_per_step": step.step_decode_tokens,
        "steps": steps,
        "tokens": steps * step.step_tokens,
        "pairs": steps * step.num_pairs,
        "batches": None if reader is None else reader.index.batches_per_epoch,
        "epochs": None if reader is None else steps / reader.index.batches_per_epoch,
    }


def _model(shape: ModelShape) -> dict[str, Any]:
    groups = [
        {"group": name, "parameters": shape.count(name), "trained": shape.count(name, trained=True)}
        for name in shape.groups
    ]
    total = {"parameters": shape.count(), "trained": shape.count(trained=True)}
    return {"model_type": shape.model_type, "tied": shape.tied, **total, "groups": groups}


def _memory(
    shape: ModelShape, setting: Setting, step: StepShape, largest: StepShape | None, gpu: Gpu
) -> dict[str, Any]:
    variants = {on: memory(shape, replace(setting, checkpointing=on), step) for on in (False, True)}
    chosen = variants[setting.checkpointing]
    usable = int(USABLE_FRACTION * gpu.memory_bytes)
    return {
        "gpu_bytes": gpu.memory_bytes,
        "usable_bytes": usable,
        "checkpointing": setting.checkpointing,
        "plain": asdict(variants[False]) | {"peak": variants[False].peak},
        "with_checkpointing": asdict(variants[True]) | {"peak": variants[True].peak},
        "peak_bytes": chosen.peak,
        "peak_of_largest_sampled_pack": None if largest is None else memory(shape, setting, largest).peak,
        "fits": chosen.peak <= usable,
        "fits_with_checkpointing": variants[True].peak <= usable,
    }


def _time(
    recipe: TrainRecipe, shape: ModelShape, setting: Setting, step: StepShape, gpu: Gpu, options: Options
) -> dict[str, Any]:
    done, sent = work(shape, setting, step), transfers(shape, setting, step)
    links = links_of(gpu, options.adapter_bytes_per_second, options.ranks_per_node)
    seconds = step_seconds(done, gpu, options.num_ranks, options.mfu)
    steps = recipe.optim.total_steps
    return {
        "model_flops_per_step": done.model,
        "executed_flops_per_step": done.executed,
        "mfu_assumed": options.mfu,
        "seconds_per_step": seconds,
        "hours": None if seconds is None else seconds * steps / 3600,
        "gpu_hours": None if seconds is None else seconds * steps / 3600 * options.num_ranks,
        "communication": [
            asdict(t) | {"moving_seconds": moving_seconds(t, links), "waiting_seconds": waiting_seconds(t, links)}
            for t in sent
        ],
        "node_bytes_per_second": links.node_bytes_per_second,
        "network_bytes_per_second": links.network_bytes_per_second,
    }


def _disk(recipe: TrainRecipe, shape: ModelShape, setting: Setting) -> dict[str, Any]:
    folder = recipe.output_dir.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    trained = shape.count(trained=True)
    one, export = checkpoint_bytes(trained, setting.element_bytes, setting.stage), export_bytes(shape, setting)
    kept = _checkpoints_at_once(recipe)
    needed, free = kept * one + export, shutil.disk_usage(existing).free
    return {
        "checkpoint_bytes": one,
        "checkpoints_at_once": kept,
        "export_bytes": export,
        "needed_bytes": needed,
        "free_bytes": free,
        "folder": str(recipe.output_dir),
        "fits": needed <= free,
    }


def _checkpoints_at_once(recipe: TrainRecipe) -> int:
    """Return the largest number of checkpoints on disk at once, not counting those written on a signal."""
    section, total = recipe.engine, recipe.optim.total_steps
    if section.checkpoint_every_steps is None:
        return 1
    written = -(-total // section.checkpoint_every_steps)
    for_good = 0
    if section.keep_every_steps is not None:
        for_good = total // math.lcm(section.checkpoint_every_steps, section.keep_every_steps)
    # The newest checkpoint is written before the oldest is deleted.
    return min(written, for_good + section.keep_checkpoints + 1)


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json: {path}: cannot be written: {error.strerror}; choose another path") from error
