"""Stop a run from outside: a signal stops all ranks at the same step, and a watchdog ends a stuck process.

1. SIGTERM or SIGUSR1 on any rank sets a flag. It travels with the step's own reduction, so all ranks learn of it in the
   same step. They finish that step, write a checkpoint and exit with :data:`EXIT_REQUEUE`. Before the ranks have
   joined, nothing can be lost, so the process exits with that code at once. A thread receives the signals: the main
   thread may be inside a collective, where Python runs no handler.
2. A second signal ends the process at once. Within 2 s of the first it counts as the same signal: ``timeout`` signals a
   process group, so the signal reaches a rank directly and again through DeepSpeed's launcher.
3. The watchdog knows when a step, a checkpoint or an export began. One that lasts longer than
   ``engine.timeout_seconds`` is stuck (a rank is gone, a collective hangs, a disk does not answer). The watchdog then
   names the step, writes the stacks of all threads to the rank's log and ends the process. After a signal it is less
   patient, because the sender will kill a process that does not stop. Collectives get a minute more: NCCL's own
   time-out kills the process before Python can log anything.
"""

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import TextIOBase
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

EXIT_REQUEUE = 85
"""Exit code of a run that stopped at a signal with a checkpoint: start it again to resume."""
EXIT_STUCK = 70
"""Exit code of a process that its watchdog ended."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_SIGNAL_SECONDS = 2.0
PARENT_VARIABLE = "ANCHOR_END_WITH_PARENT"
"""Environment variable of a rank that must not outlive the process that started it: that process's id, or `yes`."""
PROOF_VARIABLE = "ANCHOR_FINISHED_FILE"
"""Environment variable with the path, on rank 0's host, of an empty file that rank 0 creates when the run is finished.
"""

_PR_SET_PDEATHSIG = 1
_GROUP_MARGIN_SECONDS = 60
_LEAST_PATIENCE_SECONDS = 30.0
_SLOWEST_STEPS = 3


def group_timeout(timeout_seconds: int) -> timedelta:
    """Return the time-out of a run's process groups: later than the watchdog's, whose message names the step."""
    return timedelta(seconds=timeout_seconds + _GROUP_MARGIN_SECONDS)


def end_with_parent(parent: str | None) -> None:
    """Have the kernel kill this process when the one that started it dies, even by SIGKILL.

    Args:
        parent: value of :data:`PARENT_VARIABLE`; None for a process that may outlive its parent.
    """
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent.isdecimal() and os.getppid() != int(parent):  # the parent has died already
        os.write(2, b"the process that started this rank has died; exit\n")
        os._exit(128 + signal.SIGKILL)


def prove_finished(file: str | None) -> None:
    """Create the file of :data:`PROOF_VARIABLE`, if it is set: a launcher may turn a death into exit code 0."""
    if file is not None:
        Path(file).touch()


class StopRequest:
    """Record of whether a signal asked this process to stop.

    Attributes:
        requested: True once a signal has asked.
        nothing_to_lose: True while no training has begun; a signal then ends the process at once.
    """

    def __init__(self) -> None:
        self.requested, self.nothing_to_lose = False, False
        self._since = 0.0

    def _receive(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.nothing_to_lose:
            os.write(2, f"{name}: nothing is trained yet; start the same command again\n".encode())
            os._exit(EXIT_REQUEUE)
        if self.requested and time.monotonic() - self._since < SAME_SIGNAL_SECONDS:
            return
        if self.requested:
            os.write(2, f"{name} again: exit at once, without a checkpoint\n".encode())
            os._exit(128 + number)
        self.requested, self._since = True, time.monotonic()
        os.write(2, f"{name}: stop after this step, with a checkpoint\n".encode())

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Receive the signals inside the context, then restore the earlier handlers."""
        received, sent = os.pipe()
        os.set_blocking(sent, False)
        thread = threading.Thread(target=self._listen, args=(received,), name="signals", daemon=True)
        thread.start()
        wakeup = signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
        before = {number: signal.signal(number, _left_to_the_thread) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(sent)
            thread.join()
            os.close(received)

    def _listen(self, received: int) -> None:
        while number := os.read(received, 1):
            if number[0] in STOP_SIGNALS:
                self._receive(number[0])


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: a signal without a handler would end the process."""


class Watchdog:
    """Thread that ends the process when its current work lasts too long; it looks every second.

    Args:
        timeout_seconds: longest time that a step, a checkpoint or an export may take.
        stop: once it has a signal, a step may take 30 s, or three times as long as the slowest step so far would for as
            many tokens, whichever is more, but no longer than the time-out. The first step, whose length is unknown,
            may use the whole time-out.
        stacks: where the stacks of all threads go; standard error when None.
    """

    def __init__(self, timeout_seconds: float, stop: StopRequest, stacks: TextIOBase | None = None) -> None:
        self.timeout_seconds, self.stop, self._stacks = timeout_seconds, stop, stacks
        self.doing = "starting"
        self._since: float | None = None
        self._stopping_since: float | None = None
        self._tokens = 1
        self._most_seconds_per_token = 0.0
        self._done = threading.Event()

    def begin(self, doing: str, tokens: int = 1) -> None:
        """Start the clock for work that must end within the time limit; the previous work is over.

        Args:
            doing: name of the work in the log; a step's begins with "step ".
            tokens: tokens of a step, because batches of one source are short and of another long.
        """
        self.end()
        self.doing, self._tokens, self._since = doing, tokens, time.monotonic()

    def end(self) -> None:
        """Stop watching until the next :meth:`begin`."""
        if self._since is not None and self.doing.startswith("step "):
            seconds_per_token = (time.monotonic() - self._since) / self._tokens
            self._most_seconds_per_token = max(self._most_seconds_per_token, seconds_per_token)
        self._since = None

    @contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch inside the context; add rank, host and current work as a note to an error that passes."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            passing = sys.exception()
            if passing is not None:
                passing.add_note(f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}, {self.doing}")
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            overdue = self._overdue(time.monotonic())
            if overdue is not None:
                self._bark(overdue)

    def _overdue(self, now: float) -> float | None:
        """Return the time limit in seconds that the current work has exceeded, or None while it is in time."""
        since = self._since
        if since is None:
            return None
        limit = self.timeout_seconds
        if self.stop.requested and self.doing.startswith("step "):
            self._stopping_since = self._stopping_since or now
            since = max(since, self._stopping_since)
            if self._most_seconds_per_token > 0.0:
                slow = _SLOWEST_STEPS * self._most_seconds_per_token * self._tokens
                limit = min(limit, max(_LEAST_PATIENCE_SECONDS, slow))
        return limit if now - since > limit else None

    def _bark(self, limit: float) -> None:
        log.critical(
            "rank %s on %s: %s has not ended after %.0f s: another rank is gone or stuck, or a disk does not answer; "
            "the stacks of this process are in its log; exit",
            os.environ.get("RANK", "0"),
            socket.gethostname(),
            self.doing,
            limit,
        )
        faulthandler.dump_traceback(self._stacks or sys.stderr, all_threads=True)
        logging.shutdown()
        os._exit(EXIT_STUCK)
