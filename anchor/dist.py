"""Ranks: rendezvous under any launcher, and the collectives that the objectives need.

The rendezvous variables come from the DeepSpeed launcher or torchrun (``RANK``, ``WORLD_SIZE``, ...) or from SLURM
(``srun python``). Without them, the run is a single process.
"""

import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from jaxtyping import Float
from torch import Tensor

from anchor.errors import ConfigError, first_line


@dataclass(frozen=True, slots=True)
class Ranks:
    """Position of this process in the run.

    Attributes:
        rank: 0 ... world_size - 1.
        world_size: number of processes.
        local_rank: index of this process's GPU among the GPUs that it sees on this host.
        device: device that this rank computes on.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def set_rendezvous() -> None:
    """Fill in missing rendezvous variables in the environment.

    They are ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``.

    Raises:
        ConfigError: SLURM started several tasks without ``MASTER_ADDR``, or a variable is missing or invalid.
    """
    env = os.environ
    if "RANK" not in env and env.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in env:
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = (
            env["SLURM_PROCID"],
            env["SLURM_NTASKS"],
            env["SLURM_LOCALID"],
        )
        if "MASTER_ADDR" not in env:
            raise ConfigError(
                "environment: started by srun without MASTER_ADDR; start the program through launch/slurm/rank.sh"
            )
        env.setdefault("MASTER_PORT", str(20000 + _number("SLURM_JOB_ID", 0, default="0") % 10000))
    if "RANK" not in env:
        env.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env["MASTER_PORT"] = str(free.getsockname()[1])
    env.setdefault("LOCAL_RANK", "0")
    world_size = _number("WORLD_SIZE", 1)
    _number("RANK", 0, world_size - 1)
    _number("LOCAL_RANK", 0)
    _number("MASTER_PORT", 1, 65535)
    if not env.get("MASTER_ADDR"):
        raise ConfigError("environment: RANK is set but MASTER_ADDR is not; start through a launcher, or unset RANK")


def _number(name: str, least: int, most: int | None = None, default: str | None = None) -> int:
    """Read a whole number from the environment."""
    text = os.environ.get(name, default)
    if text is None:
        raise ConfigError(f"environment: RANK is set but {name} is not; start through a launcher, or unset RANK")
    # Python refuses to convert very long numbers, and no valid value has that many digits.
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else -1
    if number < least or (most is not None and number > most):
        expected = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(
            f"environment: {name}={text[:40]}, expected a whole number {expected}; start through a launcher"
        )
    return number


def on_cuda() -> bool:
    """Return True if this process has a GPU and ``DS_ACCELERATOR`` does not select another device."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def init(init_method: str = "env://", timeout: timedelta | None = None) -> Ranks:
    """Join the process group: NCCL on CUDA, gloo elsewhere.

    Args:
        init_method: torch's rendezvous URL; tests use ``file://``.
        timeout: how long to wait for other ranks, here and in every collective; None for torch's default.

    Raises:
        ConfigError: a launcher variable is invalid, the rendezvous port is in use, or other ranks did not join.
    """
    set_rendezvous()
    cuda = on_cuda()
    if cuda and torch.cuda.device_count() == 1:
        os.environ["LOCAL_RANK"] = "0"  # some schedulers show each task only its own GPU
    rank, world_size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise ConfigError(f"environment: LOCAL_RANK={local}, but this host shows {gpus} GPUs; start fewer ranks")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if cuda else "gloo", init_method, timeout, world_size, rank)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise ConfigError(_cannot_join(rank, first_line(error))) from error
    return Ranks(rank, world_size, local, device)


def _cannot_join(rank: int, why: str) -> str:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in why or "address already in use" in why:
        return f"port {port} of {socket.gethostname()} is in use by another program; choose another MASTER_PORT"
    return f"rank {rank} on {socket.gethostname()} cannot join the others at {address}:{port} ({why})"


def set_timeout(timeout: timedelta) -> None:
    """Set the timeout of all process groups, including those that DeepSpeed made with torch's default."""
    for group in tuple(c10d._world.pg_map):
        if dist.get_rank(group) >= 0:
            c10d._set_pg_timeout(timeout, group)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Exit this process at once with ``code``, after :func:`shutdown`.

    DeepSpeed keeps the process group, and with it gloo's threads, alive after ``destroy_process_group``. A thread that
    needs the interpreter while Python shuts down aborts the process, and a finished run would look failed. Skipping the
    interpreter's shutdown avoids this.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return all ranks' values on every rank, in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over ranks, in place and without gradient."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


class _GatherRows(torch.autograd.Function):
    """Gather the rows of all ranks, rank-major; backward sums gradients over ranks and keeps this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        width = max(counts)
        padded = rows.new_zeros(width, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        first = sum(ctx.counts[: dist.get_rank()])
        return total[first : first + ctx.counts[dist.get_rank()]], None


def all_gather_with_grad(rows: Float[Tensor, "B D"], counts: Sequence[int]) -> Float[Tensor, "N D"]:
    """Gather the rows of all ranks in rank order, with a backward that sums over ranks.

    Each rank then computes the loss of its own queries against all columns. The sum of the ranks' losses has the
    gradient of one process that holds the whole batch; the caller multiplies by the world size when the engine
    averages over ranks.

    Args:
        rows: this rank's rows.
        counts: number of rows of each rank; ``counts[rank] == B``, ``sum(counts) == N``.
    """
    if len(counts) == 1:
        return rows
    return _GatherRows.apply(rows, tuple(counts))


def is_first_rank() -> bool:
    """Return True on the rank that writes shared output: rank 0, or a single process."""
    return not dist.is_initialized() or dist.get_rank() == 0
