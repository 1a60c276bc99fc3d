"""Centred anchor vectors: anchor states minus the mean of their frame, scaled to RMS 1.

Raw anchor states of different texts are nearly identical (cosines of 0.8 to 0.99 in SmolLM2-135M). Most of what they
share comes from the **frame**: everything in a segment except its body, i.e. template and instruction. So

    v = (h - m_f) / RMS(h - m_f),   RMS(x) = sqrt(mean of x^2)

where ``m_f`` is the mean anchor state of frame f in the last batch that contained it, over all ranks and packs,
without gradient. It does not depend on how a batch is split. A frame that has not been seen yet has mean zero.

1. :meth:`Centres.vectors` centres the states of a pack and, during training, adds them to the step's sums.
2. :meth:`Centres.update` reduces the sums over ranks after the step: one collective of F x H numbers.
3. Checkpoints and exports store each mean under the token ids of its frame. To centre a text, a reader picks the
   longest frame that matches the start and end of the text's tokens.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from anchor import dist
from anchor.data.packing import cu_seqlens
from anchor.data.records import POSITIVE
from anchor.data.shards import Batch, Pack
from anchor.errors import ModelError

log = logging.getLogger(__name__)

CENTRES_NAME = "decode_centres.safetensors"
_EPSILON = 1e-12

Frame = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids before and after the body."""


def frames_of(pack: Pack) -> list[Frame]:
    """Return the frame of every segment."""
    starts = cu_seqlens(pack.segment_lengths)
    spans = zip(starts, starts[1:], pack.body_starts, pack.body_ends, strict=False)
    cuts = ((pack.input_ids[a : a + first], pack.input_ids[a + last : b]) for a, b, first, last in spans)
    return [(tuple(before.tolist()), tuple(behind.tolist())) for before, behind in cuts]


class Centres:
    """Mean anchor state of each frame."""

    def __init__(self) -> None:
        self.means: dict[Frame, Tensor] = {}
        self._sums: dict[Frame, Tensor] = {}
        self._warned = False

    def vectors(self, anchors: Float[Tensor, "S H"], pack: Pack, *, training: bool) -> Float[Tensor, "S H"]:
        """Centre and scale the anchor states of a pack.

        Args:
            anchors: anchor states of the pack's segments.
            pack: the segments.
            training: whether to include the states in the next means.

        Returns:
            Vectors of RMS 1, float32 or wider.
        """
        wide = anchors.to(torch.promote_types(anchors.dtype, torch.float32))
        frames = frames_of(pack)
        known = sorted(set(frames))
        rows = np.array([known.index(frame) for frame in frames])
        zero = wide.new_zeros(wide.shape[1])
        means = torch.stack([self.means.get(frame, zero).to(wide) for frame in known])
        if training:
            # Hard negatives do not count: they are neither decoded nor decoded from.
            for number, frame in enumerate(known):
                members = torch.from_numpy(np.flatnonzero((rows == number) & (pack.roles <= POSITIVE)))
                share = wide.detach()[members.to(wide.device)].sum(dim=0)
                self._sums[frame] = self._sums.get(frame, zero) + share
        return scaled(wide - means[torch.from_numpy(rows).to(wide.device)])

    def update(self, batch: Batch) -> None:
        """Replace the means of the batch's frames. Every rank must call this after the step, with the whole batch."""
        counts: dict[Frame, int] = {}
        for pack in batch.packs:
            chosen = pack.roles <= POSITIVE
            for frame, counted in zip(frames_of(pack), chosen, strict=True):
                if counted:
                    counts[frame] = counts.get(frame, 0) + 1
        frames = sorted(counts)
        zero = torch.zeros_like(next(iter(self._sums.values())))
        sums = dist.all_reduce_sum(torch.stack([self._sums.get(frame, zero) for frame in frames]))
        self.means |= {frame: total / counts[frame] for frame, total in zip(frames, sums, strict=True)}
        self._sums = {}

    def match(self, ids: Sequence[int]) -> Frame | None:
        """Return the known frame with the longest prefix among those that match the start and end of the token ids."""
        fits = [f for f in self.means if tuple(ids[: len(f[0])]) == f[0] and tuple(ids[len(ids) - len(f[1]) :]) == f[1]]
        return max(fits, key=lambda frame: len(frame[0]), default=None)

    def matched(self, states: Float[Tensor, "S H"], texts: Iterable[Sequence[int]]) -> Float[Tensor, "S H"]:
        """Centre and scale anchor states, using the frame that matches each text's token ids."""
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        zero = wide.new_zeros(wide.shape[1])
        found = [self.match(ids) for ids in texts]
        if None in found and not self._warned:
            log.warning("texts whose template or instruction was not trained on: their states are not centred")
            self._warned = True
        means = [zero if frame is None else self.means[frame].to(wide) for frame in found]
        return scaled(wide - torch.stack(means))

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the means by name, on the CPU. A name is the JSON of the frame's two lists of token ids."""
        return {json.dumps(frame): mean.cpu().contiguous() for frame, mean in self.means.items()}

    def read(self, file: Path) -> None:
        """Load means that were saved from :meth:`to_tensors`.

        Raises:
            ModelError: the file is missing or unreadable.
        """
        try:
            stored = load_file(file)
            self.means = {_frame(name): mean for name, mean in stored.items()}
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise ModelError(f"{file}: missing or unreadable ({type(error).__name__}); restore it") from error


def _frame(name: str) -> Frame:
    before, behind = json.loads(name)
    return tuple(before), tuple(behind)


def scaled(vectors: Float[Tensor, "S H"]) -> Float[Tensor, "S H"]:
    """Scale rows to RMS 1."""
    return vectors * torch.rsqrt(vectors.square().mean(dim=-1, keepdim=True) + _EPSILON)
