"""Invariants: a lock that a killed process left in an operator's folder does not stop the next one; processes load one
after another; no run leaves its shared-memory buffers behind."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import run_distributed

from anchor.engine.extensions import extensions_folder, one_at_a_time


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_folder() == tmp_path
    (tmp_path / "operator").mkdir()
    return tmp_path


def test_a_lock_left_behind_is_named_and_removed(folder, caplog):
    """Regression: a process killed while torch loaded the operator left the lock, and later runs waited forever."""
    lock = folder / "operator/lock"
    lock.touch()
    os.utime(lock, (time.time() - 60, time.time() - 60))
    with caplog.at_level(logging.WARNING), one_at_a_time():
        assert not lock.exists()
    assert f"{lock}: left by a killed process; removed" in caplog.text


@pytest.mark.parametrize("ahead", [3, 3600])
def test_a_lock_of_a_clock_that_is_ahead_is_removed_too(folder, caplog, ahead):
    """Regression: the start waited silently until that time had come, and ignored SIGTERM."""
    lock = folder / "operator/lock"
    lock.touch()
    os.utime(lock, (time.time() + ahead, time.time() + ahead))
    start = time.monotonic()
    with caplog.at_level(logging.WARNING), one_at_a_time():
        assert not lock.exists()
    assert time.monotonic() - start < 10
    assert f"{lock}: left by a killed process; removed" in caplog.text


@pytest.mark.parametrize("refusal", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_operators_load_on_a_file_system_without_locks(folder, caplog, monkeypatch, refusal):
    def none(*_):
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(fcntl, "flock", none)
    with one_at_a_time():
        pass
    assert "anchor.flock: the file system has no locks; let no other process write here" in caplog.text


def test_a_holder_that_is_killed_frees_the_others(folder):
    program = (
        "import time\nfrom anchor.engine.extensions import one_at_a_time\n"
        "with one_at_a_time():\n    print(flush=True)\n    time.sleep(600)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=root) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        holder.kill()
    with one_at_a_time():
        pass


def buffers_of(ranks) -> list[str]:
    from anchor import dist
    from anchor.engine.deepspeed import init_communication

    init_communication()
    dist.barrier()
    return [path.name for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29500_*")]  # noqa: S108


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm here")  # noqa: S108
def test_no_shared_memory_is_left_behind():
    """Regression: each run left 66 MiB per rank in /dev/shm until the machine ran out of memory."""
    assert run_distributed(buffers_of, 2) == [[], []]
