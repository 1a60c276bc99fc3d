"""Benchmark harness: contestants alternate in one process, so that a noisy machine favours none.

It reports medians, spread and peak memory, and writes JSON. Peak memory is the process's highest resident size during a
turn (CUDA: highest allocated), reset before each turn.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from anchor.engine.provenance import provenance_commit

PACKAGES = ("torch", "transformers", "deepspeed", "sentence-transformers", "tokenizers")


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """Parse ``--json PATH``, ``--turns N`` and one option per default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--turns", type=int, default=5, help="turns of every contestant (5)")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"({value})")
    return parser.parse_args()


def reset_peak() -> None:
    """Reset :func:`peak_gib`; on CUDA the allocator keeps its memory, as it does in training."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Return the highest memory since :func:`reset_peak`: allocated on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def alternate(contestants: dict[str, Callable[[], dict[str, float]]], turns: int) -> list[dict[str, Any]]:
    """Run every contestant once to warm up, then in turn; each returns figures such as ``loss`` or ``pairs``.

    Returns:
        One row per contestant: median, lowest and highest seconds, peak GiB, and its figures.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    peaks: dict[str, list[float]] = {name: [] for name in contestants}
    figures: dict[str, dict[str, float]] = {}
    for turn in range(turns + 1):
        for name, run in contestants.items():
            if not turn and torch.cuda.is_available():
                torch.cuda.empty_cache()
            reset_peak()
            start = time.perf_counter()
            figures[name] = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
                peaks[name].append(peak_gib())
    return [
        {
            "contestant": name,
            "seconds": statistics.median(seconds[name]),
            "seconds_min": min(seconds[name]),
            "seconds_max": max(seconds[name]),
            "peak_gib": statistics.median(peaks[name]),
            **figures[name],
        }
        for name in contestants
    ]


def _processor() -> str:
    """Return the CPU's name, with its instructions for fast bfloat16."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = {name.strip(): value.strip() for name, value in (line.split(":", 1) for line in lines if ":" in line)}
    fast = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in named.get("flags", "").split()]
    return " ".join([named.get("model name", platform.machine()), *(f"({', '.join(fast)})" for _ in fast[:1])])


def report(name: str, rows: list[dict[str, Any]], ratios: dict[str, float], options: argparse.Namespace) -> None:
    """Print the table and, if asked, write the result as JSON.

    Its keys are name, hardware, commit, versions, settings, rows and ratios.
    """
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    hardware = f"{hardware}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=f"{name} ({hardware}; {options.turns} turns, medians)")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console = Console(width=160)
    console.print(table)
    console.print("ours over theirs: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    if options.json is not None:
        settings = {k: str(v) for k, v in vars(options).items() if k != "json"}
        result = {"name": name, "hardware": hardware, "commit": provenance_commit(), "versions": versions}
        result |= {"settings": settings, "rows": rows, "ratios": ratios}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
