"""Draw figures as inline SVG with matplotlib; ink takes the page's text colour, so they suit light and dark pages."""

import io
import itertools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator

_INK = "#010203"
_PLACEHOLDER = "label"
_COLOURS = ("#3b82c4", "#d9722e", "#2f9e6e", "#b45fb0", "#c9a227", "#5aa9b5", "#d0566b", "#8a7fd1")
"""Line colours, distinguishable on white and near-black, with a contrast of at least 3 to 1 on both."""
_DASHES = ("-", "--", ":", "-.")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "anchor",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
}


_UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_LABEL_CHARACTERS = 60


def shown(text: str) -> str:
    """Return text that is valid in HTML and SVG: replace control characters and lone surrogates by U+FFFD."""
    return _UNSHOWABLE.sub("\ufffd", text)


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], y_label: str, *, log: bool = False) -> str:
    """Plot lines over steps and return the SVG.

    Args:
        series: label -> (steps, values).
        y_label: quantity and unit.
        log: use a logarithmic y axis.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes = figure.subplots()
        styles = zip(itertools.cycle(_COLOURS), itertools.cycle(np.repeat(_DASHES, len(_COLOURS))), strict=False)
        for (steps, values), (colour, dash) in zip(series.values(), styles, strict=False):
            axes.plot(steps, values, color=colour, linestyle=str(dash), linewidth=1.6, label=_PLACEHOLDER)
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log:
            axes.set_yscale("log")
        if len(series) > 1:
            _write_labels(axes.legend(), series)
        return _svg(figure)


def histogram(groups: dict[str, Float[np.ndarray, " N"]], x_label: str) -> str:
    """Plot the densities of several groups over shared bins and return the SVG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes = figure.subplots()
        every = np.concatenate(list(groups.values()))
        bins = np.linspace(every.min(), every.max() + 1e-6, 41)
        for values, colour, hatch in zip(groups.values(), _COLOURS, ("", "////", "...."), strict=False):
            axes.hist(values, bins=bins, density=True, color=colour, alpha=0.55, label=_PLACEHOLDER, hatch=hatch)
        axes.set_xlabel(x_label)
        axes.set_ylabel("density")
        _write_labels(axes.legend(), groups)
        return _svg(figure)


def scatter(points: Float[np.ndarray, "N 2"], labels: Sequence[str]) -> str:
    """Plot a labelled map and return the SVG; groups differ in colour and marker."""
    marks = "os^Dv<>PX*"
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(5.4, 4.6), layout="constrained")
        axes = figure.subplots()
        names = np.asarray(labels)
        groups = sorted(set(labels))
        for number, name in enumerate(groups):
            mine: Int[np.ndarray, " M"] = np.flatnonzero(names == name)
            colour, mark = _COLOURS[number % len(_COLOURS)], marks[number % len(marks)]
            x, y = points[mine].T
            axes.scatter(x, y, s=14, alpha=0.8, linewidths=0, label=_PLACEHOLDER, color=colour, marker=mark)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        _write_labels(figure.legend(loc="outside lower center", ncols=3, fontsize=9), groups)
        return _svg(figure)


def _write_labels(legend: Legend, labels: Iterable[str]) -> None:
    """Write labels literally: matplotlib would parse ``$`` as mathematics and hide labels that begin with ``_``."""
    for text, label in zip(legend.get_texts(), labels, strict=True):
        cut = label if len(label) <= _LABEL_CHARACTERS else f"{label[:_LABEL_CHARACTERS].rstrip()} …"
        text.set_parse_math(False)
        text.set_text(shown(cut))


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The browser draws the text, so glyphs missing from matplotlib's font do not matter.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Hide the figure from screen readers: they get the caption, not every tick.
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
