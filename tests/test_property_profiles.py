"""Invariants: the default run draws the same examples each time, and `.ci/run` draws new ones."""

from pathlib import Path

from hypothesis import settings


def test_chance_stops_nobody_but_the_run_that_decides_whether_a_change_lands() -> None:
    """Regression: a newcomer's first `bash launch/test.sh` failed on a real fault that examples missed for weeks."""
    assert settings.get_profile("anchor").derandomize
    assert not settings.get_profile("random").derandomize
    ci = (Path(__file__).parents[1] / ".ci" / "run").read_text(encoding="utf-8")
    assert "--hypothesis-profile=random" in ci
