"""Write and read folders of embeddings with ids, norms and a manifest, as ``.npy``, Parquet or safetensors.

A folder holds ``manifest.json`` (written last: without it the folder is unfinished) and one of

* ``npy``: ``embeddings.npy`` (N x D), ``norms.npy`` (N, float32), ``ids.txt`` (one id per line);
* ``safetensors``: ``embeddings.safetensors`` with the tensors ``embeddings`` and ``norms``, and ``ids.txt``;
* ``parquet``: ``embeddings.parquet`` with the columns ``id``, ``embedding`` (list of D) and ``norm``.

``norms`` are the lengths of the anchor states before normalisation. Decoding a normalised embedding needs them, see
:mod:`eval.decode`.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from anchor.errors import DataError
from anchor.json_files import load_json, refuse_other_shape

FORMATS = ("npy", "parquet", "safetensors")
DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
MANIFEST = "manifest.json"
_MANIFEST = {
    **{"model": str, "revision": str, "normalize": bool, "format": str, "dimension": int, "has_norms": bool},
    "files": {str: {"bytes": int, "xxh3": str}},
}


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive vectors.

    Attributes:
        ids: ids of the texts.
        embeddings: ``B D``.
        norms: float32 ``B``.
    """

    ids: list[str]
    embeddings: Float[np.ndarray, "B D"]
    norms: Float[np.ndarray, " B"]


@dataclass(frozen=True, slots=True)
class Stored:
    """Content of a finished folder.

    Attributes:
        manifest: content of ``manifest.json``.
        ids: ids of the texts.
        embeddings: vectors as stored; memory-mapped if the format allows it.
        norms: lengths of the anchor states, or None if the folder's model has none.
    """

    manifest: dict[str, Any]
    ids: list[str]
    embeddings: Float[np.ndarray, "B D"]
    norms: Float[np.ndarray, " B"] | None


def write_folder(folder: Path, parts: Iterator[Part], manifest: dict[str, Any]) -> dict[str, Any]:
    """Write vectors in the manifest's ``format``, then the manifest with sizes and checksums; return the manifest.

    Args:
        folder: an existing folder; files of the same names are replaced.
        parts: all vectors, in order.
        manifest: ``format``, ``texts``, ``dimension``, ``dtype`` and anything else to record.

    Raises:
        OSError: the disk is full, or the operating system refuses for another reason.
    """
    writer = {"npy": _write_npy, "parquet": _write_parquet, "safetensors": _write_safetensors}[manifest["format"]]
    names = writer(folder, parts, manifest)
    files = {name: {"bytes": (folder / name).stat().st_size, "xxh3": file_xxh3(folder / name)} for name in names}
    whole = {**manifest, "files": files}
    write_json(folder / MANIFEST, whole)
    return whole


def read_folder(folder: Path) -> Stored:
    """Read a folder that :func:`write_folder` finished.

    Raises:
        DataError: the folder is unfinished, or a file is missing or altered.
    """
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: no {MANIFEST}; expected a finished folder of `python -m eval embed`")
    manifest = _read_manifest(folder / MANIFEST)
    for name, about in manifest["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != about["bytes"] or file_xxh3(file) != about["xxh3"]:
            raise DataError(f"{file}: missing or altered since it was written; run `python -m eval embed` again")
    norms: np.ndarray | None
    if manifest["format"] == "parquet":
        table = pq.read_table(folder / "embeddings.parquet")
        ids = table.column("id").to_pylist()
        flat = table.column("embedding").combine_chunks()
        embeddings = np.asarray(flat.values).reshape(len(ids), manifest["dimension"])
        norms = table.column("norm").to_numpy()
    else:
        ids = (folder / "ids.txt").read_bytes().decode().split("\n")[:-1]  # text mode would also split at "\r"
        if manifest["format"] == "npy":
            embeddings, norms = np.load(folder / "embeddings.npy", mmap_mode="r"), np.load(folder / "norms.npy")
        else:
            tensors = load_file(folder / "embeddings.safetensors")
            embeddings, norms = tensors["embeddings"], tensors["norms"]
    return Stored(manifest, ids, embeddings, norms if manifest["has_norms"] else None)


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = load_json(file)
        refuse_other_shape(manifest, _MANIFEST)
        if manifest["format"] not in FORMATS:
            raise ValueError(f"format is {manifest['format']!r}")
    except ValueError as error:
        raise DataError(f"{file}: half-written or damaged ({error}); run `python -m eval embed` again") from error
    return manifest


def write_part(path: Path, part: Part, key: str) -> None:
    """Write a block's vectors to a temporary file and rename it, so that a part under its final name is complete.

    Args:
        path: file of the part.
        part: vectors to write; ids must not contain line endings.
        key: stored with the part and checked on reading.

    Raises:
        OSError: the disk is full, or the operating system refuses for another reason.
    """
    beside = path.with_name(path.name + ".tmp")
    embeddings = np.ascontiguousarray(part.embeddings)
    ids = np.frombuffer("\n".join(part.ids).encode(), dtype=np.uint8)
    tensors = {"embeddings": embeddings, "norms": part.norms, "ids": ids}
    _save(tensors, beside, {"key": key, "xxh3": _tensors_xxh3(tensors)})
    os.replace(beside, path)


def read_part(path: Path, key: str) -> Part:
    """Read a part that :func:`write_part` wrote.

    Raises:
        DataError: the part is half-written or altered, or its key differs from ``key``.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, "np") as opened:
            about = opened.metadata()
        ids = tensors["ids"].tobytes().decode().split("\n")
        part = Part(ids, tensors["embeddings"], tensors["norms"])
        same_texts, same_bits = about["key"] == key, about["xxh3"] == _tensors_xxh3(tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: half-written or damaged ({error}); delete it and run the command again") from error
    if not same_texts:
        raise DataError(f"{path}: holds other texts than the input now does; add --overwrite to begin again")
    if not same_bits:
        raise DataError(f"{path}: checksum differs; delete it and run the command again")
    return part


def read_part_ids(path: Path, key: str) -> list[str]:
    """Return only the ids of a part, without the checksum test; raises otherwise as :func:`read_part`."""
    try:
        with safe_open(path, "np") as opened:
            same = opened.metadata()["key"] == key
            ids = opened.get_tensor("ids").tobytes().decode().split("\n")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: half-written or damaged ({error}); delete it and run the command again") from error
    if not same:
        raise DataError(f"{path}: belongs to another model or setting; delete it and run the command again")
    return ids


def _tensors_xxh3(tensors: dict[str, np.ndarray]) -> str:
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).view(np.uint8).data)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary file and rename it into place."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def file_xxh3(path: Path) -> str:
    """Return the xxh3 of a file's bytes."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _write_npy(folder: Path, parts: Iterator[Part], manifest: dict[str, Any]) -> list[str]:
    shape, dtype = (manifest["texts"], manifest["dimension"]), DTYPES[manifest["dtype"]]
    out = _new_npy(folder / "embeddings.npy", shape, dtype)
    norms = _new_npy(folder / "norms.npy", shape[:1], np.dtype(np.float32))
    _fill(folder, out, norms, parts)
    out.flush()
    norms.flush()
    return ["embeddings.npy", "norms.npy", "ids.txt"]


def _write_safetensors(folder: Path, parts: Iterator[Part], manifest: dict[str, Any]) -> list[str]:
    out = np.empty((manifest["texts"], manifest["dimension"]), dtype=DTYPES[manifest["dtype"]])
    norms = np.empty(len(out), dtype=np.float32)
    _fill(folder, out, norms, parts)
    _save({"embeddings": out, "norms": norms}, folder / "embeddings.safetensors")
    return ["embeddings.safetensors", "ids.txt"]


def _new_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """Create and map a ``.npy`` file with all blocks allocated: on a full disk, writing to a hole is a bus error."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with _refusals_named(path), path.open("rb+") as stream:
        os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return out


def _save(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None) -> None:
    with _refusals_named(path):
        save_file(tensors, path, metadata=metadata)


@contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    """Convert operating-system errors, also those wrapped by a library, into an ``OSError`` that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _fill(folder: Path, out: np.ndarray, norms: np.ndarray, parts: Iterator[Part]) -> None:
    """Copy the parts into ``out`` and ``norms``, and their ids into ``ids.txt``."""
    start = 0
    with (folder / "ids.txt").open("w", encoding="utf-8", newline="\n") as stream:
        for part in parts:
            rows = slice(start, start + len(part.ids))
            out[rows], norms[rows] = part.embeddings, part.norms
            stream.writelines(f"{one}\n" for one in part.ids)
            start += len(part.ids)


def _write_parquet(folder: Path, parts: Iterator[Part], manifest: dict[str, Any]) -> list[str]:
    value = pa.from_numpy_dtype(DTYPES[manifest["dtype"]])
    fields = [("id", pa.string()), ("embedding", pa.list_(value, manifest["dimension"])), ("norm", pa.float32())]
    schema = pa.schema(fields)
    path = folder / "embeddings.parquet"
    with _refusals_named(path), pq.ParquetWriter(path, schema) as writer:
        for part in parts:
            flat = pa.array(np.ascontiguousarray(part.embeddings).reshape(-1), value)
            columns = [part.ids, pa.FixedSizeListArray.from_arrays(flat, manifest["dimension"]), part.norms]
            writer.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema))
    return ["embeddings.parquet"]
