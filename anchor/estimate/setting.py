"""Inputs of an estimate: the shape of one optimiser step, and the settings of the run."""

from dataclasses import dataclass
from typing import Any, Literal

from anchor.config.train_recipe import FrozenTraining, LoraTraining, TrainRecipe


@dataclass(frozen=True, slots=True)
class StepShape:
    """Shape of one optimiser step.

    Attributes:
        num_pairs: pairs over all ranks.
        num_packs: packs over all ranks, on average.
        pack_tokens: T, the encoded tokens of the pack that memory is estimated for.
        decode_tokens: R of that pack; 0 without a decode pass.
        step_tokens: tokens of all encode passes.
        step_decode_tokens: tokens of all decode passes, which are also the head's rows.
        squared_lengths: sum of the squared lengths of all segments of both passes.
        step_segments: texts encoded, over all ranks.
        gathered_segments: embeddings that a pooled loss gathers from all ranks; 0 when the loss is a sum over packs.
        predicted_tokens, step_predicted_tokens: rows of the head beyond those of the decode pass, for that pack and
            over all ranks. Positive without a decode pass (language model). Negative if some decode positions predict
            nothing (all soft prompts but the last).
    """

    num_pairs: int
    num_packs: float
    pack_tokens: int
    decode_tokens: int
    step_tokens: float
    step_decode_tokens: float
    squared_lengths: float
    step_segments: float
    gathered_segments: float
    predicted_tokens: int = 0
    step_predicted_tokens: float = 0.0

    @property
    def pooled(self) -> bool:
        """Return whether the loss needs the embeddings of all packs."""
        return self.gathered_segments > 0


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings of a run that the estimate depends on.

    Attributes:
        num_ranks: W.
        ranks_per_node: ranks that share fast links.
        element_bytes: e, 2 for bf16, 4 for fp32.
        zero: the ``zero_optimization`` section of the ds_configs file.
        kernel: ``backbone.attention``.
        checkpointing: ``backbone.gradient_checkpointing``.
        lora_rank: r, or None without adapters.
        lora_dropout: True if the adapters use dropout.
        device: ``cpu`` or ``cuda``. It decides chunk sizes, and whether untouched allocations count.
        frozen: True if the model itself is not trained, only special tokens and projections beside it.
    """

    num_ranks: int
    ranks_per_node: int
    element_bytes: int
    zero: dict[str, Any]
    kernel: str
    checkpointing: bool
    lora_rank: int | None
    lora_dropout: bool
    device: Literal["cpu", "cuda"]
    frozen: bool = False

    @property
    def full(self) -> bool:
        """Return whether the whole model is trained."""
        return self.lora_rank is None and not self.frozen

    @property
    def stage(self) -> int:
        return self.zero.get("stage", 0)


def setting_of(
    recipe: TrainRecipe,
    zero: dict[str, Any],
    *,
    num_ranks: int = 1,
    ranks_per_node: int = 8,
    device: Literal["cpu", "cuda"] = "cuda",
) -> Setting:
    """Return the settings that the estimate needs from a recipe and its ``zero_optimization`` section."""
    trained = recipe.backbone.trained
    lora = trained if isinstance(trained, LoraTraining) else None
    return Setting(
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        element_bytes=2 if recipe.engine.dtype == "bf16" else 4,
        zero=zero,
        kernel=recipe.backbone.attention,
        checkpointing=recipe.backbone.gradient_checkpointing,
        lora_rank=None if lora is None else lora.r,
        lora_dropout=lora is not None and lora.dropout > 0,
        frozen=isinstance(trained, FrozenTraining),
        device=device,
    )
