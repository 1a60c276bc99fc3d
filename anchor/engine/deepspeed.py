"""Build a DeepSpeed engine from a recipe and a ds_configs JSON. No other module imports deepspeed.

1. The JSON may hold ZeRO and communication settings only. Settings that the recipe states are refused there.
2. The recipe supplies batch sizes, clipping and dtype. One pack is one micro-batch, and the training step decides where
   accumulation ends.
3. The weights load under the ZeRO configuration, the objective wraps them, and the engine wraps the objective.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import Tensor, nn

from anchor import dist
from anchor.config.train_recipe import OptimSection, TrainRecipe
from anchor.dist import Ranks
from anchor.engine.extensions import one_at_a_time, unlink_shared_buffer
from anchor.engine.optim import parameter_groups
from anchor.errors import ConfigError, did_you_mean, first_line, shortened

_FROM_THE_RECIPE = {
    "train_batch_size": "batch.pairs of the pack recipe",
    "train_micro_batch_size_per_gpu": "batch.pack_tokens of the pack recipe",
    "gradient_accumulation_steps": "the shards and the number of ranks",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.warmup_steps and optim.decay_steps",
    "bf16": "engine.dtype",
    "fp16": "engine.dtype",
}


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a file of ds_configs/ and refuse settings that belong in the recipe.

    Raises:
        ConfigError: the file is missing or malformed, has no valid ZeRO stage, sets a key that the recipe states, or
            holds a value "auto".
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such DeepSpeed configuration; see ds_configs/")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, an integer of thousands of digits, or nested too deep
        raise ConfigError(f"{path}: not readable as JSON ({first_line(error)}); see ds_configs/") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {str(config)[:60]}; see ds_configs/")
    for key, instead in _FROM_THE_RECIPE.items():
        if key in config:
            raise ConfigError(f"{path}: '{key}' comes from {instead}; remove it here")
    _refuse_auto(config, str(path), "")
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict):
        raise ConfigError(f"{path}: no 'zero_optimization' section")
    if type(zero.get("stage", 0)) is not int or zero.get("stage", 0) not in range(4):
        raise ConfigError(f"{path}: zero_optimization.stage is {str(zero['stage'])[:60]!r}, expected 0, 1, 2 or 3")
    return config


def _refuse_auto(node: Any, where: str, name: str) -> None:
    if node == "auto":
        raise ConfigError(f"{where}: '{name}' is \"auto\", which nothing fills in here; give a value")
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_auto(value, where, f"{name}.{key}" if name else key)


def _refuse_unknown_zero(zero: Any, path: Path) -> None:
    """Check the section against DeepSpeed's own schema now.

    DeepSpeed itself would do so only after the model is loaded, and with an error of many lines.
    """
    if not isinstance(zero, dict):
        raise ConfigError(f"{path}: zero_optimization is {shortened(zero)}, expected an object")
    if isinstance(zero.get("stage"), bool):
        raise ConfigError(f"{path}: zero_optimization.stage is {zero['stage']}, expected 0, 1, 2 or 3")
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            known = DeepSpeedZeroConfig.model_fields
            raise ConfigError(f"{path}: unknown key zero_optimization.{name}{did_you_mean(name, known)}") from error
        raise ConfigError(
            f"{path}: zero_optimization.{name} is {shortened(problem['input'])}: {problem['msg']}"
        ) from error


def complete_ds_config(config: dict[str, Any], recipe: TrainRecipe, world_size: int) -> dict[str, Any]:
    """Return the JSON with the recipe's settings filled in, as DeepSpeed wants it.

    Raises:
        ConfigError: DeepSpeed does not understand a section, or the recipe asks for bf16 under ZeRO-0 or ZeRO-1.
    """
    _refuse_unknown_zero(config["zero_optimization"], recipe.engine.deepspeed)
    stage = config["zero_optimization"].get("stage", 0)
    if recipe.engine.dtype == "bf16" and stage < 2:
        # Stage 0: DeepSpeed refuses bf16 parameters with fp32 sums as an "unsupported mix". Stage 1: DeepSpeed uses
        # its BF16_Optimizer, which cannot report an overflow before the update.
        raise ConfigError(
            f"{recipe.engine.deepspeed}: zero_optimization.stage is {stage}, at which DeepSpeed cannot both sum "
            "gradients of bf16 parameters in float32 and check them before the update; use stage 2 or 3, or "
            "engine.dtype: fp32"
        )
    return config | {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optim.max_grad_norm,
        "bf16": {"enabled": recipe.engine.dtype == "bf16"},
        # Sum the gradients of several packs in float32, whatever the compute dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,
    }


class Engine:
    """Thin wrapper of DeepSpeed's engine: forward, backward, step, and the calls that checkpoints and export need.

    Args:
        objective: the module; ZeRO partitions its parameters.
        ds_config: result of :func:`complete_ds_config`.
        optim: the recipe's ``optim`` section.
        ranks: this process among all ranks.
        universal: True if :meth:`load` will read a checkpoint that :meth:`convert_to_universal` wrote.
    """

    def __init__(
        self,
        objective: nn.Module,
        ds_config: dict[str, Any],
        optim: OptimSection,
        ranks: Ranks,
        *,
        universal: bool = False,
    ) -> None:
        self.ranks, self.universal = ranks, universal
        offload = "offload_optimizer" in ds_config["zero_optimization"]
        if universal:
            ds_config = ds_config | {"checkpoint": {"load_universal": True}}
        self._engine: Any = deepspeed.initialize(
            model=objective,
            optimizer=_adamw(objective, optim, cpu_offload=offload),
            config=ds_config,
            dist_init_required=False,
        )[0]
        self._engine.train()
        self.zero_stage: int = ds_config["zero_optimization"].get("stage", 0)
        # ZeRO-0 keeps plain AdamW and whole gradients, which are equal on all ranks after the reduction.
        self._replicated = self.zero_stage == 0

    @property
    def objective(self) -> nn.Module:
        """The wrapped module. Call it only through :meth:`forward`."""
        return self._engine.module

    @property
    def dtype_bytes(self) -> int:
        """Bytes per weight in the compute dtype."""
        return next(self.objective.parameters()).element_size()

    def num_parameters(self, *, trained: bool) -> int:
        """Return the number of trained or frozen parameters over all ranks; a tied matrix counts once."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.objective.parameters() if p.requires_grad == trained)

    def forward(self, *args: Any) -> Any:
        """Run the objective's forward; DeepSpeed gathers parameters as needed."""
        return self._engine(*args)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Turn off gradients and dropout inside the context."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of this pack's share of the loss.

        DeepSpeed averages gradients over ranks. Scaling the loss by the world size turns that mean into a sum.

        Args:
            loss: this pack's share of the step's loss.
            last: True if the optimiser step follows.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.ranks.world_size)

    def gradient_overflows(self) -> bool:
        """Return whether any rank's accumulated gradient is not finite; all ranks get the same answer."""
        if self._replicated:
            return not math.isfinite(self._replicated_norm())
        optimizer = self._engine.optimizer
        optimizer.check_overflow()
        overflow, optimizer.overflow = bool(optimizer.overflow), False
        return overflow

    def step(self, lr: float) -> float:
        """Clip the gradients, update the parameters, and clear the gradients.

        Returns:
            The global gradient norm before clipping.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        replicated_norm = self._replicated_norm() if self._replicated else None
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if replicated_norm is None else replicated_norm

    def _replicated_norm(self) -> float:
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def save(self, folder: Path, tag: str) -> None:
        """Write this rank's share of the trained parameters and their optimiser state to ``folder/tag``."""
        partly = self.num_parameters(trained=False) > 0
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=partly)

    def load(self, folder: Path, tag: str) -> None:
        """Read a checkpoint that :meth:`save` wrote; frozen parameters keep their values."""
        partly = self.num_parameters(trained=False) > 0
        decays = [group["weight_decay"] for group in self._engine.optimizer.param_groups]
        self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not partly)
        if self.universal:
            # DeepSpeed shares one step counter among all parameters, so each of them would increment it. It also
            # leaves the counter on the CPU, where a CUDA kernel cannot read it, and gives every group the settings
            # of the first.
            optimizer = self._engine.optimizer
            for state in getattr(optimizer, "optimizer", optimizer).state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].to(state["exp_avg"].device, copy=True)
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    @staticmethod
    def convert_to_universal(folder: Path, universal: Path) -> None:
        """Rewrite all ranks' shares of a checkpoint parameter by parameter, so that any number of ranks can load it.

        Only one rank calls it.

        Raises:
            RuntimeError: DeepSpeed's converter failed; the message holds the end of its error output.
        """
        workers = str(min(8, os.cpu_count() or 1))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
                *("--input_folder", str(folder), "--output_folder", str(universal)),
                *("--num_extract_workers", workers, "--num_merge_workers", workers),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{folder}: conversion to another number of ranks failed: {done.stderr[-2000:]}")

    def gathered(self, parameter: nn.Parameter) -> Tensor:
        """Return a whole parameter on the CPU of rank 0 and an empty tensor elsewhere; every rank calls it."""
        with whole(parameter):
            return parameter.detach().cpu().clone() if self.ranks.rank == 0 else torch.empty(0)


@contextmanager
def whole(parameter: Tensor) -> Iterator[None]:
    """Gather a parameter that ZeRO-3 has partitioned, for reading inside the context; every rank calls it."""
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        yield


def _adamw(module: nn.Module, optim: OptimSection, *, cpu_offload: bool) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), on DeepSpeed's CPU kernel if offloaded."""
    groups = parameter_groups(module, optim)
    if cpu_offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles a kernel when first used

        with one_at_a_time():
            return DeepSpeedCPUAdam(groups, lr=optim.lr, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=optim.lr, fused=True)


def init_communication() -> None:
    """Make DeepSpeed use the process group that :func:`anchor.dist.init` created."""
    accelerator: Any = get_accelerator()
    builder = accelerator.create_op_builder("ShareMemCommBuilder")
    if builder is not None and __compatible_ops__.get(builder.NAME, False):
        with one_at_a_time():
            builder.load()  # cached, so the next line, where ranks wait for one another, loads nothing
    deepspeed.init_distributed(
        dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, dist_init_required=False
    )
    dist.barrier()  # by now every rank has mapped every buffer
    unlink_shared_buffer(torch.distributed.get_rank())
