"""Invariants: one process holds a lock at a time and leaves no file; a file system without locks is warned of."""

import errno
import fcntl
import logging
import os
import threading
from pathlib import Path

import pytest

from anchor.errors import DataError
from anchor.locks import locked, take, wait_for


def test_a_lock_is_held_by_one_and_leaves_no_file(tmp_path: Path) -> None:
    file = tmp_path / "x.lock"
    for _ in range(2):
        with locked(file, "busy"):
            with pytest.raises(DataError, match=r"^busy$"), locked(file, "busy"):
                pass
            assert file.is_file()
        assert not file.exists()
    file.touch()  # a killed process leaves the file, not the lock
    with locked(file, "busy"):
        pass


def test_a_lock_whose_file_was_removed_meanwhile_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, flock = tmp_path / "x.lock", fcntl.flock

    def late(lock: int, how: int) -> None:
        file.unlink()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(DataError, match=r"^busy$"), locked(file, "busy"):
        pass


def test_who_waits_for_a_lock_says_so_and_gets_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "x.lock"
    file.touch()
    with file.open("a") as held, file.open("a") as mine, caplog.at_level(logging.INFO):
        wait_for(held, file, "waiting for it")
        assert caplog.messages == []
        threading.Timer(0.2, lambda: fcntl.flock(held, fcntl.LOCK_UN)).start()
        wait_for(mine, file, "waiting for it")
        assert caplog.messages == [f"{file}: waiting for it"]
        assert not take(held, file)


@pytest.mark.parametrize("refusal", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("waits", [False, True])
def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refusal: int, waits: bool
) -> None:
    def none(*_: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(fcntl, "flock", none)
    if waits:
        with (tmp_path / "x.lock").open("a") as lock:
            wait_for(lock, tmp_path / "x.lock", "waiting")
    else:
        with locked(tmp_path / "x.lock", "busy"):
            pass
    assert caplog.messages == [f"{tmp_path}/x.lock: the file system has no locks; let no other process write here"]
