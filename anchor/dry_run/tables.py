"""Tables of a dry run's report, readable at 80 columns."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_MEMORY_ROWS = {
    "weights": "weights",
    "master": "master weights, fp32",
    "optimiser": "AdamW momentum and variance, fp32",
    "gradients": "gradients, fp32",
    "gathered": "gathered weights",
    "buckets": "reduction buffers, largest gradient",
    "activations": "activations of one pack",
    "head": "head: chunk of logits, its gradients",
    "pool": "pool and gradient-cache embeddings",
    "update": "copy of gradients (in the update)",
    "host": "(on the host, offloaded)",
}


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print all tables, then the verdicts."""
    for table in (_batch(report), _parameters(report), _memory(report), _time(report), _disk(report)):
        console.print(table)
    for line in verdicts(report):
        console.print(line, style=None if line.startswith("fits") else "bold red", markup=False, highlight=False)


def verdicts(report: dict[str, Any]) -> list[str]:
    """Return one line on memory and one on disk, each beginning with ``fits`` or ``DOES NOT FIT``."""
    memory, disk, gpu = report["memory"], report["disk"], report["gpu"]["name"]
    need = f"{gib(memory['peak_bytes'])} of {gib(memory['usable_bytes'])} GiB usable on {gpu}"
    first = f"fits: {need}"
    if not memory["fits"]:
        advice = "use more ranks, pack again with a smaller batch.pack_tokens, or offload (ds_configs)"
        if memory["fits_with_checkpointing"]:
            advice = "set backbone.gradient_checkpointing=true"
        first = f"DOES NOT FIT: {need}; {advice}"
    need = f"{gib(disk['needed_bytes'])} of {gib(disk['free_bytes'])} GiB free at {disk['folder']}"
    second = f"fits: {need}"
    if not disk["fits"]:
        second = f"DOES NOT FIT: {need}; choose another output_dir or a smaller engine.keep_checkpoints"
    return [first, second]


def gib(num_bytes: float | int) -> str:
    """Format bytes as GiB: two decimals, or two significant digits below 0.01 GiB."""
    value = num_bytes / 2**30
    return f"{value:,.2f}" if value >= 0.01 or not value else f"{value:.2g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _batch(report: dict[str, Any]) -> Table:
    batch = report["batch"]
    most = "at most " if batch["upper_bound"] else ""
    table = _table(f"Batch arithmetic ({batch['source']}, {report['num_ranks']} ranks)", "", "")
    table.add_row("pairs a step", f"{batch['pairs_per_step']:,}")
    table.add_row("packs a step, a rank", f"{most}{batch['packs_per_step']:,.1f}, {batch['packs_per_rank']:,.1f}")
    table.add_row("tokens of a pack", f"at most {batch['pack_tokens']:,}")
    if batch["largest_sampled_pack_tokens"] is not None:
        table.add_row("largest sampled pack", f"{batch['largest_sampled_pack_tokens']:,}")
    table.add_row("tokens a step: encoded", f"{most}{batch['tokens_per_step']:,.0f}")
    if batch["decode_tokens_per_step"]:
        table.add_row("tokens a step: decoded", f"{most}{batch['decode_tokens_per_step']:,.0f}")
    table.add_row("steps, pairs", f"{batch['steps']:,}, {batch['pairs']:,}")
    table.add_row("tokens encoded", f"{most}{batch['tokens']:,.0f}")
    if batch["epochs"] is not None:
        table.add_row("batches, epochs", f"{batch['batches']:,}, {batch['epochs']:.2f}")
    return table


def _parameters(report: dict[str, Any]) -> Table:
    model = report["model"]
    tied = "tied" if model["tied"] else "untied"
    table = _table(f"Parameters ({model['model_type']}, {tied})", "", "all", "trained")
    for group in model["groups"]:
        table.add_row(group["group"], f"{group['parameters']:,}", f"{group['trained']:,}")
    table.add_row("total", f"{model['parameters']:,}", f"{model['trained']:,}")
    return table


def _memory(report: dict[str, Any]) -> Table:
    memory = report["memory"]
    table = _table("Memory of one rank, GiB", "", "plain", "checkpointing")
    for key, name in _MEMORY_ROWS.items():
        plain, checkpointed = memory["plain"][key], memory["with_checkpointing"][key]
        if plain or checkpointed:
            table.add_row(name, gib(plain), gib(checkpointed))
    table.add_row(
        "peak at the largest pack allowed", gib(memory["plain"]["peak"]), gib(memory["with_checkpointing"]["peak"])
    )
    if memory["peak_of_largest_sampled_pack"] is not None:
        column = int(memory["checkpointing"])
        cells = ["", ""]
        cells[column] = gib(memory["peak_of_largest_sampled_pack"])
        table.add_row("peak at the largest sampled pack", *cells)
    return table


def _time(report: dict[str, Any]) -> Table:
    time, gpu = report["time"], report["gpu"]
    table = _table(f"Work and communication ({report['num_ranks']} x {gpu['name']})", "", "")
    table.add_row("model TFLOPs a step", f"{time['model_flops_per_step'] / 1e12:,.1f}")
    table.add_row("with what is computed twice", f"{time['executed_flops_per_step'] / 1e12:,.1f}")
    if time["hours"] is None:
        table.add_row("hours", "not estimated: no datasheet gives a peak")
    else:
        peak = f"{time['mfu_assumed']:.0%} of {gpu['bf16_flops'] / 1e12:,.0f} TFLOP/s"
        table.add_row(f"seconds a step at {peak}", f"{time['seconds_per_step']:,.3g}")
        table.add_row("hours, GPU hours", f"{time['hours']:,.2f}, {time['gpu_hours']:,.2f}")
    for transfer in time["communication"]:
        where = "in the node" if transfer["inside_node"] else "between nodes"
        table.add_row(f"{transfer['what']}, {where}, GiB", gib(transfer["step_bytes"]))
    if time["communication"]:
        speeds = f"{time['node_bytes_per_second'] / 1e9:,.0f} and {time['network_bytes_per_second'] / 1e9:,.0f} GB/s"
        moving, waiting = (sum(t[f"{what}_seconds"] for t in time["communication"]) for what in ("moving", "waiting"))
        table.add_row(f"seconds on the links, at {speeds}", f"{moving:,.3g}")
        table.add_row("seconds waiting for rings, at least", f"{waiting:,.3g}")
    return table


def _disk(report: dict[str, Any]) -> Table:
    disk = report["disk"]
    table = _table("Disk, GiB", "", "")
    table.add_row(f"checkpoint, {disk['checkpoints_at_once']} at once", gib(disk["checkpoint_bytes"]))
    table.add_row("exported folder", gib(disk["export_bytes"]))
    table.add_row("free", gib(disk["free_bytes"]))
    return table
