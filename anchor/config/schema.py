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
Weight = Annotated[float, Field(gt=0.0)]
Similarity = Literal["query_to_document", "query_to_query", "document_to_query", "document_to_document"]
"""Of which side of a pair to which side of all pairs."""


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
    """Folder of `NAME.jsonl`, `NAME.jsonl.gz` or `NAME.jsonl.zst`, or one such file."""
    only: tuple[str, ...] | None = None
    """Names of the sources to take; all files of the folder when absent."""
    instructions: dict[str, tuple[str, ...]] = {}
    """Instructions of sources that the shipped preset does not know, or other ones; two alternate by row."""
    symmetric: tuple[str, ...] = ()
    """Further sources whose documents carry the instruction too (allnli and quora do by the preset)."""
    max_rows: PositiveInt | None = None
    """Rows read of each source, the first ones; all when absent."""
    weights: dict[str, Weight] = {}
    """Weights of sources in the mixture; 1 when absent."""
    languages: dict[str, tuple[str, ...]] = {}
    """Languages (ISO 639-1) of sources that the shipped preset does not know, or other ones."""


class _NamedSource(_Section):
    """What sources with a name of their own have in common."""

    name: FileStem
    """Name of the source in the index and in the metrics."""
    format: Literal["columns", "sentence_transformers", "flag_embedding", "tevatron"] = "columns"
    """Layout of a row: named `columns`; `sentence_transformers` (anchor, positive, negative, negative_1 ...);
    `flag_embedding` (query, pos[], neg[]); `tevatron` (query, positive_passages[], negative_passages[], each with
    title and text)."""
    columns: Columns = Columns()
    """Column names of the format `columns`; the other formats bring their own."""
    positives: Literal["first", "each"] = "first"
    """Which of several positives of a row are used: the first, the others counted as `unused_positives`; or each, as
    a pair of its own (then two pairs of one query in one batch hold each other's positive as a false negative)."""
    instructions: tuple[str, ...]
    """Instruction of the queries; two alternate by row; an empty list means none."""
    symmetric: bool = False
    """Whether documents carry the instruction too."""
    max_rows: PositiveInt | None = None
    """Rows read, the first ones; all when absent."""
    weight: Weight = 1.0
    """Multiplies the source's share of the mixture: 2 is two passes over it per epoch, 0.5 half a pass."""
    languages: tuple[str, ...] = ()
    """Languages (ISO 639-1) of the texts; kept in the index and shown by `inspect`."""

    @model_validator(mode="after")
    def _columns_belong_to_their_format(self) -> "_NamedSource":
        if self.format != "columns" and "columns" in self.model_fields_set:
            raise ValueError(f"format '{self.format}' brings its own columns; remove columns or use format: columns")
        return self


class FilesSource(_NamedSource):
    """JSON-lines, CSV, TSV or Parquet files, read as one source."""

    kind: Literal["files"]
    path: Path
    """A `.jsonl`, `.csv`, `.tsv` (each also with `.gz` or `.zst`) or `.parquet` file, or a folder of them."""


class HubSource(_NamedSource):
    """A dataset of the Hugging Face hub, or a local copy of one, through `datasets`."""

    kind: Literal["hub"]
    dataset: str
    """Hub name or local folder."""
    config: str | None = None
    """Configuration of the dataset."""
    split: str
    """Split of the dataset."""


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


class ProportionalMixture(_Section):
    """Every pair once per epoch."""

    kind: Literal["proportional"]


class CappedMixture(_Section):
    """Every pair once per epoch, but of no source more than so many; the next epoch goes on where this one stopped."""

    kind: Literal["capped"]
    max_pairs: PositiveInt
    """Pairs of one source in an epoch, at most; at least `batch.pairs`."""


class TemperatureMixture(_Section):
    """As many batches as the sources have, shared out as `pairs ** exponent`: small sources repeat, large ones take
    several epochs (Conneau et al. 2020, arXiv:1911.02116, section 3.1, whose alpha is `exponent`)."""

    kind: Literal["temperature"]
    exponent: Fraction
    """1 is proportional, 0 gives every source as many batches."""


Mixture = Annotated[ProportionalMixture | CappedMixture | TemperatureMixture, Field(discriminator="kind")]


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
    mixture: Mixture = ProportionalMixture(kind="proportional")
    """How many batches of each source an epoch has."""
    epochs: PositiveInt = 1
    """Epochs written, each with pairs put into batches anew; training walks through them in turn."""
    prompts: dict[str, str] = {}
    """Instructions of the exported model's prompts by name: `query`, or an mteb task or task type such as `STS`;
    `query` is the largest source's instruction when absent."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Stop at the first row that cannot be used, or put it into `quarantine-SOURCE.jsonl` and count it. Such a row is
    malformed, no UTF-8, lacks a field or negatives, or has a text that is empty, holds only control characters, a NUL
    character or half a surrogate pair. Other rows are no mistake and never stop a run, they are dropped and counted:
    pairs whose query equals the positive, and all but the first of equal pairs (query and positive) of a source."""
    max_skipped_fraction: Fraction = 0.05
    """Under `on_bad_row: skip`, the largest share of a source's rows that may be skipped; more is an error."""

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
        if isinstance(self.mixture, CappedMixture) and self.mixture.max_pairs < self.batch.pairs:
            raise ValueError(
                f"mixture.max_pairs ({self.mixture.max_pairs}) is less than batch.pairs ({self.batch.pairs}), so "
                "that no source has a batch; raise it"
            )
        if not self.template.instruction_format.endswith("{text}"):
            raise ValueError(
                f"template.instruction_format is {self.template.instruction_format!r}; it must end in '{{text}}'"
            )
        for number, source in enumerate(self.sources):
            if isinstance(source, E5Source) or source.format != "columns":
                continue
            if self.text.hard_negatives and not source.columns.negatives:
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
    direction: Literal["causal", "bidirectional"] = "causal"
    """Whether a token attends to the tokens after it too (LLM2Vec, BehnamGhader et al. 2024, arXiv:2404.05961); the
    exported `config.json` then says `"is_causal": false`, which transformers >= 5.2 obeys. Contrastive only."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""


class ContrastiveTerm(_Section):
    """InfoNCE over the batch's documents and hard negatives; equations in `anchor/objectives/info_nce.py`."""

    temperature: Annotated[float, Field(gt=0.0)]
    """Divides cosine similarities (dimensionless). The paper: 0.02."""
    false_negative_margin: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    """A text whose cosine exceeds the pair's own by more than this (cosine units) is no negative of it; off when
    absent. Qwen3-Embedding: 0.1; below zero it is NV-Retriever's TopK-MarginPos."""
    negatives: tuple[Similarity, ...] = ("query_to_document",)
    """Similarities in a pair's denominator: of its query and of its document to all other documents and queries.
    GTE: all four."""
    softmax: Literal["joint", "per_side"] = "joint"
    """One softmax per pair over all of `negatives`, or the mean of two: that of its query and that of its document."""
    matryoshka_dimensions: tuple[PositiveInt, ...] = ()
    """Leading dimensions that must serve as embeddings by themselves, ascending, below the hidden size: the loss is
    the mean over them and the whole embedding. None when empty."""

    @model_validator(mode="after")
    def _terms_fit(self) -> "ContrastiveTerm":
        if len(set(self.negatives)) < len(self.negatives):
            raise ValueError(f"negatives names a similarity twice ({', '.join(self.negatives)}); name each once")
        if "query_to_document" not in self.negatives:
            raise ValueError("negatives lacks query_to_document, which holds the positive; add it")
        if self.softmax == "per_side" and "document_to_query" not in self.negatives:
            raise ValueError(
                "softmax is per_side, but negatives lacks document_to_query, which holds the document's positive; "
                "add it or use softmax: joint"
            )
        dimensions = self.matryoshka_dimensions
        if list(dimensions) != sorted(set(dimensions)):
            raise ValueError(f"matryoshka_dimensions ({', '.join(map(str, dimensions))}) must ascend")
        return self


class JointContrastive(ContrastiveTerm):
    """A contrastive term beside reconstruction, over the same anchor states."""

    weight: Annotated[float, Field(gt=0.0)]
    """Multiplies the contrastive loss (dimensionless); reconstruction weighs 1."""


class ReconstructionObjective(_Section):
    """Stage I: the anchor state of one side reconstructs the other side."""

    kind: Literal["reconstruction"]
    alpha: Fraction
    """Weight of query-to-document; document-to-query weighs 1 - alpha. The paper: 0.2. With 0 or 1 the other direction
    is not computed."""
    target: Literal["body", "instruction_and_body"] = "body"
    """Targets: the bare text, or the text with the instruction that it carries; the anchor token ends both."""
    contrastive: JointContrastive | None = None
    """A contrastive term added to the loss, over the same encode pass; hard negatives are then encoded too."""


class ContrastiveObjective(ContrastiveTerm):
    """Stage II: InfoNCE over the batch's documents and hard negatives."""

    kind: Literal["contrastive"]


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
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of so many steps are kept too, for good."""
    timeout_seconds: PositiveInt = 1800
    """Longest that a collective, a step, a checkpoint or the export may take; then the run ends and names the step."""


class EvaluationSection(_Section):
    """Loss and retrieval on pairs that are not trained on, while training."""

    shards: Path
    """Held-out shards, packed with the same tokenizer and template."""
    every_steps: PositiveInt
    """Evaluate every so many steps, and before the first and after the last."""
    max_batches: PositiveInt = 8
    """The first so many batches are used; their documents are one pool."""


class TelemetrySection(_Section):
    """Where metrics go besides `metrics.jsonl`."""

    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """TensorBoard files in `output_dir/tensorboard`; Weights & Biases. One that cannot start stops the run."""
    wandb_project: str | None = None
    """Project at Weights & Biases; required by its logger."""
    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` writes to `output_dir/wandb`, for `wandb sync` later."""
    peak_tflops: Annotated[float, Field(gt=0.0)] | None = None
    """Peak bf16 TFLOP/s of one device, for model FLOP/s utilisation; by the GPU's name when absent."""

    @model_validator(mode="after")
    def _wandb_has_a_project(self) -> "TelemetrySection":
        if ("wandb" in self.loggers) != (self.wandb_project is not None):
            raise ValueError("loggers and wandb_project disagree: give both 'wandb' and a project, or neither")
        return self


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
    evaluation: EvaluationSection | None = None
    """Held-out evaluation while training; none when absent."""
    telemetry: TelemetrySection = TelemetrySection()
    """Further loggers."""

    @model_validator(mode="after")
    def _decoders_are_causal(self) -> "TrainRecipe":
        if self.backbone.direction == "bidirectional" and isinstance(self.objective, ReconstructionObjective):
            raise ValueError(
                "backbone.direction is bidirectional, but objective.kind reconstruction decodes with the same weights, "
                "where every target would see itself; use backbone.direction: causal or objective.kind: contrastive"
            )
        return self
