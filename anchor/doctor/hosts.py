"""Check before a run that a hostfile's hosts are reachable, match each other, and have all that the recipe names.

1. Ask all hosts in parallel for their facts, by ssh. Each must have the same program at the same path.
2. Compare the facts with the launching machine and with the hostfile's slots.
3. Return what all hosts agree on: the first host's address and the network interface that reaches it.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchor.config.load import load_recipe
from anchor.config.model_path import resolve_model_path
from anchor.config.train_recipe import TrainRecipe
from anchor.data.index import read_index
from anchor.doctor.facts import GIB, ROOT, Facts, gather_facts, interface_towards, resolve
from anchor.doctor.judge import blocking, differences, skew
from anchor.dry_run.report import Options, dry_run
from anchor.errors import AnchorError, ConfigError, ModelError, shortened

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class HostReport:
    """A host's report about itself.

    Attributes:
        facts: the host's facts as JSON, see :class:`anchor.doctor.facts.Facts`.
        first_host_address: address that the first host's name resolves to on this host.
        interface: network interface that reaches the first host; on the first host, the one that reaches the second.
        port_free: whether the rendezvous port can be bound; checked on the first host only.
        recipe_problems: problems with the recipe here, such as missing shards, model or disk space.
    """

    facts: dict[str, Any]
    first_host_address: str | None
    interface: str | None
    port_free: bool
    recipe_problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Settings that all hosts agree on, and problems by host.

    Attributes:
        problems: host -> its problems; the list is empty for a host without problems.
        master_address: address of the first host, as the others resolve it; None if they disagree.
        interface: name of the network interface; None unless it is the same on all hosts.
    """

    problems: dict[str, list[str]]
    master_address: str | None
    interface: str | None


def read_hostfile(path: Path) -> dict[str, int]:
    """Read a hostfile; return slots by host, in rank order.

    Raises:
        ConfigError: the file is missing or not UTF-8, a line is not `HOST slots=N`, a host appears twice, or there is
            no host.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such hostfile; write one line `HOST slots=GPUS` per host")
    hosts: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: byte {error.start + 1} is 0x{error.object[error.start]:02x}") from error
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        # ssh would read a host that begins with a dash as an option.
        match = re.fullmatch(r"([^\s-]\S*)\s+slots\s*=\s*([1-9]\d{0,5})", text)
        if match is None:
            raise ConfigError(f"{path}:{number}: expected `HOST slots=GPUS`, got {shortened(text)}")
        if match[1] in hosts:
            raise ConfigError(f"{path}:{number}: host '{match[1]}' is given twice; keep one line")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"{path}: names no host; write one line `HOST slots=GPUS` per host")
    return hosts


def report_of_this_host(
    hosts: Sequence[str], position: int, port: int, num_ranks: int, recipe: str, overrides: Sequence[str]
) -> HostReport:
    """Build the report of the host that runs this.

    Args:
        hosts: names of all hosts, in order.
        position: index of this host in ``hosts``.
        port: rendezvous port.
        num_ranks: number of ranks in the whole run.
        recipe: path of the training recipe.
        overrides: overrides of the recipe, ``section.key=value``.
    """
    address = resolve(hosts[0])
    peer = address if position else (resolve(hosts[1]) if len(hosts) > 1 else address)
    return HostReport(
        facts=gather_facts().to_json(),
        first_host_address=address,
        interface=None if peer is None else interface_towards(peer),
        port_free=position > 0 or _port_free(port),
        recipe_problems=tuple(_recipe_problems(recipe, overrides, num_ranks)),
    )


def _port_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _recipe_problems(path: str, overrides: Sequence[str], num_ranks: int) -> list[str]:
    """Return the problems of a dry run of the recipe on this machine, unreadable files and lack of disk space."""
    try:
        recipe = load_recipe(path, TrainRecipe, overrides)
        disk = dry_run(recipe, path, Options(num_ranks=num_ranks))["disk"]
        files = [recipe.data.shards / shard["file"] for shard in read_index(recipe.data.shards).shards]
        files += _weights(recipe.backbone.path)
    except AnchorError as error:
        return [str(error)]
    found = []
    lacking = [str(file) for file in files if not os.access(file, os.R_OK)]
    if lacking:
        found.append(f"cannot read {', '.join(lacking[:3])}; copy or mount what is missing, or mend its permissions")
    if not disk["fits"]:
        found.append(
            f"{disk['folder']}: {disk['free_bytes'] / GIB:.0f} GiB free, checkpoints and export need "
            f"{disk['needed_bytes'] / GIB:.0f} GiB; free some"
        )
    return found


def _weights(path: str) -> list[Path]:
    """Return the weight files of a local model; an empty list for a hub name.

    Raises:
        ModelError: the model is missing, or its folder has no weights.
    """
    model = resolve_model_path(path)
    folder = Path(model.name)
    if model.gguf_file is not None:
        return [folder / model.gguf_file]
    if not folder.is_dir():
        return []
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not found:
        raise ModelError(f"{path}: no *.safetensors; copy the weights there too")
    return found


def examine(
    hosts: dict[str, int], port: int, recipe: str, overrides: Sequence[str], environment: dict[str, str]
) -> Agreement:
    """Collect the reports of all hosts and compare them.

    Args:
        hosts: slots by host.
        port: rendezvous port.
        recipe: path of the training recipe, the same on every host.
        overrides: overrides of the recipe, ``section.key=value``.
        environment: environment variables that the launcher will set for the ranks.
    """
    names = list(hosts)
    with ThreadPoolExecutor(max_workers=min(64, len(names))) as pool:
        answers = list(pool.map(lambda i: _ask(hosts, i, port, recipe, overrides), range(len(names))))
    reference = gather_facts()
    problems: dict[str, list[str]] = {}
    reports: dict[str, HostReport] = {}
    for name, (answer, before, after) in zip(names, answers, strict=True):
        if isinstance(answer, str):
            problems[name] = [answer]
            continue
        reports[name] = answer
        facts = Facts(**answer.facts)
        found = differences(facts, reference)
        if environment.get("DS_ACCELERATOR") != "cpu" and len(facts.gpus) != hosts[name]:
            found.append(f"has {len(facts.gpus)} GPUs, the hostfile says slots={hosts[name]}; correct the hostfile")
        if not answer.port_free:
            found.append(f"port {port} is in use, perhaps by a run that is just ending; wait 30 s or use --master-port")
        if len(names) > 1 and (answer.first_host_address is None or answer.interface is None):
            found.append(f"does not resolve or reach {names[0]}; add it to /etc/hosts there")
        late = skew(facts.unix_seconds, before, after)
        # The launcher sets the interface, so a host name that resolves to loopback is harmless.
        loopback_is_mended = environment | {"GLOO_SOCKET_IFNAME": answer.interface or "lo"}
        found += [*answer.recipe_problems, *([late] if late else [])]
        found += blocking(facts, several_hosts=len(names) > 1, environment=loopback_is_mended)
        problems[name] = found
    return _agree(names, reports, problems)


def _agree(names: list[str], reports: dict[str, HostReport], problems: dict[str, list[str]]) -> Agreement:
    others = [reports[name] for name in names[1:] if name in reports] or list(reports.values())
    addresses = {report.first_host_address for report in others if report.first_host_address}
    interfaces = {report.interface for report in reports.values() if report.interface}
    if len(addresses) > 1:
        seen = ", ".join(sorted(addresses))
        problems[names[0]].append(f"other hosts resolve its name to different addresses ({seen}); use --master-addr")
    return Agreement(
        problems,
        addresses.pop() if len(addresses) == 1 else None,
        interfaces.pop() if len(interfaces) == 1 else None,
    )


def _ask(
    hosts: dict[str, int], position: int, port: int, recipe: str, overrides: Sequence[str]
) -> tuple[HostReport | str, float, float]:
    """Return a host's report, or the reason why it gave none, and our clock before and after."""
    names = list(hosts)
    words = [sys.executable, "-m", "anchor.doctor", "--report", ",".join(names), "--position", str(position)]
    numbers = ["--ranks", str(sum(hosts.values())), "--master-port", str(port)]
    inner = shlex.join([*words, *numbers, recipe, *overrides])
    # Use this process's interpreter path; if a host lacks it, the error names that problem.
    command = f"cd {shlex.quote(str(ROOT))} && {inner}"
    options = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    before = time.time()
    try:
        done = subprocess.run(
            [*_SSH, *options, names[position], command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_TIMEOUT_SECONDS:.0f} s; look at its load and network file systems", 0.0, 0.0
    after = time.time()
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == 255:
        return f"not reachable by ssh: {last}", before, after
    if done.returncode != 0:
        return f"cannot run this project there (same path on every host, `bash launch/setup.sh`): {last}", before, after
    return HostReport(**json.loads(done.stdout.splitlines()[-1])), before, after


def to_json(report: HostReport) -> str:
    """Serialise a report to one line of JSON for the launching machine."""
    return json.dumps(asdict(report))
