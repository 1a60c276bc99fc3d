"""Every knob of packing data: :class:`PackRecipe`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from anchor.config.fields import (
    DatasetPathText,
    FileStem,
    Fraction,
    ModelPathText,
    NonNegativeInt,
    PositiveInt,
    Section,
    Seed,
    UserPath,
    Weight,
)


class PresetTemplate(Section):
    """A template that ships with the project, by family."""

    kind: Literal["preset"]
    name: str
    """`chatml` (Qwen, SmolLM), `llama3`, `mistral` or `plain` (beginning of text, text, end of text)."""
    instruction_format: str = "{instruction}: {text}"
    """How an instruction is joined to a text; must end in `{text}`."""


class ChatTemplate(Section):
    """The model's own chat template, rendered once around a user turn."""

    kind: Literal["chat"]
    instruction_format: str = "{instruction}: {text}"
    """How an instruction is joined to a text; must end in `{text}`."""


class CustomTemplate(Section):
    """Prefix and suffix written out; the suffix's last token is the anchor token."""

    kind: Literal["custom"]
    prefix: str
    """Text before every segment; special tokens by name."""
    suffix: str
    """Text after every segment; its last token is the anchor token."""
    instruction_format: str = "{instruction}: {text}"
    """How an instruction is joined to a text; must end in `{text}`."""


class SpecialTokensTemplate(Section):
    """Trained special tokens behind every text; they are added to the tokenizer (LLM2Vec-Gen, arXiv:2603.10913)."""

    kind: Literal["special_tokens"]
    tokens: PositiveInt
    """Special tokens behind every segment (P); their trained states are what represents a text. The paper: 10."""
    prefix: str = ""
    """Text before every segment; special tokens by name."""
    suffix: str = ""
    """Text between every text and its special tokens; none in the paper."""
    end: str | None = None
    """Token, by name, that ends a decoded answer; the tokenizer's end-of-text token when absent."""
    instruction_format: str = "{instruction}: {text}"
    """How an instruction is joined to a text; must end in `{text}`."""


TemplateSection = Annotated[
    PresetTemplate | ChatTemplate | CustomTemplate | SpecialTokensTemplate, Field(discriminator="kind")
]


class Columns(Section):
    """Which columns of a table hold the sides of a pair."""

    query: str = "query"
    """Column of the query text."""
    positive: str = "positive"
    """Column of the document text."""
    negatives: tuple[str, ...] = ()
    """Columns of hard negatives; a column may hold one text or a list of texts."""


class E5Source(Section):
    """A folder (one file per source) or one file in the layout of the E5 public mix."""

    kind: Literal["e5"]
    path: UserPath
    """Folder of `NAME.jsonl`, `NAME.jsonl.gz` or `NAME.jsonl.zst`, or one such file."""
    only: tuple[str, ...] | None = None
    """Names of the sources to take; all files of the folder when absent."""
    instructions: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Instructions of sources that the shipped preset does not know, or other ones; two alternate by row."""
    symmetric: tuple[str, ...] = ()
    """Further symmetric sources: both sides are the same kind of text (allnli and quora are by the preset)."""
    symmetric_documents: Literal["instruction", "bare"] = "instruction"
    """Give documents of symmetric sources the query's instruction, as echo embeddings and the STS evaluation do, or
    leave them bare, as the released code of arXiv:2509.03020 does."""
    max_rows: PositiveInt | None = None
    """Rows read of each source, the first ones; all when absent."""
    weights: dict[str, Weight] = Field(default_factory=dict)
    """Weights of sources in the mixture; 1 when absent."""
    languages: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Languages (ISO 639-1) of sources that the shipped preset does not know, or other ones."""

    @model_validator(mode="after")
    def _symmetric_has_an_effect(self) -> "E5Source":
        if self.symmetric_documents == "bare" and self.symmetric:
            raise ValueError(
                f"symmetric_documents is bare, so symmetric ({', '.join(self.symmetric)}) has no effect; remove one"
            )
        return self


class _NamedSource(Section):
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
    """Use the first of several positives of a row and count the others as `unused_positives`, or make each a pair of
    its own. Two pairs of one query in one batch then mask each other's positive (`objective.mask_known_matches`)."""
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
        if self.format != "columns" and self.columns != Columns():
            raise ValueError(f"format '{self.format}' brings its own columns; remove columns or use format: columns")
        return self


class FilesSource(_NamedSource):
    """JSON-lines, CSV, TSV or Parquet files, read as one source."""

    kind: Literal["files"]
    path: UserPath
    """A `.jsonl`, `.csv`, `.tsv` (each also with `.gz` or `.zst`) or `.parquet` file, or a folder of them."""


class HubSource(_NamedSource):
    """A dataset of the Hugging Face hub, or a local copy of one, through `datasets`."""

    kind: Literal["hub"]
    dataset: DatasetPathText
    """Hub name or local folder."""
    config: str | None = None
    """Configuration of the dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; only a commit stays the same while parts are packed and run again."""
    split: str
    """Split of the dataset."""


SourceSection = Annotated[E5Source | FilesSource | HubSource, Field(discriminator="kind")]


class TextLimits(Section):
    max_tokens: PositiveInt
    """Longest segment, template and instruction included; longer texts are cut and keep the anchor token."""
    hard_negatives: NonNegativeInt
    """Hard negatives kept per pair; rows with fewer are refused (see `on_bad_row`)."""


class BatchShape(Section):
    pairs: PositiveInt
    """Pairs of one optimiser step, over all ranks."""
    pack_tokens: PositiveInt
    """Token budget of one pack: one forward pass of one rank."""
    pack_multiple: PositiveInt
    """Packs per batch are a multiple of it; training works on every number of ranks that divides it."""


class ProportionalMixture(Section):
    """Every pair once per epoch."""

    kind: Literal["proportional"]


class CappedMixture(Section):
    """Every pair once per epoch, but of no source more than so many; the next epoch goes on where this one stopped."""

    kind: Literal["capped"]
    max_pairs: PositiveInt
    """Pairs of one source in an epoch, at most; at least `batch.pairs`."""


class TemperatureMixture(Section):
    """As many batches as the sources have, shared out as `pairs ** exponent`: small sources repeat, large ones take
    several epochs (Conneau et al. 2020, arXiv:1911.02116, section 3.1, whose alpha is `exponent`)."""

    kind: Literal["temperature"]
    exponent: Fraction
    """1 is proportional, 0 gives every source as many batches."""


Mixture = Annotated[ProportionalMixture | CappedMixture | TemperatureMixture, Field(discriminator="kind")]


class PackRecipe(Section):
    """What `python -m data_prep pack` does."""

    output_dir: UserPath
    """Folder of the shards; must be new or an unfinished run of the same recipe."""
    seed: Seed
    """Seed of the shuffles."""
    tokenizer: ModelPathText
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
    prompts: dict[str, str] = Field(default_factory=dict)
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
        if isinstance(self.template, SpecialTokensTemplate) and self.template.tokens >= self.text.max_tokens:
            raise ValueError(
                f"template.tokens ({self.template.tokens}) leaves no room for a text in text.max_tokens "
                f"({self.text.max_tokens}); raise max_tokens"
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
