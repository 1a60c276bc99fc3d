"""Embed on all ranks while rank 0 runs mteb.

Rank 0 requests embeddings; the other ranks wait in :meth:`RankedEncoder.serve` for their share of the texts. Texts are
dealt round-robin by length, so that the shares take about equal time. Rank 0 raises the error of any rank, and the
other ranks keep waiting. Scoring a task may take hours, so this module uses a separate process group with a timeout of
days; a training collective would time out after minutes.
"""

import datetime
import logging
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch.distributed as dist
from jaxtyping import Float

from anchor import dist as anchor_dist
from anchor import log as anchor_log
from anchor.encoding.encoder import NotFiniteError, TextEncoder
from anchor.errors import EXIT_USER_ERROR, AnchorError, exit_on_user_error

log = logging.getLogger(__name__)

PATIENCE = datetime.timedelta(days=14)
"""Timeout of a rank that waits while another rank writes or scores."""


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; 0 and 1 outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def joined(timeout: datetime.timedelta | None = None) -> Iterator[None]:
    """Join the process group for the ``with`` block; see :func:`anchor.dist.init` for the argument.

    A rank that fails logs the reason and exits without tearing down the process group: with NCCL, teardown would wait
    for the other ranks, which wait for this one. The launcher stops the others.
    """
    if anchor_dist.init(timeout=timeout).world_size == 1:
        try:
            yield
        finally:
            anchor_dist.shutdown()
        return
    sys.excepthook = anchor_log.crash_reporter(None)
    try:
        with exit_on_user_error():
            yield
    except SystemExit:
        anchor_dist.leave(EXIT_USER_ERROR)
    anchor_dist.shutdown()


class RankedEncoder(TextEncoder):
    """Encoder that shares its texts among all ranks. Every rank creates one; rank 0 calls :meth:`states`.

    Args:
        local: this rank's encoder.
    """

    def __init__(self, local: TextEncoder) -> None:
        super().__init__(local.folder, local.about, local.dtype)
        self._local = local
        self.raw = local.raw
        self.rank, self.world_size = rank_and_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if self.world_size > 1 else None

    @property
    def dimension(self) -> int:
        return self._local.dimension

    def _truncate(self, max_tokens: int) -> None:
        self._local.limit(max_tokens)  # on every rank, or ranks would cut texts differently

    def revision(self) -> str:
        return self._local.revision()

    def states(self, texts: Sequence[str], prompt: str = "") -> Float[np.ndarray, "B D"]:
        if self.world_size == 1:
            return self._local.states(texts, prompt)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        shares = [order[rank :: self.world_size] for rank in range(self.world_size)]
        self._scatter([(prompt, [texts[i] for i in share]) for share in shares])
        parts: list[np.ndarray | Exception | None] = [None] * self.world_size
        dist.gather_object(self._work(prompt, [texts[i] for i in shares[0]]), parts, group=self._group)
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        for rank, (share, part) in enumerate(zip(shares, parts, strict=True)):
            if isinstance(part, NotFiniteError):
                part.index = share[part.index]
            if isinstance(part, AnchorError):
                raise part
            if not isinstance(part, np.ndarray):
                raise RuntimeError(f"rank {rank} did not embed its {len(share)} texts; its log says why") from part
            out[share] = part
        return out

    def serve(self) -> None:
        """Embed the texts that rank 0 sends until it calls :meth:`stop`; called by the other ranks."""
        while (task := self._scatter(None)) is not None:
            dist.gather_object(self._work(*task), None, group=self._group)

    def stop(self) -> None:
        """Release the other ranks; rank 0 calls this once, also after an error."""
        if self.world_size > 1:
            self._scatter([None] * self.world_size)

    def _work(self, prompt: str, texts: list[str]) -> np.ndarray | Exception:
        """Return the vectors of this rank's share, or the error for rank 0 to raise."""
        try:
            return self._local.states(texts, prompt)
        except AnchorError as error:
            return error
        except Exception as error:  # catch all: otherwise the other ranks wait in the next gather for days
            log.exception("rank %d on %s failed", self.rank, socket.gethostname())
            return RuntimeError(f"{type(error).__name__}: {error}")  # the original error may not pickle

    def _scatter(self, tasks: list | None) -> tuple[str, list[str]] | None:
        box: list = [None]
        dist.scatter_object_list(box, tasks, src=0, group=self._group)
        return box[0]
