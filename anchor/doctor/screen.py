"""Print the doctor's findings."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from anchor.doctor.collectives import Timing
from anchor.doctor.facts import GIB, Facts
from anchor.doctor.hosts import Agreement


def show_machines(console: Console, facts: Sequence[Facts], ranks: Sequence[int]) -> None:
    """Print a table of facts with one column per host.

    Args:
        console: the console to print to.
        facts: facts of each host.
        ranks: number of processes on each host.
    """
    table = Table(title="machines", title_justify="left", show_header=True)
    table.add_column("")
    for one in facts:
        table.add_column(one.host, overflow="fold")
    rows = {
        "ranks": [str(number) for number in ranks],
        "GPUs": [f"{len(one.gpus)} {', '.join(sorted(set(one.gpus)))}".strip() for one in facts],
        "driver": [one.driver or "none" for one in facts],
        "NCCL / gloo": [f"{one.nccl or 'none'} / {'yes' if one.gloo else 'no'}" for one in facts],
        "torch": [one.versions.get("torch") or "missing" for one in facts],
        "deepspeed": [one.versions.get("deepspeed") or "missing" for one in facts],
        "flash-attn": [one.flash_attn or "not installed" for one in facts],
        "compiled operators": [", ".join(one.built_ops) or "none" for one in facts],
        "own name is": [one.own_address or "not resolved" for one in facts],
        "interfaces": ["\n".join(f"{n} {' '.join(a)}" for n, a in one.addresses.items()) for one in facts],
        "shared memory": [f"{one.shm_bytes / GIB:.1f} GiB" for one in facts],
        "open files": [str(one.open_files) for one in facts],
        "commit": [(one.commit or "none")[:12] for one in facts],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)


def show_timings(console: Console, timings: Sequence[Timing], world_size: int) -> None:
    """Print a table of the collectives' timings by size."""
    table = Table(title=f"collectives over {world_size} ranks", title_justify="left")
    for column in ("collective", "MiB", "ms", "GiB/s out of a rank"):
        table.add_column(column, justify="left" if column == "collective" else "right")
    for one in timings:
        table.add_row(one.name, str(one.size_mib), f"{one.milliseconds:.2f}", f"{one.gib_per_second:.2f}")
    console.print(table)


def show_hosts(console: Console, agreement: Agreement, slots: dict[str, int]) -> None:
    """Print one line per problem of each host, or one line that says the host is ok."""
    for host, found in agreement.problems.items():
        if not found:
            console.print(f"{host}: ok, {slots[host]} ranks", highlight=False, soft_wrap=True)
        for problem in found:
            console.print(f"{host}: {problem}", highlight=False, markup=False, soft_wrap=True)
