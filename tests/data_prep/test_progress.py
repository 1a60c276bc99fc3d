"""Invariants: items pass unchanged; a log file gets one plain line now and then, and nothing goes to stdout."""

import logging

import pytest

from data_prep import progress
from data_prep.progress import tracked


@pytest.mark.parametrize(("total", "of"), [(3, " of 3"), (None, "")])
def test_away_from_a_terminal_plain_lines_tell_the_count(
    total: int | None,
    of: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.0)
    caplog.set_level(logging.INFO, logger="data_prep.progress")
    assert list(tracked("abc", "packing", total)) == ["a", "b", "c"]
    assert caplog.messages == [f"packing: {i}{of}" for i in (1, 2, 3)]
    assert capsys.readouterr().out == ""


def test_short_work_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="data_prep.progress")
    assert list(tracked([1, 2], "packing", 2)) == [1, 2]
    assert caplog.messages == []
