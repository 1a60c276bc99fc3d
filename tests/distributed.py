"""Run a function on several ranks: gloo, file rendezvous, no ports."""

import faulthandler
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``function(ranks, *args)`` on every rank; return the results in rank order.

    Args:
        function: defined at the top level of a module; its result must pickle.
        world_size: number of processes.
        args: passed on; must pickle.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (world_size, folder, function, args), nprocs=world_size)
        return [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(world_size)]  # noqa: S301


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(world_size)}
    )
    # DeepSpeed names its shared buffers by the port, which nobody listens at: two test runs must not share them.
    port = str(1024 + os.getppid() % 60000)
    os.environ.update({"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    faulthandler.enable()  # a rank that dies in C says where
    torch.set_num_threads(1)
    from anchor import dist

    ranks = dist.init(f"file://{folder}/rendezvous")
    result = function(ranks, *args)
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.shutdown()
    dist.leave(0)
