"""Recipe + ds_configs JSON -> DeepSpeed engine. The only import of deepspeed.

1. The JSON may hold ZeRO and communication settings only; everything that the recipe says is refused there.
2. Batch sizes, clipping and dtype are filled in from the recipe: one pack is one micro-batch, and the step
   decides where accumulation ends.
3. Weights load under the ZeRO configuration, the objective wraps them, the engine wraps the objective.
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
from anchor.config.schema import OptimSection, TrainRecipe
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
    """Read a file of ds_configs/ and refuse what belongs into the recipe.

    Raises:
        ConfigError: missing file, malformed JSON, a key of the recipe's, or a value "auto".
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such DeepSpeed configuration; see ds_configs/")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, nested too deep
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
    """Let DeepSpeed's own schema judge the section now: it would do so after the model is loaded, in many lines."""
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
    """The JSON with what the recipe says, as DeepSpeed wants it.

    Raises:
        ConfigError: a section that DeepSpeed does not understand; bf16 under ZeRO-0 or ZeRO-1.
    """
    _refuse_unknown_zero(config["zero_optimization"], recipe.engine.deepspeed)
    stage = config["zero_optimization"].get("stage", 0)
    if recipe.engine.dtype == "bf16" and stage < 2:
        # Stage 0: "unsupported mix" of bf16 parameters and fp32 sums. Stage 1: DeepSpeed's BF16_Optimizer, which
        # cannot be asked about overflow before it moves.
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
        # Gradients of several packs are summed in float32, whatever the compute dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,
    }


class Engine:
    """A thin face of DeepSpeed's engine: forward, backward, step, and what checkpoints and export need.

    Args:
        objective: the module; its parameters are partitioned by ZeRO.
        ds_config: result of :func:`complete_ds_config`.
        optim: the recipe's ``optim``.
        ranks: this process among all.
        universal: :meth:`load` will read a checkpoint that :meth:`convert_to_universal` wrote.
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
        # ZeRO-0 leaves plain AdamW and whole gradients, equal on all ranks once they are reduced.
        self._replicated = self.zero_stage == 0

    @property
    def objective(self) -> nn.Module:
        """The wrapped module; call it through :meth:`forward` only."""
        return self._engine.module

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a weight in the compute dtype."""
        return next(self.objective.parameters()).element_size()

    def num_parameters(self, *, trained: bool) -> int:
        """Trained or frozen parameters, over all ranks; a tied matrix counts once."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.objective.parameters() if p.requires_grad == trained)

    def forward(self, *args: Any) -> Any:
        """The objective's forward, with parameters gathered as needed."""
        return self._engine(*args)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradient and no dropout meanwhile."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a loss share; DeepSpeed's mean over ranks becomes the sum.

        Args:
            loss: this pack's share of the step's loss.
            last: whether the optimiser step follows.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.ranks.world_size)

    def gradient_overflows(self) -> bool:
        """Whether any rank's accumulated gradient is not finite; all ranks agree."""
        if self._replicated:
            return not math.isfinite(self._replicated_norm())
        optimizer = self._engine.optimizer
        optimizer.check_overflow()
        overflow, optimizer.overflow = bool(optimizer.overflow), False
        return overflow

    def step(self, lr: float) -> float:
        """Clip, move the parameters, clear the gradients.

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
        """Read what :meth:`save` wrote; frozen parameters are left as they are."""
        partly = self.num_parameters(trained=False) > 0
        decays = [group["weight_decay"] for group in self._engine.optimizer.param_groups]
        self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not partly)
        if self.universal:
            # DeepSpeed gives every parameter one and the same step counter, which each of them then counts up, and
            # leaves it on the CPU, where a GPU's kernel does not reach it. Every group gets the settings of the first.
            optimizer = self._engine.optimizer
            for state in getattr(optimizer, "optimizer", optimizer).state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].to(state["exp_avg"].device, copy=True)
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    @staticmethod
    def convert_to_universal(folder: Path, universal: Path) -> None:
        """Rewrite all ranks' shares of a checkpoint parameter by parameter, for any number of ranks; one rank does it.

        Raises:
            RuntimeError: DeepSpeed's converter failed; the message holds the end of what it printed.
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
        """A whole parameter on the CPU of rank 0 (elsewhere an empty tensor); every rank calls it."""
        with whole(parameter):
            return parameter.detach().cpu().clone() if self.ranks.rank == 0 else torch.empty(0)


@contextmanager
def whole(parameter: Tensor) -> Iterator[None]:
    """Meanwhile a parameter that ZeRO-3 has partitioned is whole on every rank, to be read; every rank calls it."""
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        yield


def _adamw(module: nn.Module, optim: OptimSection, *, cpu_offload: bool) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); DeepSpeed's CPU kernel when its state is offloaded."""
    groups = parameter_groups(module, optim)
    if cpu_offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles a kernel when first used

        with one_at_a_time():
            return DeepSpeedCPUAdam(groups, lr=optim.lr, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=optim.lr, fused=True)


def init_communication() -> None:
    """Let DeepSpeed use the process group that :func:`anchor.dist.init` made."""
    accelerator: Any = get_accelerator()
    builder = accelerator.create_op_builder("ShareMemCommBuilder")
    if builder is not None and __compatible_ops__.get(builder.NAME, False):
        with one_at_a_time():
            builder.load()  # DeepSpeed keeps it: the next line, where ranks wait for one another, loads nothing
    deepspeed.init_distributed(
        dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, dist_init_required=False
    )
    dist.barrier()  # now every rank has mapped every buffer
    unlink_shared_buffer(torch.distributed.get_rank())
