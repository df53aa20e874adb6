"""The plots of the page as inline SVG: small strips written by hand, the overview by Matplotlib.

Their colours are the CSS variables of the page, and the same numbers give the same text.

Must not know: the page around them, where a number comes from.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Final

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from calibrators.record import MixedPrecision, ScaleSensitivity
from exporter.reporting.number_format import measured

__all__ = [
    "Place",
    "error_plot",
    "front_plot",
    "interval_plot",
    "loss_plot",
    "matrix_plot",
    "pareto_plot",
    "sensitivity_plot",
]

# Matplotlib only knows colours: these are exchanged for CSS variables afterwards, so that plots follow the theme.
_THEME: Final = {
    "#010203": "var(--muted)",
    "#010204": "var(--line)",
    "#010205": "var(--accent)",
    "#010206": "var(--warn)",
}
_MUTED, _LINE, _ACCENT, _WARN = _THEME
_MARKED = 64  # points up to which a curve has markers, as each is an element of the page
_WIDTH = 256  # of the viewBox of the plots inside table rows
_SHADES = 12  # of a cell in a matrix


def interval_plot(value: float, interval: tuple[float, float], domain: tuple[float, float]) -> Markup:
    """Draw a value and its interval as dot and whisker on an axis that rows share, for a table cell."""
    span = (domain[1] - domain[0]) or 1.0
    x, low, high = (8 + (v - domain[0]) / span * (_WIDTH - 16) for v in (value, *interval))
    return Markup(
        f'<svg class="strip" viewBox="0 0 {_WIDTH} 18" aria-hidden="true">'
        f'<path class="whisker" d="M{low:.1f} 9H{high:.1f}M{low:.1f} 5v8M{high:.1f} 5v8"/>'
        f'<circle class="dot" cx="{x:.1f}" cy="9" r="4.5"/></svg>'
    )


def error_plot(
    *curves: Sequence[float | None], salt: str, groups: Sequence[Sequence[int]] = (), labels: Sequence[str] = ()
) -> Markup:
    """Plot the relative errors of units, in one state or before and after, on a logarithmic axis; zeros are gaps.

    groups: indices of neighbouring units that are shaded together; labels: of the curves.
    """
    shown = [[_positive(error) for error in curve] for curve in curves]
    count = max(map(len, shown))
    if count < 2 or not any(math.isfinite(error) for curve in shown for error in curve):
        return Markup()

    def paint(axes: Axes) -> None:
        for group in groups:
            axes.axvspan(group[0] + 0.6, group[-1] + 1.4, color=_MUTED, alpha=0.18, linewidth=0)
        styles = ((_MUTED, "s"), (_ACCENT, "o")) if len(shown) > 1 else ((_ACCENT, "o"),)
        for (color, marker), curve in zip(styles, shown, strict=True):
            axes.plot(
                range(1, len(curve) + 1),
                curve,
                color=color,
                linewidth=1.6,
                marker=_marker(marker, curve),
                markersize=3.5,
            )
        if labels:
            axes.legend(axes.lines, labels, frameon=False, fontsize=8, labelcolor=_MUTED)
        axes.set(yscale="log", xlim=(0.7, count + 0.3))
        _label(axes, "unit, in graph order", "relative error")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")

    return _figure(salt, paint)


def _marker(marker: str, curve: Sequence[float]) -> str:
    return marker if len(curve) <= _MARKED else ""


def loss_plot(powers: Mapping[float, float], coefficients: Sequence[float], vertex: float | None, salt: str) -> Markup:
    """Plot the loss over p, the parabola fitted to it (where that is not above all losses), and its vertex."""
    finite = {p: loss for p, loss in sorted(powers.items()) if math.isfinite(loss)}
    if len(finite) < 2:
        return Markup()

    def paint(axes: Axes) -> None:
        if len(coefficients) == 3:
            grid = np.linspace(min(finite), max(finite), 401)
            curve = np.polyval(coefficients, grid)
            axes.plot(grid, np.where(curve <= max(finite.values()), curve, np.nan), color=_WARN, linewidth=1.4)
        if vertex is not None:
            axes.axvline(vertex, color=_WARN, linewidth=0.8, linestyle=":")
        axes.plot([*finite], [*finite.values()], color=_ACCENT, linewidth=0, marker="o", markersize=5)
        _label(axes, "p", "loss")

    return _figure(salt, paint)


def sensitivity_plot(scales: Sequence[ScaleSensitivity], finest: float, salt: str) -> Markup:
    """Plot the loss that every scale adds, one line per width, paler for more bits; rings mark the bits of a budget."""
    added = [{w.bits: _added(w.loss, finest) for w in scale.widths} for scale in scales]
    widths = sorted({bits for losses in added for bits in losses})[:-1]  # the finest adds nothing
    if len(scales) < 2 or not any(math.isfinite(losses.get(b, math.nan)) for losses in added for b in widths):
        return Markup()

    def paint(axes: Axes) -> None:
        places = range(1, len(scales) + 1)
        for index, bits in enumerate(widths):
            curve = [losses.get(bits, math.nan) for losses in added]
            shade = 1.0 - 0.75 * index / max(1, len(widths) - 1)
            axes.plot(
                places, curve, color=_ACCENT, alpha=shade, linewidth=1.2, marker=_marker("o", curve), markersize=2.5
            )
            axes.annotate(f"{bits} bit", (len(scales), curve[-1]), (6, -3), textcoords="offset points",
                          color=_MUTED, fontsize=8, annotation_clip=False)  # fmt: skip
        chosen = [losses.get(scale.bits or 0, math.nan) for scale, losses in zip(scales, added, strict=True)]
        size = 7 if len(scales) <= _MARKED else 3
        axes.plot(places, chosen, color=_WARN, linewidth=0, marker="o", markersize=size, markerfacecolor="none")
        axes.set(yscale="log", xlim=(0.3, len(scales) + 0.7))
        _label(axes, "scale, in graph order", "added loss")

    return _figure(salt, paint)


def _added(loss: object, finest: float) -> float:
    number = measured(loss)
    return math.nan if number is None else _positive(number - finest)


def front_plot(mixed: MixedPrecision, salt: str) -> Markup:
    """Plot the measured loss of mixed and of uniform bits over their cost; a ring marks the choice."""
    finite = [choice for choice in mixed.front if math.isfinite(_positive(choice.loss))]
    if len(finite) < 2:
        return Markup()
    cost = attrgetter(mixed.axis)
    uniform = [choice for choice in finite if choice.uniform is not None]
    front = sorted((choice for choice in finite if choice.uniform is None), key=cost)

    def paint(axes: Axes) -> None:
        for choices, color, marker, label in (
            (uniform, _MUTED, "s", "uniform bits"),
            (front, _ACCENT, "o", "mixed bits"),
        ):
            places, losses = [cost(c) for c in choices], [_positive(c.loss) for c in choices]
            axes.plot(places, losses, color=color, linewidth=1.4, marker=marker, markersize=5, label=label)
        for choice in uniform:
            axes.annotate(f"{choice.uniform}", (cost(choice), _positive(choice.loss)), (5, 4),
                          textcoords="offset points", color=_MUTED, fontsize=8)  # fmt: skip
        found = mixed.found
        axes.plot([cost(found)], [_positive(found.loss)], color=_WARN, linewidth=0, marker="o", markersize=10,
                  markerfacecolor="none", markeredgewidth=1.8, label="chosen")  # fmt: skip
        axes.legend(frameon=False, fontsize=8, labelcolor=_MUTED)
        axes.set(yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
        _label(axes, {"weight_bytes": "bytes of weights", "avg_weight_bits": "mean bits of a weight",
                      "bops": "bit operations per sample"}[mixed.axis], "loss")  # fmt: skip

    return _figure(salt, paint)


@dataclass(frozen=True)
class Place:
    """A point of a Pareto plot: name, cost and quality, the interval of the cost, and whether it is on the front."""

    name: str
    cost: float
    quality: float
    interval: tuple[float, float]
    is_front: bool


def pareto_plot(places: Sequence[Place], labels: tuple[str, str], *, logarithmic: bool, salt: str) -> Markup:
    """Plot quality over cost: filled points on the front, rings elsewhere, a line for an interval of the cost.

    labels: of the axes; logarithmic: of the quality, whose zeros are then left out.
    """
    check = _positive if logarithmic else _finite
    shown = [each for each in places if math.isfinite(check(each.quality))]
    if len(shown) < 2:
        return Markup()

    def paint(axes: Axes) -> None:
        for is_front, color, fill, label in ((False, _MUTED, "none", "dominated"), (True, _ACCENT, None, "front")):
            chosen = [each for each in shown if each.is_front == is_front]
            axes.hlines([each.quality for each in chosen], [each.interval[0] for each in chosen],
                        [each.interval[1] for each in chosen], color=color, linewidth=1.2)  # fmt: skip
            axes.plot([each.cost for each in chosen], [each.quality for each in chosen], color=color, linewidth=0,
                      marker="o", markersize=6, markerfacecolor=fill or color, label=label)  # fmt: skip
        names: dict[tuple[float, float], list[str]] = {}
        for each in shown:
            names.setdefault((each.cost, each.quality), []).append(each.name)
        for place, here in names.items():
            axes.annotate(", ".join(here), place, (6, 4), textcoords="offset points", color=_MUTED, fontsize=8)
        axes.legend(frameon=False, fontsize=8, labelcolor=_MUTED)
        axes.set(yscale="log" if logarithmic else "linear")
        axes.margins(x=0.05, y=0.15)
        _label(axes, *labels)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8))

    return _figure(salt, paint)


def matrix_plot(matrix: Sequence[Sequence[float | None]]) -> Markup:
    """Draw a square matrix as cells, shaded by the square root of the magnitude; negative cells have their own colour.

    Cells of one shade are one path, neighbours in a row one line as wide as a cell, so that large matrices stay small.
    """
    values = np.array([[measured(value) for value in row] for row in matrix], dtype=np.float64)  # None: NaN
    values[~np.isfinite(values)] = 0.0
    top = float(np.abs(values).max(initial=0.0)) or 1.0
    shades = np.sign(values) * np.round(_SHADES * np.sqrt(np.abs(values) / top))
    paths: dict[int, str] = {}
    for y, row in enumerate(shades.astype(int).tolist()):
        x = 0
        for shade, run in groupby(row):
            width = len(list(run))
            if shade:
                paths[shade] = paths.get(shade, "") + f"M{x} {y}h{width}"
            x += width
    cells = "".join(
        f'<path class="{"plus" if shade > 0 else "minus"}" opacity="{abs(shade) / _SHADES:.2f}" d="{path}"/>'
        for shade, path in sorted(paths.items())
    )
    size = len(values)
    return Markup(f'<svg class="matrix" viewBox="0 -0.5 {size} {size}" aria-hidden="true">{cells}</svg>')


def _positive(value: object) -> float:
    """Return the number, or NaN for one that a logarithmic axis cannot show."""
    number = measured(value)
    return number if number is not None and 0 < number < math.inf else math.nan


def _finite(value: object) -> float:
    number = measured(value)
    return number if number is not None and math.isfinite(number) else math.nan


def _label(axes: Axes, x: str, y: str) -> None:
    """Name the axes, and give them the look that all figures share."""
    axes.set_xlabel(x, color=_MUTED, fontsize=9)
    axes.set_ylabel(y, color=_MUTED, fontsize=9)
    if x.endswith("in graph order"):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=_MUTED)


def _figure(salt: str, paint: Callable[[Axes], None]) -> Markup:
    """Return the SVG of what `paint` draws; ids come from the salt."""
    with mpl.rc_context():
        mpl.rcdefaults()  # undo the style of the user's matplotlib
        mpl.rcParams.update({"svg.hashsalt": salt, "svg.fonttype": "none"})
        figure = Figure(figsize=(9.6, 2.3), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        paint(axes)
        return _inline(figure, f"{axes.get_ylabel()} over {axes.get_xlabel()}")


def _inline(figure: Figure, title: str) -> Markup:
    """Return the figure as SVG for a page: theme colours, the page's font, no metadata, ids from the salt alone."""
    stream = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    FigureCanvasSVG(figure).print_svg(stream, metadata=metadata)  # type: ignore[no-untyped-call]
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"(\d\.\d\d)\d+(?=[^<>]*>)", r"\1", text)  # inside a tag: a hundredth of a pixel
    text = re.sub(r' id="[A-Za-z]+[\w.]*_\d+"', "", text)  # figure_1, patch_2: the same in every figure
    text = re.sub(r"font: (?:(bold|700) )?([\d.]+)px [^;\"]*", r"font-weight: \1; font-size: \2px", text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = text.replace("font-weight: ;", "").replace(
        "<svg ", f'<svg class="figure" role="img" aria-label="{title}" ', 1
    )
    text = re.sub(
        r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
    for color, variable in _THEME.items():
        text = text.replace(color, variable)
    return Markup(re.sub(r"\n\s*", "\n", text))
