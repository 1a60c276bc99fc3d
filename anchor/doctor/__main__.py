"""``python -m anchor.doctor``: find what would hang a run here, on a launcher's ranks, or on a hostfile's hosts.

Exit codes: 0, no problem found; 1, a problem, named in the last line; 2, a user error such as a wrong command line.
"""

import argparse
import os
import sys
import threading
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from anchor import log
from anchor.arguments import positive
from anchor.errors import ConfigError, exit_on_user_error, first_line, shortened

_EXAMPLE = """examples:
  python -m anchor.doctor
  deepspeed --num_gpus 8 --module anchor.doctor
  srun --nodes 2 --ntasks-per-node 8 bash launch/slurm/rank.sh python -m anchor.doctor
  python -m anchor.doctor --hostfile launch/hostfile.example launch/recipes/quickstart/stage1.yaml
"""
_JOIN_SECONDS = 60
_GROUP_SECONDS = _JOIN_SECONDS + 60
EXIT_PROBLEM = 1


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m anchor.doctor",
        description="Say what would make a run hang or fail, before it does.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", default="1,16,64", metavar="MIB,...", help="sizes of timed collectives (1,16,64)")
    parser.add_argument("--hostfile", type=Path, help="examine these hosts by ssh, for a run of RECIPE")
    parser.add_argument("--master-port", type=int, default=29500, help="with --hostfile: rendezvous port (29500)")
    parser.add_argument("--report", help=argparse.SUPPRESS)  # --hostfile runs this on every host, with all hosts' names
    parser.add_argument("--position", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the DeepSpeed launcher
    parser.add_argument("recipe", nargs="?", help="training recipe, with --hostfile")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace a value of the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the doctor."""
    arguments = _arguments(argv)
    log.setup()
    with exit_on_user_error():
        if arguments.report is not None:
            _report(arguments)
        elif arguments.hostfile is not None:
            _examine_hosts(arguments)
        else:
            _examine_ranks([_size(word) for word in arguments.sizes.split(",")])


def _size(word: str) -> int:
    try:
        return positive(word)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(
            f"--sizes: expected whole numbers of MiB separated by commas, got {shortened(word)}"
        ) from error


def _report(arguments: argparse.Namespace) -> None:
    from anchor.doctor.hosts import report_of_this_host, to_json

    hosts, one = arguments.report.split(","), arguments
    report = report_of_this_host(hosts, one.position, one.master_port, one.ranks, one.recipe, one.overrides)
    sys.stdout.write(to_json(report) + "\n")


def _examine_hosts(arguments: argparse.Namespace) -> None:
    """Examine the hosts, and print ``ADDRESS INTERFACE`` on stdout for launch/multinode.sh; `-` if they disagree."""
    from anchor.doctor.hosts import examine, read_hostfile
    from anchor.doctor.screen import show_hosts

    if arguments.recipe is None:
        raise ConfigError("--hostfile: no recipe; say what is to run: --hostfile FILE RECIPE [section.key=value ...]")
    hosts = read_hostfile(arguments.hostfile)
    agreement = examine(hosts, arguments.master_port, arguments.recipe, arguments.overrides, dict(os.environ))
    show_hosts(Console(stderr=True), agreement, hosts)
    broken = [host for host, found in agreement.problems.items() if found]
    if broken:
        sys.stderr.write(f"{len(broken)} of {len(hosts)} hosts cannot run this: {', '.join(broken)}\n")
        sys.exit(EXIT_PROBLEM)
    sys.stdout.write(f"{agreement.master_address or '-'} {agreement.interface or '-'}\n")


def _examine_ranks(sizes_mib: list[int]) -> None:
    from anchor import dist
    from anchor.doctor.facts import gather_facts
    from anchor.doctor.judge import blocking, notes

    dist.set_rendezvous()
    world_size, local = int(os.environ["WORLD_SIZE"]), _local_size()
    several = world_size > local
    facts = gather_facts()
    found = blocking(facts, several_hosts=several, environment=os.environ)
    console = Console(stderr=False, width=None if sys.stdout.isatty() else 120)
    if world_size == 1:
        from anchor.doctor.screen import show_machines

        show_machines(console, [facts], [1])
        _say(notes(facts, several_hosts=False), "note")
    elif not found:
        # A known problem could make joining hang, so join only if there is none.
        found = _measure(console, facts, sizes_mib)
    _say(found[::-1], "problem")
    sys.exit(EXIT_PROBLEM if found else 0)


def _measure(console: Console, facts: object, sizes_mib: list[int]) -> list[str]:
    """Join the process group, show all hosts and the timings on rank 0, and return what went wrong."""
    import torch.distributed

    from anchor import dist
    from anchor.doctor.collectives import time_collectives
    from anchor.doctor.screen import show_machines, show_timings

    deadline = _Deadline()
    try:
        ranks = dist.init(timeout=timedelta(seconds=_JOIN_SECONDS))
        dist.set_timeout(timedelta(seconds=_GROUP_SECONDS))
        deadline.begin(_did_not_meet("the first collective has not ended"))
        everyone = dist.gather_objects(facts)
        timings = time_collectives(ranks, sizes_mib, begin=lambda what: deadline.begin(_did_not_end(what)))
    except (ConfigError, torch.distributed.DistError, RuntimeError) as error:
        return [_did_not_meet(first_line(error))]
    finally:
        deadline.end()
    if ranks.rank == 0:
        hosts = {one.host: one for one in everyone}
        show_machines(console, list(hosts.values()), [sum(o.host == host for o in everyone) for host in hosts])
        show_timings(console, timings, ranks.world_size)
    dist.barrier()
    dist.shutdown()
    return []


class _Deadline:
    """Timer that reports a problem and ends the process if a collective hangs; NCCL raises no Python exception.

    NCCL itself ends the process only at the group's later timeout, and its message says nothing about the ranks.
    """

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def begin(self, problem: str) -> None:
        """Restart the timer, with a new problem to report when it expires."""
        self.end()
        self._timer = threading.Timer(_JOIN_SECONDS, self._pass, [problem])
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _pass(self, problem: str) -> None:
        from anchor import dist

        _say([problem], "problem")
        dist.leave(EXIT_PROBLEM)


def _did_not_meet(why: str) -> str:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return (
        f"rank {os.environ['RANK']}: the ranks did not meet at {where} within {_JOIN_SECONDS} s ({why}); is every rank "
        "started, is the address rank 0's, is the port open?"
    )


def _did_not_end(what: str) -> str:
    return (
        f"rank {os.environ['RANK']}: {what} did not end within {_JOIN_SECONDS} s, though the ranks had met; is a rank "
        "gone, is the network that they use (NCCL_SOCKET_IFNAME, NCCL_IB_HCA) open to all? NCCL_DEBUG=INFO says more"
    )


def _local_size() -> int:
    """Return the number of ranks on this host, under any supported launcher."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun, deepspeed
        if name in os.environ:
            return int(os.environ[name])
    if int(os.environ["WORLD_SIZE"]) > 1 and "SLURM_STEP_NUM_NODES" in os.environ:
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["SLURM_STEP_NUM_NODES"])
    return int(os.environ["WORLD_SIZE"])


def _say(lines: list[str], kind: str) -> None:
    for line in lines:
        sys.stderr.write(f"{kind}: {line}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
