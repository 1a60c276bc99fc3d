"""Where metrics go: ``metrics.jsonl``, one row per step, on rank 0; and one log line every N steps."""

import json
import logging
import resource
import time
from pathlib import Path
from typing import TextIO

import torch

from anchor import dist

log = logging.getLogger("anchor.engine.loop")


class MetricsFile:
    """Appends rows to ``metrics.jsonl``; rows at or after the step resumed at are dropped first.

    Args:
        path: the file; ranks other than 0 write nothing.
        first_step: step that training begins with.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._file: TextIO | None = None
        if dist.is_first_rank():
            kept = [] if not path.is_file() else path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in kept if json.loads(line)["step"] <= first_step]
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, float | int | str]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Clock:
    """Seconds and tokens since the last log line."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.tokens, self._start = 0, time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(1e-9, time.perf_counter() - self._start)


def peak_memory_gib() -> float:
    """Highest memory of this process: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def log_step(step: int, total_steps: int, metrics: dict[str, float], clock: Clock) -> None:
    """The one line about a step."""
    log.info(
        "step %d/%d loss %.4f nats lr %.2e grad %.3f %s tokens/s %.2f GiB",
        step,
        total_steps,
        metrics["loss/total_nats"],
        metrics["optim/lr"],
        metrics["optim/grad_norm"],
        f"{clock.tokens_per_second:,.0f}",
        peak_memory_gib(),
    )
