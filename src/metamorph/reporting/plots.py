"""Plots as SVG text, light enough to stand inside a page. The only user of matplotlib.

Text and axes take the colour of the page around them (`currentColor`), so that a plot reads in light and in dark. The same
input gives the same bytes: no dates, no random ids.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metamorph.errors import DataError
from metamorph.reporting.tables import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b7dd8", "#d9822b", "#2a9d74", "#b4559e", "#8a7a2f", "#5b6b7a")
"""Told apart by colour-blind readers, and visible on white and on near-black."""

INK = "#010203"
"""Stands for the colour of the surrounding text until the SVG is written."""


@dataclass(frozen=True)
class Curve:
    """A line through points, x ascending; y that is not a number leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Band:
    """Where a curve is expected to run: low and high at each x."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    label: str = "expected"


@dataclass(frozen=True)
class Bar:
    """One measured quantity with its interval, and references (chance, floor) drawn as ticks across it."""

    label: str
    result: Interval
    references: Mapping[str, float] | None = None


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values at each position (fewer at the start), for noisy losses."""
    if window < 1:
        raise DataError(f"a window of {window} values but at least 1 is needed.")
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def line_plot(
    curves: Sequence[Curve],
    *,
    band: Band | None = None,
    title: str = "",
    x_label: str = "step",
    y_label: str = "",
    log_y: bool = False,
    size: tuple[float, float] = (6.4, 3.4),
) -> str:
    """Curves over a common x axis, before the band in which they are expected.

    Returns:
        An SVG document; `size` is in inches of 72 points.

    Raises:
        DataError: a curve or the band has sequences of different lengths.
    """
    for curve in curves:
        _same_length(curve.label, curve.x, curve.y)
    with _axes(size) as (figure, axes):
        if band is not None:
            _same_length(band.label, band.x, band.low, band.high)
            axes.fill_between(band.x, band.low, band.high, color=INK, alpha=0.12, linewidth=0, label=band.label)
        for curve, colour in zip(curves, _cycle(len(curves)), strict=True):
            axes.plot(curve.x, curve.y, color=colour, linewidth=1.6, label=curve.label)
        if log_y:
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.15, color=INK)
        if len(curves) + (band is not None) > 1:
            axes.legend(frameon=False, fontsize=9)
        return _to_svg(figure)


def bar_plot(
    bars: Sequence[Bar],
    *,
    title: str = "",
    x_label: str = "",
    limits: tuple[float, float] | None = (0.0, 1.0),
    width: float = 6.4,
) -> str:
    """Horizontal bars in the given order, from top to bottom, each with its interval and its references.

    Returns:
        An SVG document; its height follows the number of bars.
    """
    with _axes((width, 0.9 + 0.36 * len(bars))) as (figure, axes):
        kinds = list(dict.fromkeys(name for bar in bars for name in bar.references or {}))
        for row, bar in enumerate(bars):
            result = bar.result
            axes.barh(row, result.value, height=0.62, color=COLOURS[0], alpha=0.85)
            if result.low is not None and result.high is not None:
                axes.plot([result.low, result.high], [row, row], color=INK, linewidth=1.4)
            for name, value in (bar.references or {}).items():
                colour = COLOURS[1 + kinds.index(name) % (len(COLOURS) - 1)]
                axes.plot([value, value], [row - 0.4, row + 0.4], color=colour, linewidth=2.2)
        for name in kinds:
            axes.plot([], [], color=COLOURS[1 + kinds.index(name) % (len(COLOURS) - 1)], linewidth=2.2, label=name)
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.invert_yaxis()
        if limits is not None:
            axes.set_xlim(*limits)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(x_label)
        axes.grid(axis="x", alpha=0.15, color=INK)
        axes.set_axisbelow(True)
        if kinds:
            axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return _to_svg(figure)


def _same_length(label: str, *sequences: Sequence[float]) -> None:
    lengths = {len(sequence) for sequence in sequences}
    if len(lengths) > 1:
        raise DataError(f"sequences of {' and '.join(map(str, sorted(lengths)))} values but one length is needed ({label!r}).")


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


@contextmanager
def _axes(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    """An empty plot in the house style. No pyplot: nothing outlives the call."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('matplotlib is missing but plots need it. Install it: pip install "matplotlib>=3.9"') from error

    style: Any = {
        "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
        "svg.hashsalt": "metamorph",
        "font.family": "sans-serif",
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        yield figure, axes


def _to_svg(figure: Figure) -> str:
    """The figure as one `<svg>` element with ids of its own, so that several can stand in one page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    prefix = "p" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="|url\()#([^")]+)', rf"\1#{prefix}-\2", svg)
    return svg.strip()
