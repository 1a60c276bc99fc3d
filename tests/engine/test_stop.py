"""Invariants: a signal that comes by two ways is one, a later one ends the process; after a signal the watchdog is less
patient, but not in the first step, whose length nobody knows."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from anchor.engine.stop import StopRequest, Watchdog, group_timeout


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


def test_the_watchdog_speaks_before_a_collective_times_out() -> None:
    # Both had one limit; NCCL's ends the process without the line that names the step.
    watchdog = Watchdog(100.0, StopRequest())
    watchdog.begin("step 1")
    assert watchdog._overdue(time.monotonic() + group_timeout(100).total_seconds() - 30) == 100.0


def test_a_later_step_has_thirty_seconds() -> None:
    watchdog = watched(steps=1)
    now = time.monotonic()
    assert watchdog._overdue(now) is None
    assert watchdog._overdue(now + 31) == 30.0


def test_a_step_of_many_tokens_has_as_much_more_time() -> None:
    """Regression: after steps of short texts, a long step was ended 30 s after the signal and lost its checkpoint."""
    stop = StopRequest()
    watchdog = Watchdog(1000.0, stop)
    watchdog.begin("step 1", tokens=100)
    assert watchdog._since is not None
    watchdog._since -= 5
    watchdog.begin("step 2", tokens=2000)  # some 100 s
    stop.requested = True
    now = time.monotonic()
    assert watchdog._overdue(now) is None
    assert watchdog._overdue(now + 290) is None
    overdue = watchdog._overdue(now + 310)
    assert overdue is not None
    assert 300 <= overdue < 310


LISTENING = """
import time
from anchor.engine.stop import StopRequest
with StopRequest().listening():
    print(flush=True)
    time.sleep(60)
"""


def test_a_signal_of_a_group_that_the_launcher_passes_on_is_one_and_a_later_one_ends_at_once() -> None:
    """Regression: DeepSpeed's launcher forwarded a signal that its ranks already had, and the checkpoint was lost."""
    command = [sys.executable, "-c", LISTENING]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert told.splitlines() == [
        "SIGTERM: stop after this step, with a checkpoint",
        "SIGTERM again: exit at once, without a checkpoint",
    ]
