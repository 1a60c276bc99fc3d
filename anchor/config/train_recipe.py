"""Recipe for training: :class:`TrainRecipe`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from anchor.config.fields import ModelPathText, NonNegativeInt, PositiveInt, Section, Seed, UserPath
from anchor.config.objectives import ContrastiveSection, ObjectiveSection, SelfSupervisedSection


class DataSection(Section):
    shards: UserPath
    """Folder written by `python -m data_prep pack`."""


class FullTraining(Section):
    """Train all parameters."""

    kind: Literal["full"]


class LoraTraining(Section):
    """Train low-rank adapters on the linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    kind: Literal["lora"]
    r: PositiveInt
    """Rank of the adapters."""
    alpha: PositiveInt
    """The adapter's output is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Dropout on the adapter's input."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    """Names of the linear layers that get an adapter; each must exist."""


class FrozenTraining(Section):
    """Freeze the backbone and train only the objective's own parameters; for `self_supervised`."""

    kind: Literal["frozen"]


class BackboneSection(Section):
    path: ModelPathText
    """Model folder, hub name or `.gguf` file of a Llama-, Qwen2-, Qwen3- or Mistral-type causal LM."""
    trained: Annotated[FullTraining | LoraTraining | FrozenTraining, Field(discriminator="kind")]
    """Parameters of the backbone to train."""
    attention: Literal["flash", "varlen", "segments"]
    """Packed attention kernel: the flash-attn package, torch's varlen kernel (CUDA), or one SDPA call per segment."""
    direction: Literal["causal", "bidirectional"] = "causal"
    """With `bidirectional`, a token also attends to later tokens (LLM2Vec, BehnamGhader et al. 2024, arXiv:2404.05961).
    The exported `config.json` then has `"is_causal": false`, which transformers >= 5.2 obeys. Contrastive only."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass. This saves memory and takes about a third more time."""


class OptimSection(Section):
    """AdamW with linear warm-up and linear decay to zero."""

    lr: Annotated[float, Field(gt=0.0)]
    """Peak learning rate."""
    warmup_steps: NonNegativeInt
    """Steps of linear warm-up."""
    total_steps: NonNegativeInt
    """Steps to train; 0 exports the untrained model with its template."""
    decay_steps: PositiveInt | None = None
    """Step at which the learning rate reaches zero; `total_steps` when absent."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradients are clipped to this global norm."""

    @model_validator(mode="after")
    def _horizon(self) -> "OptimSection":
        if self.decay_steps is not None and self.decay_steps < self.total_steps:
            raise ValueError(f"decay_steps ({self.decay_steps}) is less than total_steps ({self.total_steps})")
        return self


class EngineSection(Section):
    deepspeed: UserPath
    """DeepSpeed configuration, a file of ds_configs/: ZeRO and communication settings only."""
    dtype: Literal["bf16", "fp32"]
    """Compute and export dtype; master weights and optimiser state are always fp32."""
    log_every_steps: PositiveInt = 10
    """Steps between log lines; `metrics.jsonl` has every step."""
    checkpoint_every_steps: PositiveInt | None = None
    """Steps between checkpoints. The end of the run always writes one."""
    keep_checkpoints: PositiveInt = 2
    """Number of recent checkpoints to keep."""
    keep_every_steps: PositiveInt | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    timeout_seconds: PositiveInt = 1800
    """Time limit for a step, a checkpoint or the export. A run that exceeds it ends and names the step. Collectives get
    a minute more."""


class EvaluationSection(Section):
    """Loss and retrieval on held-out pairs during training."""

    shards: UserPath
    """Held-out shards, packed with the same tokenizer and template."""
    every_steps: PositiveInt
    """Steps between evaluations. The run also evaluates before the first step and after the last."""
    max_batches: PositiveInt = 8
    """Number of batches to use, from the first. Their documents form one pool."""


class TelemetrySection(Section):
    """Destinations of metrics besides `metrics.jsonl`."""

    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """TensorBoard (files in `output_dir/tensorboard`) and Weights & Biases. A logger that cannot start stops the run.
    """
    wandb_project: str | None = None
    """Weights & Biases project; required with the `wandb` logger."""
    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` writes to `output_dir/wandb`; run `wandb sync` later."""
    peak_tflops: Annotated[float, Field(gt=0.0)] | None = None
    """Peak bf16 TFLOP/s of one device, for model FLOP/s utilisation. When absent, it is looked up by GPU name."""

    @model_validator(mode="after")
    def _wandb_has_a_project(self) -> "TelemetrySection":
        if ("wandb" in self.loggers) != (self.wandb_project is not None):
            raise ValueError("loggers and wandb_project disagree: give both 'wandb' and a project, or neither")
        return self


class TrainRecipe(Section):
    """Recipe of `python -m anchor.train`."""

    output_dir: UserPath
    """Folder for run.yaml, metrics.jsonl, checkpoints/ and export/."""
    seed: Seed
    """Seed of the batch order, dropout and new parameters."""
    data: DataSection
    """Training data."""
    backbone: BackboneSection
    """Model to train."""
    objective: ObjectiveSection
    """Loss to minimise."""
    optim: OptimSection
    """Optimiser settings."""
    engine: EngineSection
    """Runtime settings."""
    evaluation: EvaluationSection | None = None
    """Held-out evaluation during training; off when absent."""
    telemetry: TelemetrySection = TelemetrySection()
    """Extra loggers."""

    @model_validator(mode="after")
    def _kernel_has_the_dtype(self) -> "TrainRecipe":
        if self.engine.dtype == "fp32" and self.backbone.attention != "segments":
            raise ValueError(
                f"backbone.attention is {self.backbone.attention}, whose kernel knows no engine.dtype fp32; use "
                "engine.dtype: bf16 or backbone.attention: segments"
            )
        return self

    @model_validator(mode="after")
    def _decoders_are_causal(self) -> "TrainRecipe":
        if self.backbone.direction == "bidirectional" and not isinstance(self.objective, ContrastiveSection):
            raise ValueError(
                f"backbone.direction is bidirectional, but objective.kind {self.objective.kind} decodes with the same "
                "weights, where every target would see itself; use backbone.direction: causal or objective.kind: "
                "contrastive"
            )
        return self

    @model_validator(mode="after")
    def _special_tokens_stand_on_a_frozen_backbone(self) -> "TrainRecipe":
        own, trained = isinstance(self.objective, SelfSupervisedSection), self.backbone.trained.kind
        if own and trained == "full":
            raise ValueError(
                "backbone.trained.kind is full, but objective.kind self_supervised exports no backbone; use "
                "backbone.trained.kind: frozen (as the paper) or lora"
            )
        if not own and trained == "frozen":
            raise ValueError(
                f"backbone.trained.kind is frozen, but objective.kind {self.objective.kind} has no parameters of its "
                "own, so that nothing would be trained; use backbone.trained.kind: full or lora"
            )
        return self
