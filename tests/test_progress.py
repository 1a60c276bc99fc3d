"""Invariants: items pass unchanged; a log file gets one plain line now and then, and nothing goes to stdout."""

import logging
import re

import pytest

from anchor import progress
from anchor.progress import tracked


@pytest.mark.parametrize(("total", "of"), [(3, " of 3"), (None, "")])
def test_away_from_a_terminal_plain_lines_tell_the_count(
    total: int | None,
    of: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.0)
    caplog.set_level(logging.INFO, logger="anchor.progress")
    assert list(tracked("abc", "packing", total, unit=" MB")) == ["a", "b", "c"]
    assert len(caplog.messages) == 3
    for i, message in enumerate(caplog.messages, start=1):
        left = r", \d:\d\d:\d\d left" if total is not None else ""
        assert re.fullmatch(rf"packing: {i}{of} MB, [\d,.]+ MB/s{left}", message)
    assert capsys.readouterr().out == ""


def test_short_work_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="anchor.progress")
    assert list(tracked([1, 2], "packing", 2)) == [1, 2]
    assert caplog.messages == []


def test_the_remaining_time_follows_the_amounts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.0)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    caplog.set_level(logging.INFO, logger="anchor.progress")
    assert list(tracked([10, 30], "reading", 100, unit=" MiB", amount=float)) == [10, 30]
    assert caplog.messages == [
        "reading: 10 of 100 MiB, 1.0 MiB/s, 0:01:30 left",
        "reading: 40 of 100 MiB, 2.0 MiB/s, 0:00:30 left",
    ]
