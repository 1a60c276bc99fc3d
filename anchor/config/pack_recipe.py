"""Recipe for packing data: :class:`PackRecipe`."""

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
    """Built-in template of a model family."""

    kind: Literal["preset"]
    name: str
    """`chatml` (Qwen, SmolLM), `llama3`, `mistral` or `plain` (beginning of text, text, end of text)."""
    instruction_format: str = "{instruction}: {text}"
    """Format that joins an instruction and a text; must end in `{text}`."""


class ChatTemplate(Section):
    """The model's own chat template, rendered once around a user turn."""

    kind: Literal["chat"]
    instruction_format: str = "{instruction}: {text}"
    """Format that joins an instruction and a text; must end in `{text}`."""


class CustomTemplate(Section):
    """Prefix and suffix written out; the suffix's last token is the anchor token."""

    kind: Literal["custom"]
    prefix: str
    """Text before every segment; special tokens by name."""
    suffix: str
    """Text after every segment; its last token is the anchor token."""
    instruction_format: str = "{instruction}: {text}"
    """Format that joins an instruction and a text; must end in `{text}`."""


class SpecialTokensTemplate(Section):
    """Trained special tokens after every text; they are added to the tokenizer (LLM2Vec-Gen, arXiv:2603.10913)."""

    kind: Literal["special_tokens"]
    tokens: PositiveInt
    """Special tokens at the end of every segment (P); their states represent the text. The paper uses 10."""
    prefix: str = ""
    """Text before every segment; special tokens by name."""
    suffix: str = ""
    """Text between every text and its special tokens; empty in the paper."""
    end: str | None = None
    """Name of the token that ends a decoded answer; the tokenizer's end-of-text token when absent."""
    instruction_format: str = "{instruction}: {text}"
    """Format that joins an instruction and a text; must end in `{text}`."""


TemplateSection = Annotated[
    PresetTemplate | ChatTemplate | CustomTemplate | SpecialTokensTemplate, Field(discriminator="kind")
]


class Columns(Section):
    """Columns of a table that hold the sides of a pair."""

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
    """Names of the sources to use; all files of the folder when absent."""
    instructions: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Instructions by source, for sources that the built-in preset lacks or to override it; two alternate by row."""
    symmetric: tuple[str, ...] = ()
    """More symmetric sources: both sides are the same kind of text. The preset already marks allnli and quora."""
    symmetric_documents: Literal["instruction", "bare"] = "instruction"
    """`instruction` gives documents of symmetric sources the query's instruction, as echo embeddings and the STS
    evaluation do. `bare` leaves it out, as the released code of arXiv:2509.03020 does."""
    max_rows: PositiveInt | None = None
    """Read only this many rows from the start of each source; all when absent."""
    weights: dict[str, Weight] = Field(default_factory=dict)
    """Mixture weights by source; 1 when absent."""
    languages: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Languages (ISO 639-1) by source, for sources that the built-in preset lacks or to override it."""

    @model_validator(mode="after")
    def _symmetric_has_an_effect(self) -> "E5Source":
        if self.symmetric_documents == "bare" and self.symmetric:
            raise ValueError(
                f"symmetric_documents is bare, so symmetric ({', '.join(self.symmetric)}) has no effect; remove one"
            )
        return self


class _NamedSource(Section):
    """Common fields of sources that the recipe names."""

    name: FileStem
    """Name of the source in the index and in the metrics."""
    format: Literal["columns", "sentence_transformers", "flag_embedding", "tevatron"] = "columns"
    """Layout of a row: named `columns`; `sentence_transformers` (anchor, positive, negative, negative_1 ...);
    `flag_embedding` (query, pos[], neg[]); `tevatron` (query, positive_passages[], negative_passages[], each with
    title and text)."""
    columns: Columns = Columns()
    """Column names of the format `columns`; the other formats define their own."""
    positives: Literal["first", "each"] = "first"
    """`first` uses the first positive of a row and counts the others as `unused_positives`. `each` makes one pair per
    positive. Pairs with the same query in one batch then mask each other's positive (`objective.mask_known_matches`).
    """
    instructions: tuple[str, ...]
    """Instructions of the queries. Two alternate by row; an empty list means no instruction."""
    symmetric: bool = False
    """Add the instruction to documents too."""
    max_rows: PositiveInt | None = None
    """Read only this many rows from the start; all when absent."""
    weight: Weight = 1.0
    """Multiplies the source's share of the mixture: 2 means two passes per epoch, 0.5 half a pass."""
    languages: tuple[str, ...] = ()
    """Languages (ISO 639-1) of the texts. The index stores them and `inspect` shows them."""

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
    """A Hugging Face hub dataset, or a local copy, read with `datasets`."""

    kind: Literal["hub"]
    dataset: DatasetPathText
    """Hub name or local folder."""
    config: str | None = None
    """Configuration of the dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset. Only a commit is sure to stay the same between packing runs."""
    split: str
    """Split of the dataset."""


SourceSection = Annotated[E5Source | FilesSource | HubSource, Field(discriminator="kind")]


class TextLimits(Section):
    max_tokens: PositiveInt
    """Longest segment, including template and instruction. Longer texts are cut and keep the anchor token."""
    hard_negatives: NonNegativeInt
    """Hard negatives kept per pair; rows with fewer are refused (see `on_bad_row`)."""


class BatchShape(Section):
    pairs: PositiveInt
    """Pairs of one optimiser step, over all ranks."""
    pack_tokens: PositiveInt
    """Token budget of one pack: one forward pass of one rank."""
    pack_multiple: PositiveInt
    """The number of packs per batch is a multiple of this. Training can use any number of ranks that divides it."""


class ProportionalMixture(Section):
    """Every pair once per epoch."""

    kind: Literal["proportional"]


class CappedMixture(Section):
    """Every pair once per epoch, up to a cap per source. The next epoch continues where this one stopped."""

    kind: Literal["capped"]
    max_pairs: PositiveInt
    """Most pairs of one source in an epoch. Must be at least `batch.pairs`."""


class TemperatureMixture(Section):
    """Batches shared among the sources in proportion to `pairs ** exponent`, with their total number unchanged.

    Small sources repeat, and large ones take several epochs. Conneau et al. 2020 (arXiv:1911.02116, section 3.1) call
    the exponent alpha.
    """

    kind: Literal["temperature"]
    exponent: Fraction
    """1 is proportional; 0 gives every source the same number of batches."""


Mixture = Annotated[ProportionalMixture | CappedMixture | TemperatureMixture, Field(discriminator="kind")]


class PackRecipe(Section):
    """Recipe of `python -m data_prep pack`."""

    output_dir: UserPath
    """Folder for the shards. It must be new or hold an unfinished run of the same recipe."""
    seed: Seed
    """Seed of the shuffles."""
    tokenizer: ModelPathText
    """Model folder, hub name or `.gguf` file that has the tokenizer."""
    template: TemplateSection
    """Template around every text."""
    sources: tuple[SourceSection, ...] = Field(min_length=1)
    """Sources of the pairs."""
    text: TextLimits
    """Limits per text."""
    batch: BatchShape
    """Size of a batch and of its packs."""
    mixture: Mixture = ProportionalMixture(kind="proportional")
    """Rule for the number of batches of each source in an epoch."""
    epochs: PositiveInt = 1
    """Epochs to write, each with the pairs batched anew. Training uses them in turn."""
    prompts: dict[str, str] = Field(default_factory=dict)
    """Instructions of the exported model's prompts, by name: `query`, an mteb task, or a task type such as `STS`.
    Without `query`, that prompt is the largest source's instruction."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """`fail` stops at the first unusable row. `skip` moves it to `quarantine-SOURCE.jsonl` and counts it. A row is
    unusable if it is malformed, is not UTF-8, or lacks a field or negatives. A row is also unusable if one of its texts
    is empty, has only control characters, or has a NUL character or half a surrogate pair. Two kinds of pairs are not
    errors; both settings drop and count them: pairs whose query equals the positive, and repeats of an earlier pair
    (query and positive) of the source."""
    max_skipped_fraction: Fraction = 0.05
    """With `on_bad_row: skip`, the largest share of a source's rows that may be skipped. More is an error."""

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
