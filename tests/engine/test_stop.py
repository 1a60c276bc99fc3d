"""Invariants: after a signal the watchdog is less patient, but not in the first step, whose length nobody knows."""

import time

from anchor.engine.stop import StopRequest, Watchdog


def watched(*, steps: int) -> Watchdog:
    stop = StopRequest()
    stop.requested = True
    watchdog = Watchdog(100.0, stop)
    for step in range(steps + 1):
        watchdog.begin(f"step {step + 1}")
    return watchdog


def test_the_first_step_after_a_start_has_the_whole_time_limit() -> None:
    watchdog = watched(steps=0)
    now = time.monotonic()
    assert watchdog._overdue(now) is None
    assert watchdog._overdue(now + 99) is None
    assert watchdog._overdue(now + 101) == 100.0


def test_a_later_step_has_thirty_seconds() -> None:
    watchdog = watched(steps=1)
    now = time.monotonic()
    assert watchdog._overdue(now) is None
    assert watchdog._overdue(now + 31) == 30.0
