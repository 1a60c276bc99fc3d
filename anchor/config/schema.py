"""Every knob of the two recipes: packing data (:class:`PackRecipe`) and training (:class:`TrainRecipe`).

All models are frozen and forbid unknown keys. A field has a default only where it is right for
everybody; coefficients from a paper have none. Units are in the field names or in the description.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FileStem = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""A name that can stand in a file name."""


# ---------------------------------------------------------------------------------------------- packing


class PresetTemplate(_Section):
    """A template that ships with the project, by family."""

    kind: Literal["preset"]
    name: str
    """`chatml` (Qwen, SmolLM), `llama3`, `mistral` or `plain` (beginning of text, text, end of text)."""
    instruction_format: str = "{instruction}: {text}"
    """How an instruction is joined to a text; must end in `{text}`."""


class ChatTemplate(_Section):
    """The model's own chat template, rendered once around a user turn."""

    kind: Literal["chat"]
    instruction_format: str = "{instruction}: {text}"
    """How an instruction is joined to a text; must end in `{text}`."""


class CustomTemplate(_Section):
    """Prefix and suffix written out; the suffix's last token is the anchor token."""

    kind: Literal["custom"]
    prefix: str
    """Text before every segment; special tokens by name."""
    suffix: str
    """Text after every segment; its last token is the anchor token."""
    instruction_format: str = "{instruction}: {text}"
    """How an instruction is joined to a text; must end in `{text}`."""


TemplateSection = Annotated[PresetTemplate | ChatTemplate | CustomTemplate, Field(discriminator="kind")]


class Columns(_Section):
    """Which columns of a table hold the sides of a pair."""

    query: str = "query"
    """Column of the query text."""
    positive: str = "positive"
    """Column of the document text."""
    negatives: tuple[str, ...] = ()
    """Columns of hard negatives; a column may hold one text or a list of texts."""


class E5Source(_Section):
    """A folder (one file per source) or one file in the layout of the E5 public mix."""

    kind: Literal["e5"]
    path: Path
    """Folder of `NAME.jsonl` or `NAME.jsonl.gz`, or one such file."""
    only: tuple[str, ...] | None = None
    """Names of the sources to take; all files of the folder when absent."""
    instructions: dict[str, tuple[str, ...]] = {}
    """Instructions of sources that the shipped preset does not know, or other ones; two alternate by row."""
    symmetric: tuple[str, ...] = ()
    """Further sources whose documents carry the instruction too (allnli and quora do by the preset)."""


class FilesSource(_Section):
    """JSON-lines or Parquet files with named columns, read as one source."""

    kind: Literal["files"]
    name: FileStem
    """Name of the source in the index and in the metrics."""
    path: Path
    """A `.jsonl`, `.jsonl.gz` or `.parquet` file, or a folder of them."""
    columns: Columns = Columns()
    """Column names."""
    instructions: tuple[str, ...]
    """Instruction of the queries; two alternate by row; an empty list means none."""
    symmetric: bool = False
    """Whether documents carry the instruction too."""


class HubSource(_Section):
    """A dataset of the Hugging Face hub, or a local copy of one, through `datasets`."""

    kind: Literal["hub"]
    name: FileStem
    """Name of the source in the index and in the metrics."""
    dataset: str
    """Hub name or local folder."""
    config: str | None = None
    """Configuration of the dataset."""
    split: str
    """Split of the dataset."""
    columns: Columns = Columns()
    """Column names."""
    instructions: tuple[str, ...]
    """Instruction of the queries; two alternate by row; an empty list means none."""
    symmetric: bool = False
    """Whether documents carry the instruction too."""


SourceSection = Annotated[E5Source | FilesSource | HubSource, Field(discriminator="kind")]


class TextLimits(_Section):
    max_tokens: PositiveInt
    """Longest segment, template and instruction included; longer texts are cut and keep the anchor token."""
    hard_negatives: NonNegativeInt
    """Hard negatives kept per pair; rows with fewer are refused (see `on_bad_row`)."""


class BatchShape(_Section):
    pairs: PositiveInt
    """Pairs of one optimiser step, over all ranks."""
    pack_tokens: PositiveInt
    """Token budget of one pack: one forward pass of one rank."""
    pack_multiple: PositiveInt
    """Packs per batch are a multiple of it; training works on every number of ranks that divides it."""


class PackRecipe(_Section):
    """What `python -m data_prep pack` does."""

    output_dir: Path
    """Folder of the shards; must be new or an unfinished run of the same recipe."""
    seed: NonNegativeInt
    """Seed of the shuffles."""
    tokenizer: str
    """Model folder, hub name or `.gguf` file whose tokenizer is used."""
    template: TemplateSection
    """What surrounds every text."""
    sources: tuple[SourceSection, ...] = Field(min_length=1)
    """Where pairs come from."""
    text: TextLimits
    """Limits per text."""
    batch: BatchShape
    """Size of a batch and of its packs."""
    prompts: dict[str, str] = {}
    """Instructions of the exported model's prompts by name: `query`, or an mteb task or task type such as `STS`;
    `query` is the largest source's instruction when absent."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Stop at the first row that cannot be used, or put it into `quarantine.jsonl` and count it."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> "PackRecipe":
        longest = self.text.max_tokens * (2 + self.text.hard_negatives)
        if longest > self.batch.pack_tokens:
            raise ValueError(
                f"batch.pack_tokens ({self.batch.pack_tokens}) is smaller than the longest pair, "
                f"{2 + self.text.hard_negatives} segments x text.max_tokens ({self.text.max_tokens}) = {longest}; "
                "raise pack_tokens or lower max_tokens"
            )
        if self.batch.pairs % self.batch.pack_multiple:
            raise ValueError(
                f"batch.pairs ({self.batch.pairs}) is not a multiple of batch.pack_multiple "
                f"({self.batch.pack_multiple}); choose a multiple"
            )
        if not self.template.instruction_format.endswith("{text}"):
            raise ValueError(
                f"template.instruction_format is {self.template.instruction_format!r}; it must end in '{{text}}'"
            )
        for number, source in enumerate(self.sources):
            if self.text.hard_negatives and not isinstance(source, E5Source) and not source.columns.negatives:
                raise ValueError(
                    f"text.hard_negatives is {self.text.hard_negatives}, but sources.{number} ('{source.name}') names "
                    "no columns.negatives; name them or set text.hard_negatives to 0"
                )
        return self


# --------------------------------------------------------------------------------------------- training


class DataSection(_Section):
    shards: Path
    """Folder written by `python -m data_prep pack`."""


class FullTraining(_Section):
    """All parameters are trained."""

    kind: Literal["full"]


class LoraTraining(_Section):
    """Low-rank adapters on the linear layers are trained (Hu et al. 2021, arXiv:2106.09685)."""

    kind: Literal["lora"]
    r: PositiveInt
    """Rank of the adapters."""
    alpha: PositiveInt
    """The adapter's output is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Dropout on the adapter's input."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter; each must exist."""


class BackboneSection(_Section):
    path: str
    """Model folder, hub name or `.gguf` file of a Llama-, Qwen2-, Qwen3- or Mistral-type causal LM."""
    trained: Annotated[FullTraining | LoraTraining, Field(discriminator="kind")]
    """Which parameters are trained."""
    attention: Literal["flash", "varlen", "segments"]
    """Packed attention: the flash-attn package, torch's own varlen kernel (CUDA), or one SDPA per segment."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""


class ReconstructionObjective(_Section):
    """Stage I: the anchor state of one side reconstructs the other side."""

    kind: Literal["reconstruction"]
    alpha: Fraction
    """Weight of query-to-document; document-to-query weighs 1 - alpha. The paper: 0.2."""


class ContrastiveObjective(_Section):
    """Stage II: InfoNCE over the batch's documents and hard negatives."""

    kind: Literal["contrastive"]
    temperature: Annotated[float, Field(gt=0.0)]
    """Divides cosine similarities (dimensionless). The paper: 0.02."""


class OptimSection(_Section):
    """AdamW with linear warm-up and linear decay to zero."""

    lr: Annotated[float, Field(gt=0.0)]
    """Highest learning rate."""
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


class EngineSection(_Section):
    deepspeed: Path
    """A file of ds_configs/: ZeRO and communication only."""
    dtype: Literal["bf16", "fp32"]
    """Compute and export dtype; master weights and optimiser state are always fp32."""
    log_every_steps: PositiveInt = 10
    """One log line per so many steps; `metrics.jsonl` has every step."""
    checkpoint_every_steps: PositiveInt | None = None
    """A checkpoint every so many steps; one is always written at the end."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints are kept."""


class TrainRecipe(_Section):
    """What `python -m anchor.train` does."""

    output_dir: Path
    """Folder of run.yaml, metrics.jsonl, checkpoints/ and export/."""
    seed: NonNegativeInt
    """Seed of the batch order and of dropout."""
    data: DataSection
    """What to train on."""
    backbone: BackboneSection
    """What is trained."""
    objective: Annotated[ReconstructionObjective | ContrastiveObjective, Field(discriminator="kind")]
    """What is minimised."""
    optim: OptimSection
    """How it is minimised."""
    engine: EngineSection
    """How it is run."""
