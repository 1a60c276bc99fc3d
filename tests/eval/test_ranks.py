"""Invariants: an error of any kind on one rank is raised on rank 0, naming the rank, and leaves no rank waiting; a rank
of the command line that fails says why and ends, whatever the others do."""

import itertools
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import write_jsonl
from distributed import run_distributed

from anchor.encoding.encoder import TextEncoder
from anchor.encoding.ranks import RankedEncoder

ROOT = Path(__file__).parents[2]
# NCCL leaves a process group when all ranks do; gloo does so alone.
PROGRAM = """
import sys, threading, torch.distributed
torch.distributed.destroy_process_group = threading.Event().wait
import eval.__main__
eval.__main__.main(sys.argv[1:])
"""


class HeldError(RuntimeError):
    """Error that pickle cannot send, like some libraries' errors."""

    def __init__(self, device: str) -> None:
        super().__init__(f"out of memory on {device}")
        self.lock = threading.Lock()


class Lengths(TextEncoder):
    """Encoder whose vectors are the lengths of text and prompt; with ``fails`` its second call raises."""

    dimension = 2

    def __init__(self, *, fails: bool) -> None:
        super().__init__(Path("model"), {"prompts": {}, "max_tokens": 8}, "fp32")
        self.fails, self.calls = fails, itertools.count(1)

    def _truncate(self, max_tokens):
        raise AssertionError("no limit is asked for")

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
    # Regression: only user errors came back. Out of memory on one rank left the others waiting 14 days, unreported.
    said, served = run_distributed(embed_three_times, 2, failing)
    assert said == [
        f"rank {failing} did not embed its {2 - failing} texts; its log says why",
        "HeldError: out of memory on cuda:0",
    ]
    assert served is None


def run_two_ranks(*commands: list[str]) -> list[tuple[int, str]]:
    """Run one command line per rank; return each rank's exit code and standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *command],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_a_rank_that_fails_says_why_and_waits_for_no_other(export_dir, tmp_path):
    # It left the process group first, which waits for the other ranks, which wait for it: nothing was ever said.
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"id": "a", "text": "a"}])
    options = ["--output", str(tmp_path / "out")]
    first = ["embed", str(export_dir), "--input", str(texts), *options]
    lacking = ["embed", str(export_dir), "--input", str(tmp_path / "not-on-this-host.jsonl"), *options]
    (code_0, said_0), (code_1, said_1) = run_two_ranks(first, lacking)
    assert code_1 == 2, said_1
    assert said_1.splitlines()[-1].startswith(f"error: {tmp_path / 'not-on-this-host.jsonl'}: ")
    assert "Traceback" not in said_1
    # A rank that the failed one leaves alone is a bug's case: traceback and code 1.
    assert code_0 == 1, said_0
    assert f"rank 0 on {socket.gethostname()} failed; if a collective failed, another rank was first" in said_0
    assert "Traceback" in said_0
