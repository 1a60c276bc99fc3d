"""``python -m eval decode``: decode embeddings into text with the language model that made them.

The decoder was trained on one prefix vector, the raw anchor state (the un-normalised final hidden state), after the
tokens of ``objective.decode_prefix`` (``decode_prefix_token_ids`` in ``anchor.json``). A normalised embedding lacks its
length, so ``eval embed`` also stores the lengths (``norms``), and stored vectors are decoded from ``embedding x norm``.
A Matryoshka cut loses components and cannot be decoded.

A document's embedding decodes to a query and a query's embedding to a document, as in training. A self_supervised
folder decodes a query's P soft prompts to its answer. Its embedding pools these soft prompts and they cannot be
recovered, so stored vectors of such a folder are refused.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from rouge_score.rouge_scorer import RougeScorer

from anchor.encoding.encoder import Encoder, PackedEncoder, TextEncoder
from anchor.encoding.opening import SELF_SUPERVISED
from anchor.errors import ConfigError, DataError, ModelError
from anchor.models.adapters import without_adapter
from anchor.models.head import output_layer
from anchor.models.reconstructor import generate_from_prefixes
from eval.embedding.texts import read_rows
from eval.embedding.vectors import read_folder

log = logging.getLogger(__name__)

DIRECTIONS = ("document_to_query", "query_to_document")
BATCH = 32
BLOCK_TEXTS = 1024
"""Texts to hold prefix vectors for at a time."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded embedding.

    Attributes:
        source: the embedded text, or the id of a stored vector.
        decoded: the decoded text.
        direction: one of :data:`DIRECTIONS`, or None if the text is not from a pair.
        reference: the other side of the pair, if known.
        token_f1: F1 of the words of ``decoded`` and ``reference``, ignoring order, 0 to 1.
        rouge_l: F1 of their longest common subsequence of words, 0 to 1.
    """

    source: str
    decoded: str
    direction: str | None = None
    reference: str | None = None
    token_f1: float | None = None
    rouge_l: float | None = None


class Decoder:
    """Decoder from prefix vectors to texts.

    Args:
        encoder: encoder of a model folder exported by this project.
        max_new_tokens: most tokens of a decoded text.
        num_beams: beam width; 1 is greedy.

    Raises:
        ModelError: the folder's embeddings cannot be decoded.
    """

    def __init__(self, encoder: TextEncoder, *, max_new_tokens: int = 64, num_beams: int = 1) -> None:
        if not isinstance(encoder, PackedEncoder):
            raise ModelError(f"{encoder.folder}: no anchor.json; only folders exported by anchor.train can be decoded")
        output_layer(encoder.causal_lm)
        objective = encoder.about.get("objective")
        if not getattr(encoder.causal_lm.config, "is_causal", True):
            raise ModelError(f"{encoder.folder}: attends in both directions, so its language model cannot generate")
        if objective == "contrastive":
            log.warning("%s: trained last by contrastive, not reconstruction; the text may say little", encoder.folder)
        self.encoder = encoder
        self.directions = ("query_to_document",) if objective == SELF_SUPERVISED else DIRECTIONS
        self._length = max_new_tokens
        self._beams = num_beams
        self._soft_prompts = objective == SELF_SUPERVISED
        named = ("end_token_id", "anchor_token_id")
        ends = [encoder.about[name] for name in named if encoder.about.get(name) is not None]
        self._end: int = ends[0] if ends else encoder.backend.encode("").ids[-1]
        self._stops = {self._end, *encoder.about.get("stop_token_ids", ())}

    def prefixes(self, prefixes: Float[torch.Tensor, "B P H"]) -> list[str]:
        """Decode prefix vectors into texts."""
        out: list[str] = []
        for batch in prefixes.split(BATCH):
            with without_adapter(self.encoder.causal_lm):  # soft prompts are trained for the base model
                ids = generate_from_prefixes(
                    self.encoder.causal_lm,
                    batch.to(self.encoder.device),
                    self._end,
                    decode_prefix_ids=self.encoder.about.get("decode_prefix_token_ids", ()),
                    max_new_tokens=self._length,
                    num_beams=self._beams,
                )
            # Only converted folders have more than one stop token. Greedy text before a stop ignores what follows.
            said = [list(takewhile(lambda token: token not in self._stops, row)) for row in ids]
            out += self.encoder.backend.decode_batch(said, skip_special_tokens=True)
        return out

    def texts(self, texts: Sequence[str], prompt: str = "") -> list[Decoded]:
        """Embed texts and decode the embeddings."""
        said: list[str] = []
        for start in range(0, len(texts), BLOCK_TEXTS):
            said += self.prefixes(self.encoder.prefixes(texts[start : start + BLOCK_TEXTS], prompt))
        return [Decoded(text, one) for text, one in zip(texts, said, strict=True)]

    def stored(self, folder: Path, limit: int | None = None) -> list[Decoded]:
        """Decode the vectors of a folder written by ``eval embed``.

        Raises:
            ModelError: the model decodes soft prompts, which are not stored.
            DataError: the vectors belong to another model, are cut, or are normalised without norms.
        """
        if self._soft_prompts:
            raise ModelError(
                f"{self.encoder.folder}: of objective self_supervised, which decodes a text's soft prompts, not its "
                "stored vector; give the texts: --input FILE"
            )
        stored = read_folder(folder)
        if stored.manifest["revision"] != self.encoder.revision():
            raise DataError(
                f"{folder}: made by {stored.manifest['model']}, not by the weights of {self.encoder.folder}"
            )
        if stored.embeddings.shape[1] != self.encoder.dimension:
            raise DataError(
                f"{folder}: vectors of {stored.embeddings.shape[1]} components, decoding needs all "
                f"{self.encoder.dimension}; embed without --dimension"
            )
        vectors = np.asarray(stored.embeddings[:limit], dtype=np.float32)
        if stored.manifest["normalize"]:
            if stored.norms is None:
                raise DataError(f"{folder}: normalised and without norms; embed again with an exported folder")
            vectors = vectors * stored.norms[:limit, None]
        states = torch.from_numpy(np.array(vectors))
        if isinstance(self.encoder, Encoder):
            # Texts are not stored, but their prompt is, and the prompt alone determines the mean.
            ids = self.encoder.backend.encode(f"{stored.manifest.get('prompt', '')}a").ids
            states = self.encoder.prefix_vectors(states, [ids] * len(states))
        said = self.prefixes(states[:, None])
        return [Decoded(one, text) for one, text in zip(stored.ids, said, strict=False)]

    def pairs(self, pairs: Sequence[tuple[str, str]], direction: str) -> list[Decoded]:
        """Decode one side of ``(query, document)`` pairs and compare the result with the other side.

        Raises:
            ConfigError: the model was not trained in this direction.
        """
        if direction not in self.directions:
            raise ConfigError(
                f"--direction {direction}: {self.encoder.folder} was trained by self_supervised, so a query decodes to "
                "its answer only; use query_to_document"
            )
        to_query = direction == "document_to_query"
        sources, references = ([pair[side] for pair in pairs] for side in ((1, 0) if to_query else (0, 1)))
        prompt = self.encoder.prompts.get("document" if to_query else "query", "")
        return [
            Decoded(one.source, one.decoded, direction, reference, *overlap(reference, one.decoded))
            for one, reference in zip(self.texts(sources, prompt), references, strict=True)
        ]


class _Words:
    """Tokenizer for lower-case words in any script; the library's own handles only a-z and digits."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


_ROUGE = RougeScorer(["rouge1", "rougeL"], tokenizer=_Words())


def overlap(reference: str, decoded: str) -> tuple[float, float]:
    """Return token F1 (ROUGE-1 F) and ROUGE-L F of two texts, 0 to 1."""
    scores = _ROUGE.score(reference, decoded)
    return scores["rouge1"].fmeasure, scores["rougeL"].fmeasure


def read_pairs(path: Path, limit: int | None = None) -> list[tuple[str, str]]:
    """Return the ``(query, positive)`` pairs of a JSON-lines file.

    Raises:
        ConfigError: no such file.
        DataError: malformed line, missing field, or no pair at all.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected JSON lines with 'query' and 'positive'")
    rows = read_rows(path, {"query": str, "positive": str}, limit)
    if not rows:
        raise DataError(f"{path}: holds no pair")
    return [(row["query"], row["positive"]) for row in rows]


def means(decoded: Sequence[Decoded]) -> dict[str, tuple[float, float, int]]:
    """Return mean token F1, mean ROUGE-L and number of pairs, by direction."""
    out: dict[str, tuple[float, float, int]] = {}
    for direction in DIRECTIONS:
        rows = [one for one in decoded if one.direction == direction and one.token_f1 is not None]
        if rows:
            f1, rouge = (float(np.mean([getattr(one, name) for one in rows])) for name in ("token_f1", "rouge_l"))
            out[direction] = (f1, rouge, len(rows))
    return out


def write_decoded(path: Path, decoded: Sequence[Decoded], *, overwrite: bool) -> None:
    """Write one JSON line per decoded embedding to a temporary file and rename it; raises as :func:`check_output`."""
    check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(_lines(decoded)), encoding="utf-8")
    os.replace(beside, path)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse an output file that must not be written; also call this before the work starts.

    Raises:
        ConfigError: the file exists without ``overwrite``, or the path is a folder.
    """
    if path.exists() and not (overwrite and path.is_file()):
        what = "exists; choose another --output or add --overwrite" if path.is_file() else "a folder; name a file"
        raise ConfigError(f"{path}: {what}")


def _lines(decoded: Sequence[Decoded]) -> Iterator[str]:
    for one in decoded:
        fields = {key: value for key, value in asdict(one).items() if value is not None}
        yield json.dumps(fields, ensure_ascii=False) + "\n"
