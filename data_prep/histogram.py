"""Lengths of segments as a histogram: numbers, lines of text, a picture."""

from pathlib import Path

import numpy as np

from anchor.errors import ConfigError, first_line

NUM_BINS = 16
_WIDTH = 40
_INK = "#2a5c8a"


def bins(counts: np.ndarray) -> list[tuple[int, int, int]]:
    """(shortest, longest, segments) of equally wide bins, from the number of segments of each length."""
    width = max(1, -(-(len(counts) - 1) // NUM_BINS))
    firsts = range(1, len(counts), width)
    return [(first, min(first + width, len(counts)) - 1, int(counts[first : first + width].sum())) for first in firsts]


def bars(sources: dict[str, list[tuple[int, int, int]]]) -> list[str]:
    """One line per bin, all sources together."""
    total: dict[tuple[int, int], int] = {}
    for found in sources.values():
        for first, last, number in found:
            total[first, last] = total.get((first, last), 0) + number
    most = max(total.values(), default=0)
    labels = [f"{first}-{last}" for first, last in total]
    wide = max(map(len, labels), default=0)
    return [
        f"{label:>{wide}}  {'#' * round(_WIDTH * number / most) if most else '':<{_WIDTH}}  {number:,}"
        for label, number in zip(labels, total.values(), strict=True)
    ]


def draw(sources: dict[str, list[tuple[int, int, int]]], file: Path) -> None:
    """One small histogram per source, below one another, each with its own height.

    Raises:
        ConfigError: the file cannot be written, or its name is not that of a picture.
    """
    from matplotlib.figure import Figure  # half a second to import, and only this option needs it

    figure = Figure(figsize=(7.0, 1.0 + 1.2 * len(sources)), layout="constrained")
    axes = figure.subplots(len(sources), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, found) in zip(axes, sources.items(), strict=True):
        firsts, numbers = [first for first, *_ in found], [number for *_, number in found]
        widths = [last - first + 1 for first, last, _ in found]
        axis.bar(firsts, numbers, widths, align="edge", color=_INK, edgecolor="white", linewidth=0.5)
        axis.set_title(f"{name} ({sum(numbers):,} segments)", loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.get_major_locator().set_params(integer=True, nbins=3)
        axis.tick_params(labelsize=8)
    axes[-1].set_xlabel("tokens of a segment, template included", fontsize=9)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--png {file}: cannot be written: {first_line(error)}") from error
