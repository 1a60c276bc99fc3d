"""Pure functions that judge facts: what would hang or fail a run, and what is only worth knowing."""

from collections.abc import Mapping, Sequence

from anchor.doctor.facts import GIB, Facts

SKEW_SECONDS = 5.0
"""Largest tolerated clock difference; beyond it, file times and logs of two hosts cannot be compared."""


def blocking(facts: Facts, *, several_hosts: bool, environment: Mapping[str, str]) -> list[str]:
    """Return the problems that would make a run on this machine hang or fail, worst first.

    Each is one line that says what is wrong and what to do.

    Args:
        facts: facts of the machine.
        several_hosts: whether the run spans several hosts.
        environment: environment variables as the ranks will see them.
    """
    found = [
        f"{lock} is {age:.0f} s old: a compilation was killed, or is still going on; while the file is there every "
        "run waits for it without a word; if nothing is compiling, delete it"
        for lock, age in facts.locks.items()
    ]
    if several_hosts and "GLOO_SOCKET_IFNAME" not in environment:
        if facts.own_address is None:
            found.append(
                f"the name {facts.host} does not resolve here, so other hosts are told no address; "
                "put it into /etc/hosts or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            )
        elif facts.own_address.startswith("127."):
            found.append(
                f"the name {facts.host} resolves to {facts.own_address}, which is what other hosts are told, and they "
                "wait for ever; put its real address into /etc/hosts or set GLOO_SOCKET_IFNAME and "
                f"NCCL_SOCKET_IFNAME to one of {', '.join(_outside(facts)) or 'its interfaces'}"
            )
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = environment.get(name)
        if value is not None and not _interface_exists(value, facts, prefixes=name.startswith("NCCL")):
            found.append(f"{name} is {value}, this machine has {', '.join(sorted(facts.addresses))}; correct it")
    if facts.listed_gpus and not facts.gpus and environment.get("DS_ACCELERATOR", "cuda") == "cuda":
        found.append(
            f"the driver ({facts.driver}) lists {facts.listed_gpus} GPUs, torch {facts.versions.get('torch')} can use "
            "none; install the torch build for this driver"
        )
    if len(facts.gpus) > 1 and facts.shm_bytes < GIB:
        found.append(
            f"shared memory (/dev/shm) has {facts.shm_bytes / GIB:.2f} GiB; NCCL between {len(facts.gpus)} "
            "GPUs wants 1 GiB or more; "
            "start the container with --shm-size=8g or --ipc=host"
        )
    if not facts.gloo and not facts.gpus:
        found.append("torch has neither gloo nor a GPU here, so ranks cannot talk; install the official torch build")
    missing = sorted(name for name, version in facts.versions.items() if version is None)
    if missing:
        found.append(f"not installed: {', '.join(missing)}; run `bash launch/setup.sh`")
    return found


def notes(facts: Facts, *, several_hosts: bool) -> list[str]:
    """Return facts worth knowing that do not stop a run."""
    found = []
    if not several_hosts and (facts.own_address or "127.").startswith("127."):
        found.append(
            f"the name {facts.host} resolves to {facts.own_address}; harmless on one machine, "
            "with several set GLOO_SOCKET_IFNAME"
        )
    if facts.flash_attn is not None and facts.flash_attn.startswith("cannot"):
        found.append(f"flash_attn {facts.flash_attn}; build it again for this torch, or use backbone.attention=varlen")
    if facts.open_files < 4096:
        found.append(f"{facts.open_files} open files at most; with many ranks `ulimit -n 65536` before the launch")
    if "deepspeed_shm_comm" not in facts.built_ops and not facts.gpus:
        found.append("DeepSpeed's CPU kernel is not compiled yet; the first run takes half a minute for it")
    return found


def differences(host: Facts, reference: Facts) -> list[str]:
    """Return how a host differs from the launching machine where the two must match; one line each."""
    found = []
    if host.commit != reference.commit:
        found.append(f"commit is {_short(host.commit)}, expected {_short(reference.commit)}; check the same one out")
    elif host.code_sha256 != reference.code_sha256:
        found.append("files differ from the launching machine's at the same commit; copy or commit the changes")
    if host.python != reference.python:
        found.append(f"Python is {host.python}, expected {reference.python}; make .venv with the same interpreter")
    wrong = [
        f"{name} is {host.versions.get(name) or 'missing'}, expected {version or 'missing'}"
        for name, version in reference.versions.items()
        if host.versions.get(name) != version
    ]
    if wrong:
        found.append(f"{'; '.join(wrong)}; run `bash launch/setup.sh` there")
    return found


def skew(host_seconds: float, before: float, after: float) -> str | None:
    """Describe the error of a host's clock, read between two readings of ours; None if it is tolerable."""
    off = max(before - host_seconds, host_seconds - after, 0.0)
    return f"clock is {off:.0f} s off; set it by NTP" if off > SKEW_SECONDS else None


def _outside(facts: Facts) -> Sequence[str]:
    return sorted(n for n, found in facts.addresses.items() if not all(a.startswith("127.") for a in found))


def _interface_exists(value: str, facts: Facts, *, prefixes: bool) -> bool:
    """Return whether this machine has an interface that the variable's value names.

    NCCL takes a list of prefixes, after `=` a list of exact names, and after `^` a list to exclude. gloo takes exact
    names only.
    """
    if prefixes and value.startswith("^"):
        return True
    exact = not prefixes or value.startswith("=")
    wanted = value.removeprefix("=").split(",")
    return any(name == one or (not exact and name.startswith(one)) for name in facts.addresses for one in wanted)


def _short(commit: str | None) -> str:
    return "none (no git checkout)" if commit is None else commit[:12]
