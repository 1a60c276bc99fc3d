"""Checkpoints: DeepSpeed's sharded state and a description of the run, written to a temporary folder and renamed.

``checkpoints/step-00000100/`` holds ``engine/`` (every rank's share) and ``state.json``: step, recipe, data index hash,
number of ranks, and the size and xxh3 of every file. Batch order and dropout are functions of (seed, step), so no
generator state is stored.

1. Compare the free disk with what the trained parameters need. A full disk is an error that leaves earlier checkpoints
   unchanged.
2. Every rank writes its share into ``.writing-step-...`` and flushes it to the disk. Rank 0 adds ``state.json``,
   renames the folder, and moves ``latest`` last. A folder without ``state.json`` was interrupted.
3. On resume, every file is compared with ``state.json``, and that file with its own checksum. A damaged checkpoint is
   reported by name, and the run falls back to the one before it. Training it again is bit-identical on CPUs, and on
   CUDA as far as its kernels are deterministic. Folders with other names, such as a copy ``step-00000100.bak``, are
   left alone.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import save_file

from anchor import dist
from anchor.engine.deepspeed import Engine
from anchor.engine.step import objective_of
from anchor.errors import TrainingError, first_line
from anchor.estimate.work import checkpoint_bytes
from anchor.json_files import read_object
from anchor.models.centres import CENTRES_NAME

log = logging.getLogger(__name__)

_TAG = "engine"
_UNIVERSAL = "universal"
_UNFINISHED = (".writing-", ".deleting-")
_NAME = re.compile(r"step-\d{8,}")
_STATE = {"step": int, "recipe": dict, "data_index_sha256": str, "num_ranks": int, "zero_stage": int, "files": dict}
"""Keys of ``state.json`` and their types. ``xxh3`` is the checksum of all other keys; earlier versions lack it."""


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of steps in a folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first."""
    found = [path.parent for path in folder.glob("step-*/state.json") if _NAME.fullmatch(path.parent.name)]
    return sorted(found, key=checkpoint_step)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read ``state.json`` of a complete checkpoint.

    Raises:
        ValueError: the file is damaged.
    """
    state = read_object(checkpoint / "state.json")
    wrong = [key for key, kind in _STATE.items() if type(state.get(key)) is not kind]
    if wrong:
        raise ValueError(f"cannot be read: {wrong[0]} is {str(state.get(wrong[0]))[:20]}")
    if state.get("xxh3", _state_xxh3(state)) != _state_xxh3(state):
        raise ValueError("checksum differs")
    if state["step"] != checkpoint_step(checkpoint):
        raise ValueError(f"is of step {state['step']}")
    return state


def _state_xxh3(state: dict[str, Any]) -> str:
    others = {key: value for key, value in state.items() if key != "xxh3"}
    return xxhash.xxh3_64_hexdigest(json.dumps(others, sort_keys=True).encode())


def save_checkpoint(engine: Engine, folder: Path, state: dict[str, Any], *, keep: int, keep_every: int | None) -> Path:
    """Write the checkpoint after ``state["step"]`` steps; every rank calls it.

    Args:
        engine: holds the trained parameters and optimiser state to write.
        folder: the run's ``checkpoints``.
        state: ``step`` and the keys that identify the run, see :mod:`anchor.engine.resume`.
        keep: number of newest checkpoints to keep.
        keep_every: also keep the checkpoints at multiples of this many steps.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: the disk is too full; earlier checkpoints are unchanged.
    """
    final = folder / checkpoint_name(state["step"])
    beside = folder / f".writing-{final.name}"
    _refuse_full_disk(engine, folder, state["step"])
    with _full_disk_explained(beside, engine.ranks.rank, state["step"]):
        if dist.is_first_rank():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        dist.barrier()
        engine.save(beside, _TAG)
        if dist.is_first_rank() and (centres := objective_of(engine).centres) is not None:
            save_file(centres.to_tensors(), beside / CENTRES_NAME)
        files = _flushed(beside, engine.ranks.rank)
        files = {name: about for part in dist.gather_objects(files) for name, about in part.items()}
        if dist.is_first_rank():
            whole = {**state, "files": files}
            whole["xxh3"] = _state_xxh3(whole)
            _write_atomically(beside / "state.json", json.dumps(whole, indent=1) + "\n")
            _remove(final)
            os.replace(beside, final)
            _flush_folder(folder)
            _write_atomically(folder / "latest", final.name + "\n")
            for old in superseded(complete_checkpoints(folder), state["step"], keep, keep_every):
                _remove(old)
    dist.barrier()
    log.info("checkpoint %s", final)
    return final


def superseded(checkpoints: list[Path], step: int, keep: int, keep_every: int | None) -> list[Path]:
    """Return which of the checkpoints, oldest first, can be deleted once the checkpoint of ``step`` is written.

    Checkpoints of later steps are ignored: they are damaged, or the run would have resumed from them.
    """
    done = [checkpoint for checkpoint in checkpoints if checkpoint_step(checkpoint) <= step]
    return [old for old in done[:-keep] if keep_every is None or checkpoint_step(old) % keep_every]


def _refuse_full_disk(engine: Engine, folder: Path, step: int) -> None:
    needed = checkpoint_bytes(engine.num_parameters(trained=True), engine.dtype_bytes, engine.zero_stage)
    free = dist.broadcast_object(shutil.disk_usage(folder.parent).free if dist.is_first_rank() else None)
    if free < needed:
        raise TrainingError(
            f"{folder}: the checkpoint of step {step} needs {needed / 2**30:.3g} GiB, {free / 2**30:.3g} GiB are free; "
            f"free some disk and start again{_goes_on_from(folder)}"
        )


def _goes_on_from(folder: Path) -> str:
    found = complete_checkpoints(folder)
    return f", the run goes on from {found[-1].name}" if found else ""


@contextmanager
def _full_disk_explained(beside: Path, rank: int, step: int) -> Iterator[None]:
    """Turn a failed write into a one-line error.

    A rank removes only its own files: others may still be writing.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not _is_write_error(error):
            raise
        for path in _own_files(beside, rank):
            path.unlink(missing_ok=True)
        raise TrainingError(
            f"{beside}: rank {rank} could not write the checkpoint of step {step} ({first_line(error)}); "
            f"free some disk and start again{_goes_on_from(beside.parent)}"
        ) from error


def _is_write_error(error: OSError | RuntimeError) -> bool:
    """Return whether the error is a failed write.

    torch reports a failed write as a RuntimeError of its zip writer, from one of three places in it.
    """
    in_torch = ("PytorchStreamWriter", "inline_container", "iostream error")
    return isinstance(error, OSError) or any(part in str(error) for part in in_torch)


def _own_files(beside: Path, rank: int) -> list[Path]:
    """Return the files that this rank writes: its shares and, on rank 0, the files that belong to no rank."""
    share = f"zero_pp_rank_{rank}_"
    return [
        path
        for path in sorted(beside.rglob("*"))
        if path.is_file() and (share in path.name or (rank == 0 and "zero_pp_rank_" not in path.name))
    ]


def _flushed(beside: Path, rank: int) -> dict[str, dict[str, int | str]]:
    """Flush this rank's files to the disk; return their sizes and checksums by name."""
    mine = _own_files(beside, rank)
    for path in mine:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    return {str(path.relative_to(beside)): {"bytes": path.stat().st_size, "xxh3": _xxh3(path)} for path in mine}


def _xxh3(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _flush_folder(folder: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that an interruption cannot leave half of it under its name."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".deleting-{checkpoint.name}")
        _delete(doomed)
        os.replace(checkpoint, doomed)
        _delete(doomed)


def _delete(path: Path) -> None:
    """Delete a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what an interrupted writer left; rank 0 calls it before training."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        if path.name.startswith(_UNFINISHED):
            _delete(path)


def newest_intact(folder: Path, rank: int, world_size: int) -> Path | None:
    """Return the newest checkpoint whose files are unchanged; every rank calls it and reads a share of them.

    Args:
        folder: the run's ``checkpoints``.
        rank, world_size: decide which files this rank reads.

    Returns:
        A checkpoint, or None if there are no checkpoints.

    Raises:
        TrainingError: there are checkpoints, but all are damaged.
    """
    found: list[Path] = dist.broadcast_object(complete_checkpoints(folder))
    for checkpoint in reversed(found):
        damages = dist.gather_objects(list(_damages(checkpoint, rank, world_size)))
        first = next((text for part in damages for text in part), None)
        if first is None:
            return checkpoint
        log.error("%s is damaged (%s): not used", checkpoint, first)
    if found:
        raise TrainingError(
            f"{folder}: all {len(found)} checkpoints are damaged; restore one, or delete the folder to start anew"
        )
    return None


def _damages(checkpoint: Path, rank: int, world_size: int) -> Iterator[str]:
    try:
        files = sorted(read_state(checkpoint)["files"].items())
    except ValueError as error:
        yield f"state.json {error}"
        return
    if not files:
        yield "state.json lists no files"
    for name, about in files[rank::world_size]:
        path = checkpoint / name
        if not (isinstance(about, dict) and about.keys() >= {"bytes", "xxh3"}):
            yield f"state.json cannot be read: {name} is {str(about)[:20]}"
        elif not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != about["bytes"]:
            yield f"{name} has {path.stat().st_size} bytes instead of {about['bytes']}"
        elif _xxh3(path) != about["xxh3"]:
            yield f"{name}: checksum differs"


def load_checkpoint(engine: Engine, checkpoint: Path) -> None:
    """Load an intact checkpoint of this run; every rank calls it.

    If another number of ranks wrote it, rank 0 first converts it to DeepSpeed's universal format beside it. The engine
    must then have been created with ``universal=True``.
    """
    if (centres := objective_of(engine).centres) is not None:
        centres.read(checkpoint / CENTRES_NAME)
    if not engine.universal:
        engine.load(checkpoint, _TAG)
        return
    if dist.is_first_rank():
        shutil.rmtree(checkpoint / _UNIVERSAL, ignore_errors=True)
        engine.convert_to_universal(checkpoint / _TAG, checkpoint / _UNIVERSAL)
    dist.barrier()
    engine.load(checkpoint, _UNIVERSAL)
    dist.barrier()
    if dist.is_first_rank():
        shutil.rmtree(checkpoint / _UNIVERSAL)
