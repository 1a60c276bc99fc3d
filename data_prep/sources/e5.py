"""The public portion of the E5 mix: instructions and traits of its sources (arXiv:2401.00368, table 5)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traits:
    """Traits of a source.

    Attributes:
        instructions: one, or several that alternate by row number.
        symmetric: True if both sides are the same kind of text. The recipe's ``symmetric_documents`` decides whether
            documents then carry the instruction too.
        languages: ISO 639-1 codes.
    """

    instructions: tuple[str, ...]
    symmetric: bool = False
    languages: tuple[str, ...] = ("en",)


_WIKIPEDIA = ("Given a question, retrieve Wikipedia passages that answer the question",)
_CHINESE = Traits(("Given a Chinese search query, retrieve web passages that answer the question",), languages=("zh",))
_MIRACL = ("ar", "bn", "en", "es", "fa", "fi", "fr", "hi", "id", "ja", "ko", "ru", "sw", "te", "th", "zh")
_MRTYDI = ("ar", "bn", "en", "fi", "id", "ja", "ko", "ru", "sw", "te", "th")
_NLI = (
    "Given a premise, retrieve a hypothesis that is entailed by the premise",
    "Retrieve semantically similar text",
)
_QUORA = (
    "Given a question, retrieve questions that are semantically equivalent to the given question",
    "Find questions that have the same meaning as the input question",
)

E5_TRAITS: dict[str, Traits] = {
    "allnli": Traits(_NLI, symmetric=True),
    "dureader": _CHINESE,
    "eli5_question_answer": Traits(
        ("Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",)
    ),
    "fever": Traits(("Given a claim, retrieve documents that support or refute the claim",)),
    "hotpot_qa": Traits(("Given a multi-hop question, retrieve documents that can help answer the question",)),
    "miracl": Traits(_WIKIPEDIA, languages=_MIRACL),
    "mrtydi": Traits(_WIKIPEDIA, languages=_MRTYDI),
    "msmarco_passage": Traits(("Given a web search query, retrieve relevant passages that answer the query",)),
    "msmarco_document": Traits(("Given a web search query, retrieve relevant documents that answer the query",)),
    "nq": Traits(_WIKIPEDIA),
    "quora_duplicates": Traits(_QUORA, symmetric=True),
    "squad": Traits(("Retrieve Wikipedia passages that answer the question",)),
    "t2ranking": _CHINESE,
    "trivia_qa": Traits(("Retrieve Wikipedia passages that answer the question",)),
    # Some downloads split each of the two symmetric sources in two, with one instruction each.
    "allnli_split1": Traits(_NLI[:1], symmetric=True),
    "allnli_split2": Traits(_NLI[1:], symmetric=True),
    "quora_duplicates_split1": Traits(_QUORA[:1], symmetric=True),
    "quora_duplicates_split2": Traits(_QUORA[1:], symmetric=True),
}
