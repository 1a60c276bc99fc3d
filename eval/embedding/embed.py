"""``python -m eval embed``: embed texts into a folder of vectors, in one process or on many ranks.

1. Split the texts, in order, into blocks of ``shard_texts``; rank r of W embeds blocks r, r + W, ... The blocks do not
   depend on W, so a run can resume on another number of ranks.
2. Write each finished block as a part, to a temporary file that is then renamed. A killed run resumes after its last
   part. Rank 0 holds a lock in the parts folder until the process ends, so a second run into the folder is refused.
3. Rank 0 merges the parts, with ids and norms, in the parts folder. It moves the result into the output folder, the
   manifest last. With ``--overwrite``, old vectors stay until then.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console
from rich.progress import track

from anchor import dist
from anchor.encoding.encoder import NotFiniteError, TextEncoder, unit
from anchor.encoding.ranks import rank_and_size
from anchor.errors import ConfigError, DataError
from anchor.locks import take
from eval.embedding.texts import Block, Source, check_source, read_blocks
from eval.embedding.vectors import DTYPES, MANIFEST, Part, read_part, write_folder, write_json, write_part

log = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 30.0
_PARTS, _JOB, _LOCK, _MERGED = ".parts", "job.json", "lock", "merged"
# Deleted in this order, manifest first: a folder without a manifest counts as unfinished.
_OURS = (MANIFEST, "embeddings.npy", "norms.npy", "ids.txt", "embeddings.parquet", "embeddings.safetensors")


@dataclass(frozen=True, slots=True)
class Options:
    """Options for computing and storing vectors.

    Attributes:
        prompt: name of a prompt of the folder, or None for bare texts.
        normalize: True for unit vectors, False for raw anchor states.
        dimension: number of leading components to keep (Matryoshka), cut before normalising; None keeps all.
        dtype: dtype of the stored vectors, ``fp32`` or ``fp16``.
        format: ``npy``, ``parquet`` or ``safetensors``.
        shard_texts: texts per part.
    """

    prompt: str | None = None
    normalize: bool = True
    dimension: int | None = None
    dtype: str = "fp32"
    format: str = "npy"
    shard_texts: int = 2048


def embed(encoder: TextEncoder, source: Source, output: Path, options: Options, *, overwrite: bool = False) -> None:
    """Embed a source into a folder; every rank calls it. See :mod:`eval.embedding.vectors` for the files.

    Args:
        encoder: the model.
        source: the texts; standard input works only with one rank.
        output: the output folder; an unfinished run of the same job resumes there.
        options: how to compute and store the vectors.
        overwrite: replace other vectors in the folder; complete parts of the same job and texts are kept.

    Raises:
        AnchorError: bad input, unknown prompt, folder in use, or a vector that is not finite.
    """
    job = _job(encoder, source, options)
    rank, world_size = rank_and_size()
    if source.path is None and world_size > 1:
        raise ConfigError(f"standard input: cannot be shared by {world_size} ranks; give a file")
    check_source(source)
    if source.path is not None and source.path.resolve().is_relative_to(output.resolve()):
        raise ConfigError(f"{source.path}: the input lies inside --output {output}; choose another --output")
    with _claimed(output, job, overwrite) if rank == 0 else nullcontext():
        dist.barrier()
        # A network file system may have cached that the folder was missing; mkdir forces a fresh lookup.
        (output / _PARTS).mkdir(parents=True, exist_ok=True)
        _embed_parts(encoder, source, output, options, job, overwrite)
        dist.barrier()


def _embed_parts(
    encoder: TextEncoder, source: Source, output: Path, options: Options, job: dict[str, Any], overwrite: bool
) -> None:
    """Write this rank's parts; rank 0 then merges the parts of all ranks."""
    rank, world_size = rank_and_size()
    parts = output / _PARTS
    keys: list[str] = []
    kept = made = 0
    last = time.monotonic()
    console = Console(stderr=True)
    blocks = read_blocks(source, options.shard_texts, check_ids=rank == 0)
    for block in track(blocks, "embedding", console=console, disable=not console.is_terminal, transient=True):
        keys.append(_key(block))
        path = _part(parts, block.number)
        if block.number % world_size != rank:
            continue
        if _is_there(path, keys[-1], overwrite):
            kept += 1
            continue
        _embed_block(encoder, source, block, path, job)
        made += 1
        if time.monotonic() - last >= LOG_EVERY_SECONDS:
            last = time.monotonic()
            log.info("%d texts embedded", (block.number + 1) * options.shard_texts)
    dist.barrier()
    log.info("rank %d: %d parts embedded, %d kept of an earlier run", rank, made, kept)
    if rank == 0:
        _merge(source, output, keys, job)


def _job(encoder: TextEncoder, source: Source, options: Options) -> dict[str, Any]:
    """Return everything that the vectors depend on; a run resumes only if all of it is unchanged."""
    if options.dimension is not None and not 0 < options.dimension <= encoder.dimension:
        raise ConfigError(
            f"--dimension {options.dimension}: {encoder.folder} has {encoder.dimension}; give 1 to {encoder.dimension}"
        )
    if not encoder.raw and not options.normalize:
        raise ConfigError(
            f"{encoder.folder}: no anchor.json, so only the vectors of its own modules are known; drop --raw"
        )
    settings = {key: value for key, value in asdict(options).items() if key != "prompt"}
    return {
        **settings,
        "model": str(encoder.folder),
        "revision": encoder.revision(),
        "prompt": encoder.prompt(options.prompt) if options.prompt is not None else "",
        "max_tokens": encoder.max_tokens,
        "compute_dtype": encoder.dtype,
        "dimension": options.dimension or encoder.dimension,
        "has_norms": encoder.raw,
        "source": source.name,
    }


@contextmanager
def _claimed(output: Path, job: dict[str, Any], overwrite: bool) -> Iterator[None]:
    """Prepare the folder and hold its lock for the ``with`` block; refuse a folder that cannot be used."""
    parts = output / _PARTS
    _refuse_used(output, job, overwrite)
    parts.mkdir(parents=True, exist_ok=True)
    with (parts / _LOCK).open("a") as lock:
        if not take(lock, parts / _LOCK):
            raise ConfigError(f"{output}: another process is writing it; wait for it or choose another --output")
        _refuse_used(output, job, overwrite)  # another run may have started or finished meanwhile
        if not _is_job(parts / _JOB, job):
            for path in parts.iterdir():
                if path.name != _LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(parts / _JOB, job)
        yield


def _refuse_used(output: Path, job: dict[str, Any], overwrite: bool) -> None:
    parts = output / _PARTS
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: a file; --output names a folder")
    if overwrite or not output.is_dir():
        return
    if (output / MANIFEST).is_file():
        raise ConfigError(f"{output}: holds finished embeddings; choose another --output or add --overwrite")
    if (parts / _JOB).is_file():
        _check_same(output, _read_job(parts / _JOB), job)
    elif any(path not in (parts, parts / _LOCK) for path in (*output.iterdir(), *parts.glob("*"))):
        raise ConfigError(f"{output}: not empty; choose another --output")


def _read_job(path: Path) -> dict[str, Any]:
    """Return the job of an unfinished folder.

    Raises:
        DataError: the file is not readable.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not readable; add --overwrite to begin again") from error


def _is_job(path: Path, job: dict[str, Any]) -> bool:
    """Return whether the parts belong to this job, so that a killed run repeated with `--overwrite` resumes."""
    try:
        return path.is_file() and _read_job(path) == job
    except DataError:
        return False


def _is_there(path: Path, key: str, overwrite: bool) -> bool:
    """Return whether a part is already complete.

    Raises:
        DataError: the part is damaged or has other texts. With ``overwrite``, return False instead.
    """
    try:
        return path.is_file() and bool(read_part(path, key).ids)
    except DataError:
        if not overwrite:
            raise
        return False


def _check_same(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        what = ", ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in differing)
        raise ConfigError(f"{output}: holds an unfinished run of another job ({what}); add --overwrite to begin again")


def _key(block: Block) -> str:
    digest = xxhash.xxh3_128()
    for texts in (block.ids, block.texts):
        for text in texts:
            raw = text.encode(errors="surrogatepass")
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
    return digest.hexdigest()


def _embed_block(encoder: TextEncoder, source: Source, block: Block, path: Path, job: dict[str, Any]) -> None:
    try:
        states = encoder.states(block.texts, job["prompt"])
    except NotFiniteError as error:
        raise DataError(f"{source.name}: text '{block.ids[error.index]}': {error}") from error
    norms = np.linalg.norm(states, axis=1).astype(np.float32)  # before the cut to --dimension
    cut = states[:, : job["dimension"]]
    vectors = (unit(cut) if job["normalize"] else cut).astype(DTYPES[job["dtype"]])
    if not np.isfinite(vectors).all():
        raise DataError(f"{source.name}: block {block.number} exceeds fp16; store with --output-dtype fp32")
    write_part(path, Part(block.ids, vectors, norms), _key(block))


def _merge(source: Source, output: Path, keys: list[str], job: dict[str, Any]) -> None:
    parts = output / _PARTS

    def in_order() -> Iterator[Part]:
        for number, key in enumerate(keys):
            yield read_part(_part(parts, number), key)

    num_texts = sum(len(part.ids) for part in in_order())
    manifest = {**job, "texts": num_texts, "ranks": rank_and_size()[1], "parts": len(keys)}
    merged = parts / _MERGED
    merged.mkdir(exist_ok=True)
    write_folder(merged, in_order(), manifest)
    for name in _OURS:
        (output / name).unlink(missing_ok=True)
    for name in reversed(_OURS):
        if (merged / name).is_file():
            os.replace(merged / name, output / name)
    shutil.rmtree(parts)
    log.info("%d texts of %s in %s", num_texts, source.name, output)


def _part(parts: Path, number: int) -> Path:
    return parts / f"part-{number:06d}.safetensors"
