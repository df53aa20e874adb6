"""The plots of the page as inline SVG: small strips written by hand, the overview by Matplotlib.

They carry no colours of their own but the variables of the page, and depend on the numbers only.

Must not know: the page around them, where a number comes from.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Final

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from exporter.number_text import measured
from exporter.schema import LayerEntry

__all__ = ["interval_plot", "range_plot", "sqnr_plot"]

# Matplotlib only knows colours: these are exchanged for CSS variables afterwards, so that plots follow the theme.
_THEME: Final = {
    "#010203": "var(--muted)",
    "#010204": "var(--line)",
    "#010205": "var(--accent)",
    "#010206": "var(--warn)",
}
_MUTED, _LINE, _ACCENT, _WARN = _THEME
_WIDTH, _HEIGHT = 256, 26  # viewBox of the plots inside table rows


def interval_plot(value: float, interval: tuple[float, float], domain: tuple[float, float]) -> Markup:
    """Dot and whisker on a shared axis, for a table cell."""
    span = (domain[1] - domain[0]) or 1.0
    x, low, high = (8 + (v - domain[0]) / span * (_WIDTH - 16) for v in (value, *interval))
    return Markup(
        f'<svg class="strip" viewBox="0 0 {_WIDTH} 18" aria-hidden="true">'
        f'<path class="whisker" d="M{low:.1f} 9H{high:.1f}M{low:.1f} 5v8M{high:.1f} 5v8"/>'
        f'<circle class="dot" cx="{x:.1f}" cy="9" r="4.5"/></svg>'
    )


def range_plot(layer: LayerEntry) -> Markup:
    """Histogram of the observed values (log height) over the chosen range; what lies outside is drawn as clipped."""
    lo, hi = layer["lo"], layer["hi"]
    seen_lo, seen_hi = (measured(layer.get(key)) for key in ("observed_lo", "observed_hi"))
    left = lo if seen_lo is None else min(lo, seen_lo)
    right = hi if seen_hi is None else max(hi, seen_hi)
    unit = (_WIDTH - 4) / ((right - left) or 1.0)
    start, end = 2 + (lo - left) * unit, 2 + (hi - left) * unit
    outlines = ""
    bins = layer.get("histogram") or []
    if bins and seen_lo is not None and seen_hi is not None:
        width = (seen_hi - seen_lo) / len(bins)
        inside = [lo - width / 2 <= seen_lo + (i + 0.5) * width <= hi + width / 2 for i in range(len(bins))]
        for css, keep in (("seen", True), ("cut", False)):
            kept = [n if here is keep else 0 for n, here in zip(bins, inside, strict=True)]
            outlines += (
                f'<path class="{css}" d="{_outline(kept, max(bins), 2 + (seen_lo - left) * unit, width * unit)}"/>'
            )
    bracket = f'<path class="chosen" d="M{start:.1f} 20v6M{start:.1f} 23H{end:.1f}M{end:.1f} 20v6"/>'
    return Markup(
        f'<svg class="strip" viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f"{outlines}{bracket}</svg>"
    )


def _outline(bins: Sequence[int], top: int, x: float, width: float) -> str:
    """SVG path of a histogram on the line y = 19; empty bins leave no ink, others at least one unit."""
    path, height_before = "", 0.0
    for index, number in enumerate([*bins, 0]):
        height = 1 + 17 * math.log1p(number) / math.log1p(top) if number else 0.0
        if height == height_before == 0:
            continue
        if height_before == 0:
            path += f"M{x + index * width:.1f} 19"
        path += f"V{19 - height:.1f}" + (f"h{width:.1f}" if height else "z")
        height_before = height
    return path


def sqnr_plot(layers: Sequence[LayerEntry], worst: Mapping[str, int], salt: str) -> Markup:
    """Bars of SQNR in graph order; the worst ones carry the number under which the caption names them."""
    values = [measured(layer.get("sqnr_db")) for layer in layers]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < 2:
        return Markup()
    heights = [value if value is not None and math.isfinite(value) else 0.0 for value in values]
    marks = {index: worst[layer["site"]] for index, layer in enumerate(layers) if layer["site"] in worst}
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever style the user's own matplotlib has
        mpl.rcParams.update({"svg.hashsalt": salt, "svg.fonttype": "none"})
        return _inline(_bars(heights, marks))


def _bars(heights: Sequence[float], marks: Mapping[int, int]) -> Figure:
    """One bar per height; those in `marks` (index -> number) stand out."""
    figure = Figure(figsize=(9.6, 2.3), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    colors = [_WARN if index in marks else _ACCENT for index in range(len(heights))]
    width = min(0.16 + 0.03 * len(heights), 0.8)  # few bars stay slim, many leave a gap
    axes.bar(range(1, len(heights) + 1), heights, width=width, color=colors, linewidth=0)
    top = max(*heights, 1.0)
    for index, number in marks.items():
        axes.vlines(index + 1, heights[index], top * 1.06, color=_WARN, linewidth=0.8, linestyle=":")
        axes.annotate(str(number), (index + 1, top * 1.06), (0, 1), textcoords="offset points",
                      ha="center", color=_WARN, fontsize=9, weight="bold")  # fmt: skip
    axes.set(xlim=(0.3, len(heights) + 0.7), ylim=(min(0.0, *heights), top * 1.18))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.set_xlabel("site, in graph order", color=_MUTED, fontsize=9)
    axes.set_ylabel("SQNR, dB", color=_MUTED, fontsize=9)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=_MUTED)
    return figure


def _inline(figure: Figure) -> Markup:
    """The figure as SVG for a page: theme colours, the page's font, no metadata, ids from the salt alone."""
    stream = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    FigureCanvasSVG(figure).print_svg(stream, metadata=metadata)  # type: ignore[no-untyped-call]
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z]+[\w.]*_\d+"', "", text)  # figure_1, patch_2: the same in every figure
    text = re.sub(r"font: (?:(bold|700) )?([\d.]+)px [^;\"]*", r"font-weight: \1; font-size: \2px", text)
    text = text.replace("font-weight: ;", "").replace("<svg ", '<svg class="figure" role="img" ', 1)
    text = re.sub(
        r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
    for color, variable in _THEME.items():
        text = text.replace(color, variable)
    return Markup(re.sub(r"\n\s*", "\n", text))
