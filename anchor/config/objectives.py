"""Settings of the objectives, each with its source."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from anchor.config.fields import Fraction, PositiveInt, Section

DecodePrefix = Literal["none", "bos", "template"]
"""Tokens before the prefix vectors of a decode row; `anchor/data/decode_prefix.py` finds their ids."""

Similarity = Literal["query_to_document", "query_to_query", "document_to_query", "document_to_document"]
"""One side of a pair, compared with one side of all pairs."""


class _ObjectiveSection(Section):
    """Section of an objective, with the properties that a dry run needs before the shards exist."""

    @property
    def contrastive_term(self) -> "ContrastiveTermSection | None":
        """Return the contrastive loss, or the term added to another loss; None without one."""
        return getattr(self, "contrastive", None)

    @property
    def num_decoded_sides(self) -> int:
        """Return the number of sides of a pair, 0 to 2, that a decode pass predicts."""
        return 0

    @property
    def encodes_documents(self) -> bool:
        """Return whether documents are encoded, not only queries."""
        return True

    @property
    def predicts_encoded(self) -> bool:
        """Return whether the head predicts every encoded token."""
        return False


class ContrastiveTermSection(Section):
    """InfoNCE over the batch's documents and hard negatives; equations in `anchor/objectives/info_nce.py`."""

    temperature: Annotated[float, Field(gt=0.0)]
    """Divides cosine similarities (dimensionless). The paper uses 0.02."""
    false_negative_margin: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    """Drop a negative whose cosine exceeds the pair's own by more than this (cosine units); off when absent.
    Qwen3-Embedding uses 0.1. A value below zero is NV-Retriever's TopK-MarginPos."""
    mask_known_matches: bool = True
    """Exclude known matches from a pair's negatives: copies of its query or positive in the batch, and the partners of
    those copies. `false` counts every other text as a negative, as most trainers and the paper do. Use it for
    comparisons."""
    negatives: tuple[Similarity, ...] = ("query_to_document",)
    """Similarities in a pair's denominator: its query and its document against all other documents and queries.
    GTE uses all four."""
    softmax: Literal["joint", "per_side"] = "joint"
    """`joint`: one softmax per pair over all of `negatives`. `per_side`: the mean of two losses, one with the query's
    softmax and one with the document's."""
    matryoshka_dimensions: tuple[PositiveInt, ...] = ()
    """Leading dimensions that must also work as embeddings, ascending and below the hidden size. The loss is the mean
    over these and the full embedding. Off when empty."""

    @model_validator(mode="after")
    def _terms_fit(self) -> "ContrastiveTermSection":
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


class JointContrastiveSection(ContrastiveTermSection):
    """Contrastive term added to another objective, over the same embeddings."""

    weight: Annotated[float, Field(gt=0.0)]
    """Multiplies the contrastive loss (dimensionless). Reconstruction has weight 1; self-supervision has its own
    weights."""


class ReconstructionSection(_ObjectiveSection):
    """Stage I: the anchor state of one side reconstructs the other side."""

    kind: Literal["reconstruction"]
    alpha: Fraction
    """Weight of query-to-document; document-to-query has weight 1 - alpha. The paper uses 0.2. A direction of weight 0
    is not computed."""
    target: Literal["body", "instruction_and_body"] = "body"
    """Text to reconstruct: the bare text, or the text with its instruction. The anchor token ends both."""
    decode_prefix: DecodePrefix = "none"
    """Tokens before the anchor vector in every decode row: none (the paper), the BOS token, or the template's prefix.
    With a prefix, the anchor vector is not the attention sink."""
    input_dropout: Fraction = 0.0
    """Share of the decode inputs that training replaces with the zero vector (0 to 1). At 0 (the paper) the decoder
    sees every word before a target. At 1 it predicts from the anchor vector and the position alone."""
    anchor_vector: Literal["raw", "centred"] = "raw"
    """Vector that represents a text in the decode pass. `raw` (the paper) is its anchor state. `centred` subtracts the
    mean state of its frame (template and instruction) and scales to RMS 1; see `anchor/models/centres.py`. The
    embedding is always the raw state."""
    contrastive: JointContrastiveSection | None = None
    """Contrastive term added to the loss, over the same encode pass. Hard negatives are then encoded too."""

    @property
    def num_decoded_sides(self) -> int:
        return (self.alpha < 1) + (self.alpha > 0)


class ContrastiveSection(ContrastiveTermSection, _ObjectiveSection):
    """Stage II: InfoNCE over the batch's documents and hard negatives."""

    kind: Literal["contrastive"]

    @property
    def contrastive_term(self) -> ContrastiveTermSection:
        return self


class LanguageModelSection(_ObjectiveSection):
    """Next-token training on the bare texts of the pairs. This control shows how much of a gain is due to more text."""

    kind: Literal["language_model"]

    @property
    def predicts_encoded(self) -> bool:
        return True


class SelfSupervisedSection(_ObjectiveSection):
    """LLM2Vec-Gen (arXiv:2603.10913): trained special tokens of a frozen LLM represent its answer to a query."""

    kind: Literal["self_supervised"]
    alignment_weight: Annotated[float, Field(ge=0.0)]
    """Weight of the mean squared distance between a query's embedding and the teacher's embedding of its answer
    (squared coordinates of the teacher). The paper uses 1."""
    reconstruction_weight: Annotated[float, Field(ge=0.0)]
    """Weight of the answer's negative log-likelihood (nats per token) after the query's soft prompts. The paper uses 1.
    At 0 there is no decode pass."""
    decode_prefix: DecodePrefix = "none"
    """Tokens before the soft prompts in every decode row: none (the paper), the BOS token, or the template's prefix."""
    contrastive: JointContrastiveSection | None = None
    """Contrastive term added to the loss, over the embeddings of queries, positives and hard negatives. All of them
    are then encoded."""

    @property
    def num_decoded_sides(self) -> int:
        return int(self.reconstruction_weight > 0)

    @property
    def encodes_documents(self) -> bool:
        return self.contrastive is not None

    @model_validator(mode="after")
    def _something_is_minimised(self) -> "SelfSupervisedSection":
        if not self.alignment_weight and not self.reconstruction_weight:
            raise ValueError("alignment_weight and reconstruction_weight are both 0; the paper's are 1 and 1")
        return self


ObjectiveSection = Annotated[
    ReconstructionSection | ContrastiveSection | LanguageModelSection | SelfSupervisedSection,
    Field(discriminator="kind"),
]
