"""Start and end the ranks of one training run on this machine together; ``launch/onenode.sh`` calls this.

1. Start one process per rank, each in its own process group, so that Ctrl-C reaches only this process. A rank dies
   with this process, however it dies.
2. Pass the first signal on to all ranks as SIGUSR1: they write a checkpoint and exit with 85. A rank killed by it
   was not listening yet, so nothing is lost. Signals within the next 2 s count as the same one; a later one kills the
   ranks.
3. When a rank fails, give the others 10 s to end and say why, then kill them.
4. Exit with 0 only if every rank exited with 0.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from anchor.engine.stop import EXIT_REQUEUE, PARENT_VARIABLE, SAME_SIGNAL_SECONDS
from anchor.errors import EXIT_USER_ERROR

ROOT = Path(__file__).parents[1]
GRACE_SECONDS = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_POLL_SECONDS = 0.05
_COUNT = "import torch; from anchor import dist; print(torch.cuda.device_count() if dist.on_cuda() else 1)"


class Signals:
    """Signals that this process received.

    Attributes:
        asked: a signal came: all ranks should stop with a checkpoint.
        impatient: another one came later: all ranks should end at once.
    """

    def __init__(self) -> None:
        self.asked, self.impatient = False, False
        self._since = 0.0
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup or in a background job
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
            _say("asking all ranks for a checkpoint; a signal later than 2 s ends them at once")
        elif time.monotonic() - self._since > SAME_SIGNAL_SECONDS:
            self.impatient = True


def run_ranks(command: Sequence[str], num_ranks: int, port: int, signals: Signals) -> int:
    """Start a process per rank and wait for them.

    Args:
        command: command line of a rank.
        num_ranks: number of ranks.
        port: port of the rendezvous.
        signals: signals that this process has received and will receive.

    Returns:
        The exit code of the run.
    """
    ranks = [_start(command, rank, num_ranks, port) for rank in range(num_ranks)]
    told, deadline, first_failed = False, float("inf"), None
    while any(rank.poll() is None for rank in ranks):
        time.sleep(_POLL_SECONDS)
        if signals.asked and not told:
            told = True
            for rank in ranks:
                rank.send_signal(signal.SIGUSR1)
        failed = [number for number, rank in enumerate(ranks) if rank.poll() not in (None, 0)]
        if failed and first_failed is None:
            first_failed, deadline = failed[0], time.monotonic() + GRACE_SECONDS
        unheard = any(rank.returncode == -signal.SIGUSR1 for rank in ranks)
        if unheard or signals.impatient or time.monotonic() > deadline:
            for rank in ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGKILL)
    return _verdict([rank.returncode for rank in ranks], first_failed or 0)


def _start(command: Sequence[str], rank: int, num_ranks: int, port: int) -> subprocess.Popen[bytes]:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_SIZE": num_ranks}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONUNBUFFERED": 1, PARENT_VARIABLE: os.getpid()}
    return subprocess.Popen(
        command,
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdin=subprocess.DEVNULL,
        process_group=0,
    )


def _verdict(codes: list[int], first_failed: int) -> int:
    """Return the exit code of the run. Unless it is 0, a rank or this function explains it on standard error."""
    if not any(codes):
        return 0
    if EXIT_REQUEUE in codes or -signal.SIGUSR1 in codes:
        _say("stopped by a signal; the same command goes on")
        return EXIT_REQUEUE
    if EXIT_USER_ERROR in codes:
        return EXIT_USER_ERROR
    code = codes[first_failed]
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    _say(f"error: onenode: rank {first_failed} {how}; all ranks have ended, unfinished")
    return 128 - code if code < 0 else code


def _say(line: str) -> None:
    os.write(2, f"{line}\n".encode())


def _count_ranks() -> int:
    """Return the number of visible GPUs, or 1 without any."""
    done = subprocess.run([sys.executable, "-c", _COUNT], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def main(port: str, ranks: str, *arguments: str) -> int:
    """Run the entry point: port of the rendezvous, number of ranks or an empty string, arguments of the training."""
    signals = Signals()
    num_ranks = int(ranks) if ranks else _count_ranks()
    if signals.asked:
        return _verdict([EXIT_REQUEUE], 0)
    return run_ranks([sys.executable, "-m", "anchor.train", *arguments], num_ranks, int(port), signals)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
