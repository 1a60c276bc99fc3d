"""Curves over the steps of Stage II: a panel per task, a line per arm, a band from the lowest seed to the highest.

An arm with a single step is a point with a bar.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "anchor",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
}
_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Curve:
    """Curve of one arm.

    Attributes:
        label: name of the arm.
        points: scores of all seeds, by step.
    """

    label: str
    points: dict[int, list[float]]


def draw_curves(panels: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Write ``path.svg`` and ``path.png``; equal figures give identical SVG.

    Args:
        panels: curves by task.
        path: path without suffix.
    """
    rows = -(-len(panels) // _COLUMNS)
    columns = -(-len(panels) // rows)
    legend_rows = -(-max(len(curves) for curves in panels.values()) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.6 * columns, 2.8 * rows + 0.3 + 0.2 * legend_rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, (task, curves) in zip(axes, panels.items(), strict=False):
            for number, curve in enumerate(curves):
                colour = mpl.colormaps["tab10"](number % 10)
                steps = sorted(curve.points)
                values = [curve.points[step] for step in steps]
                axis.plot(steps, [statistics.fmean(v) for v in values], "o-", color=colour, ms=3, label=curve.label)
                low, high = [min(v) for v in values], [max(v) for v in values]
                if len(steps) == 1:
                    axis.vlines(steps, low, high, color=colour, alpha=0.4)
                else:
                    axis.fill_between(steps, low, high, color=colour, alpha=0.15)
            axis.set_title(task)
            axis.set_xlabel("steps of Stage II")
            axis.set_ylabel("score x 100")
        for axis in list(figure.axes)[len(panels) :]:
            axis.set_visible(False)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=150)
