"""Metric sinks: ``metrics.jsonl`` on rank 0, one row per step, and TensorBoard and Weights & Biases on request."""

import json
import logging
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from anchor.config.train_recipe import TelemetrySection
from anchor.errors import ConfigError, TrainingError
from anchor.json_files import parse_object

log = logging.getLogger(__name__)

Row = dict[str, float | int | str]
"""A row of metrics: ``step``, ``source`` and metrics named ``group/what_unit``."""


class Sink(ABC):
    """Destination for rows of metrics."""

    @abstractmethod
    def write(self, row: Row) -> None:
        """Write the metrics of ``row["step"]``."""

    @abstractmethod
    def close(self) -> None:
        """Close the sink; no rows follow."""


class JsonLines(Sink):
    """File that rows are appended to; rows after the step resumed at are dropped first.

    Args:
        path: the file.
        first_step: steps already taken.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [line for line, row in _lines(path) if type(row.get("step")) is int and row["step"] <= first_step]
        beside = path.with_name(path.name + ".tmp")
        beside.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(beside, path)
        self._path = path
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(f"{self._path}: cannot be written ({error.strerror}); free some disk") from error

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line that holds a row, and the row.

    Log a warning for a damaged line, except for the half line that a killed run leaves at the end.
    """
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            row = parse_object(line)
        except ValueError as error:
            if line.endswith(b"\n"):
                log.warning("%s:%d: the line %s: not used", path, number, error)
            continue
        yield line.rstrip(b"\n"), row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a ``metrics.jsonl``, oldest first; return an empty list if there is no file."""
    return [row for _, row in _lines(path)]


class TensorBoard(Sink):
    """TensorBoard log in ``output_dir/tensorboard``, with the loss once more per source.

    Raises:
        ConfigError: the package is missing.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(f"telemetry.loggers: tensorboard cannot start ({error}); install it") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, row: Row) -> None:
        step = int(row["step"])
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                self._writer.add_scalar(name, value, step)
        if "source" in row:
            self._writer.add_scalar(f"loss_by_source/{row['source']}", row["loss/total_nats"], step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Sink):
    """Weights & Biases run of the project, resumed under the same id when training resumes.

    Raises:
        ConfigError: the package is missing, or the service refuses.
    """

    def __init__(self, section: TelemetrySection, folder: Path, about: dict[str, Any]) -> None:
        try:
            import wandb
            import wandb.errors
        except ImportError as error:
            raise ConfigError(f"telemetry.loggers: wandb cannot start ({error}); install it") from error
        identity = folder / "wandb-id"
        if not identity.is_file():
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=section.wandb_project,
                mode=section.wandb_mode,
                dir=str(folder),
                name=folder.name,
                id=identity.read_text(encoding="utf-8"),
                resume="allow",
                config=about,
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"telemetry.loggers: wandb cannot start ({error}); log in, or telemetry.wandb_mode=offline"
            ) from error

    def write(self, row: Row) -> None:
        values = dict(row)
        if "source" in row:
            values[f"loss_by_source/{row['source']}"] = row["loss/total_nats"]
        self._run.log(values, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


def open_sinks(section: TelemetrySection, folder: Path, first_step: int, about: dict[str, Any]) -> list[Sink]:
    """Open ``metrics.jsonl`` and the recipe's loggers; rank 0 only.

    Raises:
        ConfigError: a logger cannot start.
    """
    asked: list[Sink] = []
    if "tensorboard" in section.loggers:
        asked.append(TensorBoard(folder, first_step))
    if "wandb" in section.loggers:
        asked.append(WeightsAndBiases(section, folder, about))
    return [JsonLines(folder / "metrics.jsonl", first_step), *asked]


class Clock:
    """Seconds and tokens since the last log line."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.tokens, self._start = 0, time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(1e-9, time.perf_counter() - self._start)


def memory_metrics() -> Row:
    """Return the peak memory of this process's device and the present memory of process and host, in GiB."""
    resident = psutil.Process().memory_info().rss / 2**30
    row: Row = {
        "memory/host_process_gib": resident,
        "memory/host_used_gib": (psutil.virtual_memory().total - psutil.virtual_memory().available) / 2**30,
    }
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else _peak_resident_gib()
    return row | {"memory/peak_gib": peak}


def _peak_resident_gib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
