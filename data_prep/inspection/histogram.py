"""Histogram of segment lengths: as numbers, lines of text or an image."""

from pathlib import Path

import numpy as np

from anchor.errors import ConfigError, first_line

NUM_BINS = 16
_WIDTH = 40
_INK = "#2a5c8a"


def bins(counts: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (shortest, longest, segments) of equally wide bins, from the number of segments of each length."""
    width = max(1, -(-(len(counts) - 1) // NUM_BINS))
    firsts = range(1, len(counts), width)
    return [(first, min(first + width, len(counts)) - 1, int(counts[first : first + width].sum())) for first in firsts]


def bars(sources: dict[str, list[tuple[int, int, int]]]) -> list[str]:
    """Return one line of text per bin, for all sources together."""
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
    """Draw one small histogram per source, stacked, each with its own vertical scale.

    Raises:
        ConfigError: if the file cannot be written, or its name is not an image's.
    """
    from matplotlib.figure import Figure  # takes half a second to import; only this option needs it

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
