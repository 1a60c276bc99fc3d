"""Every knob of the objectives, each with its source."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from anchor.config.fields import Fraction, PositiveInt, Section

DecodePrefix = Literal["none", "bos", "template"]
"""What stands before the prefix vectors of a decode row; ids in `anchor/data/decode_prefix.py`."""

Similarity = Literal["query_to_document", "query_to_query", "document_to_query", "document_to_document"]
"""Of which side of a pair to which side of all pairs."""


class ContrastiveTerm(Section):
    """InfoNCE over the batch's documents and hard negatives; equations in `anchor/objectives/info_nce.py`."""

    temperature: Annotated[float, Field(gt=0.0)]
    """Divides cosine similarities (dimensionless). The paper: 0.02."""
    false_negative_margin: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    """A text whose cosine exceeds the pair's own by more than this (cosine units) is no negative of it; off when
    absent. Qwen3-Embedding: 0.1; below zero it is NV-Retriever's TopK-MarginPos."""
    mask_known_matches: bool = True
    """Leave texts that the batch itself knows to match out of a pair's negatives: copies of its query or positive, and
    the partners of those copies. `false` counts every other text as a negative, as most trainers do (the paper's too);
    for comparisons."""
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
    """A contrastive term beside an objective's own, over the same embeddings."""

    weight: Annotated[float, Field(gt=0.0)]
    """Multiplies the contrastive loss (dimensionless); beside it reconstruction weighs 1, self-supervision what its own
    weights say."""


class ReconstructionObjective(Section):
    """Stage I: the anchor state of one side reconstructs the other side."""

    kind: Literal["reconstruction"]
    alpha: Fraction
    """Weight of query-to-document; document-to-query weighs 1 - alpha. The paper: 0.2. With 0 or 1 the other direction
    is not computed."""
    target: Literal["body", "instruction_and_body"] = "body"
    """Targets: the bare text, or the text with the instruction that it carries; the anchor token ends both."""
    decode_prefix: DecodePrefix = "none"
    """Tokens before the anchor vector in every decode row: none (the paper), the BOS token, or the template's prefix.
    Behind a prefix the anchor vector is not the attention sink."""
    input_dropout: Fraction = 0.0
    """Share of the decode inputs replaced by the zero vector while training (0 to 1). With 0 (the paper) the decoder
    sees every word before a target; with 1 it predicts from the anchor vector and the position alone."""
    anchor_vector: Literal["raw", "centred"] = "raw"
    """What stands for a text in the decode pass: its anchor state as it is (the paper), or minus the mean state of its
    frame (template and instruction) and scaled to RMS 1; `anchor/models/centres.py`. The embedding is the raw one."""
    contrastive: JointContrastive | None = None
    """A contrastive term added to the loss, over the same encode pass; hard negatives are then encoded too."""


class ContrastiveObjective(ContrastiveTerm):
    """Stage II: InfoNCE over the batch's documents and hard negatives."""

    kind: Literal["contrastive"]


class LanguageModelObjective(Section):
    """Next-token training on the bare texts of the pairs: the control that tells reconstruction from more text."""

    kind: Literal["language_model"]


class SelfSupervisedObjective(Section):
    """LLM2Vec-Gen (arXiv:2603.10913): trained special tokens of a frozen LLM represent its own answer to a query."""

    kind: Literal["self_supervised"]
    alignment_weight: Annotated[float, Field(ge=0.0)]
    """Weight of the mean squared distance between a query's embedding and the teacher's of its answer (squared
    coordinates of the teacher). The paper: 1."""
    reconstruction_weight: Annotated[float, Field(ge=0.0)]
    """Weight of the answer's negative log-likelihood (nats per token) behind the query's soft prompts. The paper: 1.
    With 0 there is no decode pass."""
    decode_prefix: DecodePrefix = "none"
    """Tokens before the soft prompts in every decode row: none (the paper), the BOS token, or the template's prefix."""
    contrastive: JointContrastive | None = None
    """A contrastive term added to the loss, over the embeddings of queries, positives and hard negatives, all of which
    are then encoded."""

    @model_validator(mode="after")
    def _something_is_minimised(self) -> "SelfSupervisedObjective":
        if not self.alignment_weight and not self.reconstruction_weight:
            raise ValueError("alignment_weight and reconstruction_weight are both 0; the paper's are 1 and 1")
        return self
