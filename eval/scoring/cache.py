"""Cache embeddings on disk until a task is scored, so that an interrupted evaluation resumes without repeating work.

Each model state and task has a folder with blocks of vectors, keyed by the hash of prompt and text. A block is written
to a temporary file and renamed. The blocks are deleted once the task's result is saved. Equal texts of a task are
embedded once.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Float

from anchor.encoding.encoder import TextEncoder
from anchor.progress import tracked
from eval.embedding.vectors import Part, read_part, read_part_ids, write_part

log = logging.getLogger(__name__)

BLOCK_TEXTS = 1024
"""New texts per block and rank: the most that a killed run can lose."""


class VectorCache:
    """Disk cache of the vectors of one task and model state.

    Args:
        folder: folder of the blocks, created with the first block.
        key: identifies everything but prompt and text that the vectors depend on: weights, dtype, ...

    Raises:
        DataError: a block cannot be read.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._key = key
        self._where: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("block-*.safetensors")):
            self._index(path, read_part_ids(path, key))
        if self._where:
            log.info("%s: %d embeddings of an earlier run", folder, len(self._where))

    def encode(
        self, encoder: TextEncoder, texts: Sequence[str], prompt: str, *, normalize: bool = True
    ) -> Float[np.ndarray, "B D"]:
        """Return vectors in text order and embed only new texts; use one cache for one value of ``normalize``."""
        names = [xxhash.xxh3_128_hexdigest(f"{len(prompt)} {prompt}{text}".encode(errors="replace")) for text in texts]
        new = {name: text for name, text in zip(names, texts, strict=True) if name not in self._where}
        size = BLOCK_TEXTS * getattr(encoder, "world_size", 1)
        pending = list(new)
        log.info("%s: %d texts to embed, %d known", self.folder.name, len(pending), len({*names}) - len(pending))
        blocks = [pending[start : start + size] for start in range(0, len(pending), size)]
        for block in tracked(blocks, self.folder.name, len(pending), unit=" texts", amount=len):
            vectors = (encoder.encode if normalize else encoder.states)([new[name] for name in block], prompt)
            self._write(Part(block, vectors, np.ones(len(block), dtype=np.float32)))
        return self._read(names, encoder.dimension)

    def _write(self, part: Part) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"block-{len(list(self.folder.glob('block-*.safetensors'))):06d}.safetensors"
        write_part(path, part, self._key)
        self._index(path, part.ids)

    def _index(self, path: Path, names: list[str]) -> None:
        self._where.update({name: (path, row) for row, name in enumerate(names)})

    def _read(self, names: list[str], dimension: int) -> np.ndarray:
        out = np.empty((len(names), dimension), dtype=np.float32)
        by_file: dict[Path, list[tuple[int, int]]] = {}
        for i, name in enumerate(names):
            path, row = self._where[name]
            by_file.setdefault(path, []).append((i, row))
        for path, rows in by_file.items():
            wanted, found = zip(*rows, strict=True)
            out[list(wanted)] = read_part(path, self._key).embeddings[list(found)]
        return out
