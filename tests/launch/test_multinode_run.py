"""Invariants of ``launch/multinode.sh`` with ranks on this machine, by a pdsh that runs commands here: a killed
launcher is no success and leaves no ranks; two signals of one request are 85, as is one while the ranks start."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 240.0
PDSH = r"""#!/usr/bin/env bash
while [ $# -gt 0 ]; do
  case $1 in -S) shift ;; -f | -w) shift 2 ;; *) break ;; esac
done
command=${*//%%/$'\1'}
command=${command//%n/0}
bash -c "${command//$'\1'/%}"
"""


@pytest.fixture
def recipe(tmp_path, tiny_model_dir, make_shards) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "output_dir": str(tmp_path / "run"),
                "seed": 0,
                "data": {"shards": str(make_shards(pairs=16, pack_multiple=2, pack_tokens=1024, num_rows=80))},
                "backbone": {"path": str(tiny_model_dir), "trained": {"kind": "full"}, "attention": "segments"},
                "objective": {"kind": "contrastive", "temperature": 0.1},
                "optim": {"lr": 1e-3, "warmup_steps": 1, "total_steps": 2000},
                "engine": {"deepspeed": "ds_configs/zero3.json", "dtype": "fp32"},
            }
        )
    )
    return path


@contextmanager
def launched(recipe: Path, *overrides: str) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """Run the script with two ranks on this host; yield it and its output."""
    folder = recipe.parent
    (folder / "bin").mkdir()
    (folder / "bin/pdsh").write_text(PDSH)
    (folder / "bin/pdsh").chmod(0o755)
    (folder / "hostfile").write_text("localhost slots=2\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["launch/multinode.sh", "--hostfile", str(folder / "hostfile"), "--no-check", "--interface", "lo"]
    command += ["--master-addr", "127.0.0.1", "--master-port", port, str(recipe), *overrides]
    environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    environment |= {"OMP_NUM_THREADS": "1"}
    out = folder / "out"
    with (
        out.open("wb") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        ) as process,
    ):
        yield process, out
        process.wait(PATIENCE_SECONDS)
    until(lambda: processes(recipe) == [], out)


def processes(recipe: Path, what: str = "") -> list[int]:
    """Return the processes of a run."""
    done = subprocess.run(["pgrep", "-f", f"{what}.*{recipe}"], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


def ranks(recipe: Path) -> list[int]:
    return processes(recipe, "python -u -m anchor.train")


def steps(recipe: Path) -> int:
    path = recipe.parent / "run/metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def until(condition: Callable[[], bool], out: Path) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, out.read_text()
        time.sleep(0.01)


def test_a_run_that_finishes_is_0(recipe):
    with launched(recipe, "optim.total_steps=2") as (process, out):
        assert process.wait(PATIENCE_SECONDS) == 0, out.read_text()
    assert (recipe.parent / "run/export/anchor.json").is_file()
    assert not list(Path("/tmp").glob(f"anchor-finished-*-{process.pid}-*"))  # noqa: S108


@pytest.mark.parametrize("what", ["deepspeed.launcher.launch", "/bin/deepspeed"])
def test_a_killed_launcher_is_no_success_and_leaves_no_ranks(recipe, what):
    """Regression: the run was reported as finished while its ranks trained on."""
    with launched(recipe) as (process, out):
        until(lambda: steps(recipe) > 2, out)
        python = [pid for pid in processes(recipe, what) if "python" in Path(f"/proc/{pid}/exe").readlink().name]
        for pid in python:
            os.kill(pid, signal.SIGKILL)
        assert python
        assert process.wait(60) not in (0, 85), out.read_text()
    assert "error: multinode: " in out.read_text()


@pytest.mark.parametrize("apart", [0.05, 0.9])
def test_two_signals_of_one_request_leave_a_checkpoint(recipe, apart):
    with launched(recipe) as (process, out):
        until(lambda: steps(recipe) > 2, out)
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(apart)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 85, out.read_text()
    assert "stopped by a signal; the same command goes on" in out.read_text()
    assert list((recipe.parent / "run/checkpoints").glob("step-*"))


@pytest.mark.parametrize("when", ["launcher", "ranks"])
def test_a_signal_while_the_ranks_start_is_85(recipe, when):
    with launched(recipe) as (process, out):
        until(lambda: bool(processes(recipe, "launcher.launch") if when == "launcher" else ranks(recipe)), out)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 85, out.read_text()
