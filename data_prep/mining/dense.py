"""Cosine scores of a source's documents under a sentence-transformers model: exact, in blocks, on CPU or GPU.

1. Encode documents and queries with the model's own prompts (`encode_document`, `encode_query`) and normalise them. The
   documents' vectors go to a file that is read block by block.
2. Score a block of queries against all blocks of documents and mask the documents that a margin leaves out. Take the
   best of the others from the device: as many as the ranks requested plus the documents excluded. Also take all that
   tie with the last of them, so that ties do not depend on the device.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anchor.errors import UNSAFE_PICKLE, ConfigError, first_line, weights_line
from anchor.progress import tracked
from data_prep.mining.ranking import Query, Window, ranked

_ENCODED_TEXTS = 8192
_BLOCK_DOCUMENTS = 1 << 16
_BLOCK_SCORES = 1 << 26
_MAX_BLOCK_QUERIES = 1024


def load_model(folder: Path, device: str, option: str = "--model") -> Any:
    """Load a sentence-transformers model from a local folder.

    Raises:
        ConfigError: if the folder does not exist, holds no loadable model, or the device cannot be used.
    """
    if not (folder / "modules.json").is_file():
        raise ConfigError(f"{option} {folder}: not a sentence-transformers folder, it has no modules.json")
    # Import torch only here: other data preparation runs without it.
    import torch
    from sentence_transformers import SentenceTransformer

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: cannot be used: {first_line(error)}") from error
    try:
        return SentenceTransformer(str(folder), device=device, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, *UNSAFE_PICKLE) as error:
        raise ConfigError(f"{option} {folder}: cannot be loaded: {weights_line(error)}") from error


class Dense:
    """Vectors of some documents.

    Args:
        model: model from :func:`load_model`.
        documents: distinct texts.
        folder: folder for the file of vectors, which is removed at the end.
        name: name of the source, for the file and for progress.
    """

    def __init__(self, model: Any, documents: list[str], folder: Path, name: str) -> None:
        self._model, self._name = model, name
        self._file = folder / f"{name}.vectors"
        self._shape = (len(documents), model.get_embedding_dimension())
        starts = range(0, len(documents), _ENCODED_TEXTS)
        with self._file.open("wb") as out:
            for start in tracked(starts, f"encoding {name}", len(starts), unit=f" x {_ENCODED_TEXTS} documents"):
                vectors = self._encode(model.encode_document, documents[start : start + _ENCODED_TEXTS])
                out.write(vectors.tobytes())

    def _encode(self, function: Any, texts: list[str]) -> np.ndarray:
        texts = [text.encode(errors="replace").decode() for text in texts]  # replace lone surrogates
        found = function(texts, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)

    def rank(self, queries: Sequence[Query], window: Window) -> Iterator[np.ndarray]:
        """Rank the documents as :class:`data_prep.mining.ranking.Scorer` describes."""
        size = max(1, min(_MAX_BLOCK_QUERIES, _BLOCK_SCORES // max(1, self._shape[0])))
        for start in range(0, len(queries), size):
            yield from self._rank_block(queries[start : start + size], window)
        self._file.unlink()

    def _rank_block(self, queries: Sequence[Query], window: Window) -> Iterator[np.ndarray]:
        import torch

        scores = self._scores(self._encode(self._model.encode_query, [query.text for query in queries]))
        positives = [float(scores[i, query.positives].min()) for i, query in enumerate(queries)]
        highest = torch.tensor([window.highest(one) for one in positives], device=scores.device)
        scores.masked_fill_(scores > highest[:, None], -torch.inf)
        number = min(window.last_rank + max(len(query.excluded) for query in queries), self._shape[0])
        best = torch.topk(scores, number, dim=1)
        last = best.values[:, -1]
        tied = ((scores >= last[:, None]).sum(dim=1) > number) & (last > -torch.inf)
        values, found, all_equal = best.values.cpu().numpy(), best.indices.cpu().numpy(), tied.cpu().tolist()
        for i, query in enumerate(queries):
            documents, mine = found[i], values[i]
            if all_equal[i]:
                documents = torch.nonzero(scores[i] >= last[i])[:, 0].cpu().numpy()
                mine = scores[i].cpu().numpy()[documents]
            order = np.argsort(documents)  # `ranked` breaks ties by position
            documents, mine = documents[order], mine[order]
            excluded = np.flatnonzero(np.isin(documents, query.excluded)).tolist()
            yield documents[ranked(mine, excluded, window.last_rank)]

    def _scores(self, vectors: np.ndarray) -> Any:
        """Return the cosines of some queries with all documents, float32 on the model's device."""
        import torch

        device = self._model.device
        rows = torch.from_numpy(vectors).to(device)
        scores = torch.empty(len(vectors), self._shape[0], device=device)
        for start in range(0, self._shape[0], _BLOCK_DOCUMENTS):
            count = min(_BLOCK_DOCUMENTS, self._shape[0] - start)
            width = self._shape[1]
            block = np.fromfile(self._file, np.float32, count * width, offset=start * width * 4).reshape(count, width)
            torch.matmul(rows, torch.from_numpy(block).to(device).T, out=scores[:, start : start + count])
        return scores
