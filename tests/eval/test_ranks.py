"""Invariants: an error of any kind on one rank is raised on rank 0, naming the rank, and leaves no rank waiting."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from distributed import run_distributed

from eval.encoder import TextEncoder
from eval.ranks import RankedEncoder


class HeldError(RuntimeError):
    """As some libraries' errors, none that pickle can send."""

    def __init__(self, device: str) -> None:
        super().__init__(f"out of memory on {device}")
        self.lock = threading.Lock()


class Lengths(TextEncoder):
    """A text's vector is its length and that of its prompt; the second call fails where it is told to."""

    dimension = 2

    def __init__(self, *, fails: bool) -> None:
        super().__init__(Path("model"), {"prompts": {}, "max_tokens": 8}, "fp32")
        self.fails, self.calls = fails, itertools.count(1)

    def states(self, texts, prompt=""):
        if next(self.calls) == 2 and self.fails:
            raise HeldError("cuda:0")
        return np.array([[len(text), len(prompt)] for text in texts], dtype=np.float32)


def embed_three_times(ranks, failing: int) -> list[str] | None:
    encoder = RankedEncoder(Lengths(fails=ranks.rank == failing))
    if encoder.rank > 0:
        return encoder.serve()
    try:
        assert encoder.states(["a", "bbb", "cc"], "p").tolist() == [[1, 1], [3, 1], [2, 1]]
        with pytest.raises(RuntimeError) as error:
            encoder.states(["a", "bbb", "cc"])
        assert encoder.states(["dddd", "ee"]).tolist() == [[4, 0], [2, 0]]
    finally:
        encoder.stop()
    return [str(error.value), str(error.value.__cause__)]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_is_raised_on_rank_0_and_no_rank_waits(failing):
    # Only a user's errors came back: out of memory on one rank left the others waiting for 14 days, and was never said.
    said, served = run_distributed(embed_three_times, 2, failing)
    assert said == [
        f"rank {failing} did not embed its {2 - failing} texts; its log says why",
        "HeldError: out of memory on cuda:0",
    ]
    assert served is None
