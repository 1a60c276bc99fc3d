"""Invariants of ``launch/onenode.sh`` with ranks that only listen for signals: it exits with 0 only if every rank does;
a signal, or two within 2 s, at any moment, gives 85; nothing outlives the script, however it ends; every other exit
code comes with a line."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = """
import sys
from launch import onenode
onenode.GRACE_SECONDS = 1.0
sys.exit(onenode.run_ranks([sys.executable, "-c", *sys.argv[1:]], 2, 29500, onenode.Signals()))
"""
RANK = """
import os, sys, time
from pathlib import Path
from anchor.engine.stop import PARENT_VARIABLE, StopRequest, end_with_parent
rank = int(os.environ["RANK"])
with StopRequest().listening() as stop:
    end_with_parent(os.environ[PARENT_VARIABLE])
    Path(sys.argv[1], f"{rank}.pid").write_text(str(os.getpid()))
    {does}
"""
UNTIL_STOPPED = "while not stop.requested: time.sleep(0.01)\n    time.sleep(1.0)\n    sys.exit(85)"


@contextmanager
def launched(folder: Path, does: str) -> Iterator["subprocess.Popen[str]"]:
    """Start the launcher of two ranks that run ``does`` once they listen for signals."""
    command = [sys.executable, "-c", LAUNCHER, RANK.replace("{does}", does), str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        yield process
        process.wait(60)
    assert not any(alive(folder))


def pids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in sorted(folder.glob("*.pid")) if file.read_text()]


def alive(folder: Path) -> list[int]:
    """Return the process ids of the ranks that still run."""
    return [pid for pid in pids(folder) if Path(f"/proc/{pid}/stat").is_file() and "Z" not in state(pid)]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_is_finished_when_every_rank_says_so(tmp_path: Path) -> None:
    with launched(tmp_path, "pass") as process:
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert len(pids(tmp_path)) == 2


@pytest.mark.parametrize(
    ("does", "code", "line"),
    [
        ("rank and os.kill(os.getpid(), 9); time.sleep(100)", 137, "error: onenode: rank 1 was killed by SIGKILL; all"),
        ("rank or sys.exit(7); time.sleep(100)", 7, "error: onenode: rank 0 exited with 7; all ranks have ended, unf"),
        ("rank and sys.exit('error: x') or time.sleep(100)", 1, "error: x\nerror: onenode: rank 1 exited with 1; all"),
        ("rank and (sys.stderr.write('error: x\\n'), sys.exit(2)); time.sleep(100)", 2, "error: x\n"),
    ],
)
def test_a_rank_that_fails_ends_the_others_and_is_named(tmp_path: Path, does: str, code: int, line: str) -> None:
    with launched(tmp_path, does) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.startswith(line)


@pytest.mark.parametrize("apart", [0.05, 0.3, 0.9])
def test_two_signals_of_one_request_leave_the_checkpoint(tmp_path: Path, apart: float) -> None:
    """Regression: two TERMs within a second gave 1; two more, after 85 was announced, gave 0."""
    with launched(tmp_path, UNTIL_STOPPED) as process:
        until(lambda: len(pids(tmp_path)) == 2)
        for _ in range(4):
            process.send_signal(signal.SIGTERM)
            time.sleep(apart)
        assert process.wait(60) == 85
        assert process.stderr is not None
        assert process.stderr.read().endswith("stopped by a signal; the same command goes on\n")


@pytest.mark.parametrize("after", [0.0, 0.05, 0.1, 0.2, 0.4])
def test_a_signal_while_ranks_start_is_85(tmp_path: Path, after: float) -> None:
    """Regression: it killed ranks that did not listen yet, and DeepSpeed's launcher turned that into 246."""
    with launched(tmp_path, UNTIL_STOPPED) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda: len(children.read_text().split()) == 2)
        time.sleep(after)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 85


def test_a_signal_to_the_whole_group_is_one(tmp_path: Path) -> None:
    with launched(tmp_path, UNTIL_STOPPED) as process:
        until(lambda: len(pids(tmp_path)) == 2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 85


def test_a_later_signal_ends_ranks_that_do_not_stop(tmp_path: Path) -> None:
    with launched(tmp_path, "time.sleep(100)") as process:
        until(lambda: len(pids(tmp_path)) == 2)
        process.send_signal(signal.SIGTERM)
        time.sleep(2.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 137
        assert process.stderr is not None
        assert "was killed by SIGKILL; all ranks have ended, unfinished" in process.stderr.read()


def test_nothing_outlives_a_killed_launcher(tmp_path: Path) -> None:
    """Regression: after `kill -9`, the launcher's processes and the ranks survived and trained on."""
    with launched(tmp_path, "time.sleep(100)") as process:
        until(lambda: len(pids(tmp_path)) == 2)
        process.kill()
        process.wait(60)
        until(lambda: not alive(tmp_path))
    assert len(pids(tmp_path)) == 2
