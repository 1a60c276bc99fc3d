"""A training run from recipe to exported folder.

1. Check recipe, shards and ranks against one another; print the batch arithmetic.
2. Load the model, wrap objective and engine; resume when asked.
3. Steps: read, train, write metrics; a checkpoint every N steps and at the end.
4. Export.
"""

import hashlib
import importlib.metadata
import json
import logging
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from anchor import dist
from anchor.config import schema
from anchor.config.schema import LoraTraining, TrainRecipe
from anchor.data.batches import batch_stream, check_ranks
from anchor.data.shards import ShardReader, index_hash, read_index
from anchor.data.templates import Template
from anchor.data.tokenization import SegmentTokenizer, load_tokenizer, tokenizer_fingerprint
from anchor.engine.checkpoint import check_same_run, complete_checkpoints, load_checkpoint, save_checkpoint
from anchor.engine.deepspeed import Engine, complete_ds_config, init_communication, read_ds_config
from anchor.engine.export import export_model
from anchor.engine.metrics import Clock, MetricsFile, log_step, peak_memory_gib
from anchor.engine.optim import learning_rate
from anchor.engine.step import train_step
from anchor.errors import ModelError, ShardError, TrainingError
from anchor.models.backbone import DTYPES, load_backbone
from anchor.objectives.base import Objective
from anchor.objectives.contrastive import ContrastiveObjective
from anchor.objectives.reconstruction import JointReconstructionObjective, ReconstructionObjective

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "pyarrow")


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe checked against its shards.

    Attributes:
        recipe: the recipe.
        reader: the shards.
        ds_config: the DeepSpeed file as read.
    """

    recipe: TrainRecipe
    reader: ShardReader
    ds_config: dict[str, Any]


def make_plan(recipe: TrainRecipe, recipe_path: str, world_size: int) -> Plan:
    """Check everything that can be checked without a model, and say what a step is.

    Raises:
        AnchorError: ds_configs file, shards or number of ranks do not fit.
    """
    ds_config = read_ds_config(recipe.engine.deepspeed)
    reader = ShardReader(recipe.data.shards)
    index = reader.index
    check_ranks(index.pack_multiple, world_size, recipe.data.shards, recipe_path)
    tokenizer = recipe.data.shards / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file() or tokenizer_fingerprint(tokenizer) != index.tokenizer_sha256:
        raise ShardError(f"{tokenizer}: missing or altered since packing; pack again")
    shape = index.recipe["batch"]
    steps, batches = recipe.optim.total_steps, len(reader)
    packs = sum(shard["packs"] for shard in index.shards) / batches
    log.info(
        "%d pairs a step = %.1f packs of at most %d tokens = %d ranks x %.1f; %d batches in %s; %d steps = %.2f epochs",
        shape["pairs"],
        packs,
        shape["pack_tokens"],
        world_size,
        packs / world_size,
        batches,
        recipe.data.shards,
        steps,
        steps / batches,
    )
    return Plan(recipe, reader, ds_config)


def train(plan: Plan, ranks: dist.Ranks, *, resume: bool) -> Path:
    """Train and export; every rank calls it.

    Args:
        plan: result of :func:`make_plan`.
        ranks: this process among all.
        resume: go on from the newest complete checkpoint, or start when there is none.

    Returns:
        The exported folder.

    Raises:
        AnchorError: output folder in use, model that cannot be loaded, loss that is not finite.
    """
    recipe, folder = plan.recipe, plan.recipe.output_dir
    checkpoints = folder / "checkpoints"
    found = complete_checkpoints(checkpoints)
    if found and not resume:
        raise TrainingError(f"{folder}: holds a run ({found[-1].name}); add --resume or choose another output_dir")
    provenance = dist.broadcast_object(_provenance(plan, ranks))
    state = {key: provenance[key] for key in ("recipe", "data_index_sha256", "num_ranks")}
    if found:
        check_same_run(found[-1], state)
    if dist.is_first_rank():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(provenance, sort_keys=False), encoding="utf-8")

    # 2.
    init_communication()
    torch.manual_seed(recipe.seed)
    ds_config = complete_ds_config(plan.ds_config, recipe, ranks.world_size)
    causal_lm = load_backbone(
        recipe.backbone, DTYPES[recipe.engine.dtype], ranks.device.type, work_dir=folder, ds_config=ds_config
    )
    vocabulary, anchor = causal_lm.config.vocab_size, plan.reader.index.anchor_token_id
    if anchor >= vocabulary:
        raise ModelError(
            f"{recipe.backbone.path}: {vocabulary} tokens, the shards' anchor token is {anchor}; "
            "pack with this model's tokenizer"
        )
    objective = make_objective(causal_lm, recipe)
    _log_parameters(objective)
    engine = Engine(objective, ds_config, recipe.optim, ranks)
    exclude_frozen = isinstance(recipe.backbone.trained, LoraTraining)
    first = 0
    if found:
        first = load_checkpoint(engine, found[-1], exclude_frozen=exclude_frozen)
        log.info("resumed at step %d from %s", first, found[-1])

    # 3.
    def checkpoint(step: int) -> None:
        save_checkpoint(
            engine,
            checkpoints,
            {"step": step, **state},
            keep=recipe.engine.keep_checkpoints,
            exclude_frozen=exclude_frozen,
        )

    saved = _steps(plan, engine, folder, first, checkpoint)
    if saved < recipe.optim.total_steps:
        checkpoint(recipe.optim.total_steps)

    # 4.
    export_model(engine, folder / "export", recipe, plan.reader.index, recipe.data.shards, provenance)
    log.info("exported %s", folder / "export")
    return folder / "export"


def make_objective(causal_lm: Any, recipe: TrainRecipe) -> Objective:
    """The module that the recipe's objective section names."""
    section = recipe.objective
    if isinstance(section, schema.ReconstructionObjective):
        instructed = section.target == "instruction_and_body"
        prefix_tokens = template_prefix_tokens(recipe.data.shards) if instructed else None
        kind = ReconstructionObjective if section.contrastive is None else JointReconstructionObjective
        return kind(causal_lm, section, prefix_tokens)
    return ContrastiveObjective(causal_lm, section)


def template_prefix_tokens(shards: Path) -> int:
    """Tokens of the template's prefix, which every segment of the shards begins with."""
    index = read_index(shards)
    tokenizer, template = load_tokenizer(str(shards / "tokenizer")), Template(**index.template)
    return len(SegmentTokenizer(tokenizer, template, index.recipe["text"]["max_tokens"]).prefix)


def _steps(plan: Plan, engine: Engine, folder: Path, first: int, checkpoint: Any) -> int:
    """Train from step ``first`` to the end; returns the step of the last checkpoint."""
    recipe, total, saved = plan.recipe, plan.recipe.optim.total_steps, first
    metrics_file, clock = MetricsFile(folder / "metrics.jsonl", first), Clock()
    every = recipe.engine.checkpoint_every_steps
    end = time.perf_counter()
    for step, batch in batch_stream(plan.reader, recipe.seed, first, total):
        start = time.perf_counter()
        result = train_step(engine, batch, step=step, seed=recipe.seed, lr=learning_rate(step, recipe.optim))
        clock.tokens += result.num_tokens
        seconds = time.perf_counter() - start
        row: dict[str, float | int | str] = {
            "step": step + 1,
            "source": batch.source,
            **result.metrics,
            "data/pairs": batch.num_pairs,
            "data/tokens": result.num_tokens,
            "time/step_seconds": seconds,
            "time/data_wait_seconds": start - end,
            "memory/peak_gib": peak_memory_gib(),
        }
        metrics_file.write(row)
        if (step + 1) % recipe.engine.log_every_steps == 0 or step + 1 == total:
            log_step(step + 1, total, result.metrics, clock)
            clock.reset()
        if every is not None and (step + 1) % every == 0:
            checkpoint(step + 1)
            saved = step + 1
        end = time.perf_counter()
    metrics_file.close()
    return saved


def _log_parameters(module: nn.Module) -> None:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    trained = sum(size for size, grad in sizes if grad)
    log.info("parameters: %s trained of %s", f"{trained:,}", f"{sum(size for size, _ in sizes):,}")


def _provenance(plan: Plan, ranks: dist.Ranks) -> dict[str, Any]:
    recipe = plan.recipe.model_dump(mode="json")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "recipe": recipe,
        "recipe_sha256": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        "data_index_sha256": index_hash(plan.recipe.data.shards),
        "num_ranks": ranks.world_size,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        "commit": git.stdout.strip() or None,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
