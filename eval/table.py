"""``python -m eval table``: main scores of several result folders side by side."""

import json
from pathlib import Path

from rich.table import Table

from anchor.errors import DataError


def score_table(labelled: list[tuple[str, Path]]) -> Table:
    """One row per result folder, one column per task; scores times 100.

    Raises:
        DataError: a folder without ``scores.json``.
    """
    rows = []
    for label, folder in labelled:
        file = folder / "scores.json"
        if not file.is_file():
            raise DataError(f"{folder}: no scores.json; run `python -m eval mteb` with --output {folder} first")
        rows.append((label, json.loads(file.read_text(encoding="utf-8"))["scores"]))
    tasks = sorted({task for _, scores in rows for task in scores})
    table = Table("model", *tasks)
    for label, scores in rows:
        table.add_row(label, *(f"{100 * scores[task]:.2f}" if task in scores else "not run" for task in tasks))
    return table
