"""Progress of a run: a bar on a terminal, one line every N steps elsewhere, and a table at the end."""

import logging
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from anchor.engine.metrics import Clock, Row, read_rows

log = logging.getLogger("anchor.engine.loop")

_ENDS = 10
"""Number of steps that the first and the last loss are averaged over."""
_SUMMED = (
    *("time/step_seconds", "time/data_wait_seconds", "data/tokens", "data/pairs", "memory/peak_gib"),
    "loss/total_nats",
)
_DEPENDENCE = {
    "document": "held_out/dependence_document_to_query_nats",
    "query": "held_out/dependence_query_to_document_nats",
}
_HELD_OUT = ("step", "held_out/loss_total_nats", "held_out/ndcg_at_10")


class StepDisplay:
    """Live display of the steps; rank 0 only.

    Args:
        first, total: steps already taken, and steps to take in all.
        every: steps per log line if there is no terminal.
    """

    def __init__(self, first: int, total: int, every: int) -> None:
        self._total, self._every, self._clock = total, every, Clock()
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task("", total=total, completed=first)
            self._bar.start()

    def step(self, row: Row) -> None:
        """Show one more step."""
        number = int(row["step"])
        self._clock.tokens += int(row["data/tokens"])
        if self._bar is not None:
            text = f"loss {row['loss/total_nats']:.4f} nats, {self._clock.tokens_per_second:,.0f} tokens/s"
            self._bar.update(self._task, completed=number, description=text)
        elif number % self._every == 0 or number == self._total:
            log.info(
                "step %d/%d loss %.4f nats lr %.2e grad %.3f %s tokens/s %.2f GiB",
                number,
                self._total,
                row["loss/total_nats"],
                row["optim/lr"],
                row["optim/grad_norm"],
                f"{self._clock.tokens_per_second:,.0f}",
                row["memory/peak_gib"],
            )
            self._clock.reset()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


def print_summary(folder: Path) -> None:
    """Print the table at the end of a run, from ``metrics.jsonl`` and ``held_out.jsonl``."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if _has(row, *_SUMMED) and "source" in row]
    if not rows:
        return
    console = Console(stderr=True)
    seconds = sum(row["time/step_seconds"] + row["time/data_wait_seconds"] for row in rows)
    tokens, pairs = sum(row["data/tokens"] for row in rows), sum(row["data/pairs"] for row in rows)
    table = Table("source", "steps", "pairs", "loss at first", "loss at last", title=str(folder))
    for column in table.columns[1:]:
        column.justify = "right"
    sources = sorted({str(row["source"]) for row in rows})
    for source in sources:
        table.add_row(*_loss_cells(source, [row for row in rows if str(row["source"]) == source]))
    if len(sources) > 1:
        table.add_section()
        table.add_row(*_loss_cells("all", rows))
    console.print(table)
    lines = [
        f"{len(rows):,} steps, {pairs:,} pairs, {tokens:,} tokens in {seconds / 3600:.2f} h: "
        f"{pairs / seconds:,.1f} pairs/s, {tokens / seconds:,.0f} tokens/s, "
        f"{sum(row['time/data_wait_seconds'] for row in rows) / seconds:.1%} waiting for data, "
        f"{max(row['memory/peak_gib'] for row in rows):.2f} GiB at most",
        *_held_out_lines([row for row in read_rows(folder / "held_out.jsonl") if _has(row, *_HELD_OUT)]),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _has(row: dict[str, Any], *names: str) -> bool:
    """Return whether a row has these numbers; a disk or an editor may have altered it."""
    return all(isinstance(row.get(name), int | float) for name in names)


def _loss_cells(name: str, rows: list[dict[str, Any]]) -> Iterable[str]:
    ends = [fmean(row["loss/total_nats"] for row in end) for end in (rows[:_ENDS], rows[-_ENDS:])]
    return name, f"{len(rows):,}", f"{sum(row['data/pairs'] for row in rows):,}", *(f"{end:.4f}" for end in ends)


def _held_out_lines(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    dependence = [
        f"a wrong {partner} costs {last[name]:+.3f} nats per token"
        for partner, name in _DEPENDENCE.items()
        if _has(last, name)
    ]
    return [
        f"held out, step {first['step']} -> {last['step']}: loss {first['held_out/loss_total_nats']:.4f} -> "
        f"{last['held_out/loss_total_nats']:.4f} nats, nDCG@10 x 100 {100 * first['held_out/ndcg_at_10']:.2f} -> "
        f"{100 * last['held_out/ndcg_at_10']:.2f}",
        *(["held out: " + ", ".join(dependence)] if dependence else []),
    ]
