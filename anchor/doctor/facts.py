"""Gather plain facts about a machine, without judging them. It takes a second or two; hosts exchange them as JSON."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from anchor.engine.extensions import extensions_folder
from anchor.errors import first_line

ROOT = Path(__file__).parents[2]
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about one machine.

    Attributes:
        host: the machine's name.
        python: version of the interpreter.
        versions: installed version of every package in requirements.txt; None if it is missing.
        commit: commit of the checkout; None outside git.
        code_sha256: hash of the checkout's Python files and ds_configs, committed or not.
        gpus: name of each GPU that torch can use.
        listed_gpus: number of GPUs that the driver lists.
        driver: version of the NVIDIA driver; None if nvidia-smi reports none.
        nccl: version of NCCL that torch uses; None without CUDA.
        gloo: whether torch has gloo.
        flash_attn: version of flash-attn, None if it is not installed, or the error from importing it.
        extensions_dir: folder of DeepSpeed's compiled operators.
        built_ops: operators compiled in ``extensions_dir``.
        locks: age in seconds of each lock file in ``extensions_dir``.
        addresses: IPv4 addresses by network interface.
        own_address: IPv4 address that the machine's own name resolves to; None if it does not resolve.
        shm_bytes: size of /dev/shm.
        open_files: soft limit on open files.
        unix_seconds: the machine's clock.
    """

    host: str
    python: str
    versions: dict[str, str | None]
    commit: str | None
    code_sha256: str
    gpus: tuple[str, ...]
    listed_gpus: int
    driver: str | None
    nccl: str | None
    gloo: bool
    flash_attn: str | None
    extensions_dir: str
    built_ops: tuple[str, ...]
    locks: dict[str, float]
    addresses: dict[str, tuple[str, ...]]
    own_address: str | None
    shm_bytes: int
    open_files: int
    unix_seconds: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gather_facts() -> Facts:
    """Gather the facts of this machine."""
    from torch.cuda import nccl as torch_nccl

    cuda = torch.cuda.is_available()
    listed, driver = _driver()
    extensions = extensions_folder()
    return Facts(
        host=socket.gethostname(),
        python=sys.version.split()[0],
        versions=_versions(),
        commit=_commit(),
        code_sha256=_code_sha256(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if cuda else (),
        listed_gpus=listed,
        driver=driver,
        nccl=".".join(map(str, torch_nccl.version())) if cuda else None,
        gloo=torch.distributed.is_gloo_available(),
        flash_attn=_flash_attn(),
        extensions_dir=str(extensions),
        built_ops=tuple(sorted({file.stem for file in extensions.glob("*/*.so")})),
        locks={str(file): time.time() - file.stat().st_mtime for file in extensions.glob("*/lock")},
        addresses=_addresses(),
        own_address=resolve(socket.gethostname()),
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,  # noqa: S108
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def resolve(name: str) -> str | None:
    """Return the IPv4 address of a host name, or None if it does not resolve."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def interface_towards(address: str) -> str | None:
    """Return the network interface that reaches an address; None if no route exists."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # UDP: consults the routing table, sends nothing
        except OSError:
            return None
        local = probe.getsockname()[0]
    return next((name for name, addresses in _addresses().items() if local in addresses), None)


def _addresses() -> dict[str, tuple[str, ...]]:
    found = {
        name: tuple(one.address for one in addresses if one.family == socket.AF_INET)
        for name, addresses in psutil.net_if_addrs().items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def _versions() -> dict[str, str | None]:
    names = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    # git refuses a checkout owned by another user, as happens to root on network file systems; reading it is harmless.
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "rev-parse", "HEAD"]
    if shutil.which("git") is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _code_sha256() -> str:
    digest = hashlib.sha256()
    for folder, pattern in (("anchor", "*.py"), ("data_prep", "*.py"), ("eval", "*.py"), ("ds_configs", "*.json")):
        for file in sorted((ROOT / folder).rglob(pattern)):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _driver() -> tuple[int, str | None]:
    if shutil.which("nvidia-smi") is None:
        return 0, None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    versions = done.stdout.split() if done.returncode == 0 else []
    return len(versions), versions[0] if versions else None


def _flash_attn() -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        return str(importlib.import_module("flash_attn").__version__)
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        return f"cannot be imported: {first_line(error)}"
