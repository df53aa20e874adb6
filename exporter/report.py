"""The report for people (one HTML file) and for dashboards (JUnit XML): two views of the same report.json.

The HTML needs nothing from outside: styles, plots (SVG) and one small script are inline, and its content policy forbids
the rest. Blocks that the report lacks are not drawn. Both texts depend on the report
only: no time of day, no random ids.

Must not know: files, graphs, ONNX, how a number was measured.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Final

import jinja2
import junitparser
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from exporter.schema import GateResult, LayerEntry, Level, Report, dump_json, is_integer_kernel, is_legal

__all__ = ["headline", "render_html", "render_junit"]

Z_95: Final = 1.959963984540054  # two-sided 95 % point of the normal distribution
DASH: Final = "–"
# Matplotlib only knows colours: these are exchanged for CSS variables afterwards, so that plots follow the theme.
_THEME: Final = {
    "#010203": "var(--muted)",
    "#010204": "var(--line)",
    "#010205": "var(--accent)",
    "#010206": "var(--warn)",
}
_MUTED, _LINE, _ACCENT, _WARN = _THEME
_TYPES: Final = {
    "FLOAT": "float32",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "FLOAT16": "float16",
}


# --- numbers as text -------------------------------------------------------------------------------------------------


def _number(value: object) -> float | None:
    """The value as a float, None for what was not measured."""
    return float(value) if isinstance(value, (int, float)) and not math.isnan(value) else None


def count(value: object) -> str:
    """12345678 -> 12,345,678."""
    number = _number(value)
    return DASH if number is None else f"{number:,.0f}"


def compact(value: object) -> str:
    """12345678 -> 12.3 M."""
    number = _number(value)
    if number is None:
        return DASH
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 10 * factor or (factor > 1e3 and abs(number) >= factor):
            return f"{number / factor:.1f} {unit}"
    return f"{number:,.0f}"


def percent(value: object, digits: int = 2) -> str:
    """0.9035 -> 90.35 %; a share below 1 never reads 100 %, one above 0 never 0 %."""
    number = _number(value)
    if number is None:
        return DASH
    step = 10.0**-digits
    shown = number * 100
    if 0 < number < 1:
        shown = min(max(shown, step), 100 - step)
    return f"{shown:.{digits}f} %"


def points(value: object) -> str:
    """0.001 -> 0.10 points, with a proper minus."""
    number = _number(value)
    return DASH if number is None else f"{number * 100:+.2f}".replace("-", "−").removeprefix("+") + " points"


def decibel(value: object) -> str:
    """31.42 -> 31.4 dB; infinite means exact."""
    number = _number(value)
    if number is None:
        return DASH
    return "exact" if math.isinf(number) else f"{number:.1f} dB"


def size(value: object) -> str:
    """8000000 -> 7.63 MiB."""
    number = _number(value)
    if number is None:
        return DASH
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} B"


def duration(value: object) -> str:
    """83.0 -> 1 min 23 s; 2.14 -> 2.1 s."""
    number = _number(value)
    if number is None:
        return DASH
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{number:.1f} s"


def significant(value: object, digits: int = 4) -> str:
    """Few digits, whatever the magnitude."""
    number = _number(value)
    return DASH if number is None else f"{number:.{digits}g}".replace("-", "−", 1 if number < 0 else 0)


def differ(entry: Mapping[str, Any]) -> str:
    """How many of how many values differ."""
    return f"{count(entry.get('mismatched'))} of {count(entry.get('values'))}"


def surprises(unplanned: Mapping[str, int]) -> str:
    """{"QLinearConv": -1} -> 1 QLinearConv fewer than planned."""
    return ", ".join(f"{abs(n)} {name} {'more' if n > 0 else 'fewer'} than planned" for name, n in unplanned.items())


# --- what was proved -------------------------------------------------------------------------------------------------


def headline(report: Report) -> str:
    """One sentence: what was proved, or the first gate that failed."""
    failed = [gate for gate in report["gates"] if not gate["passed"]]
    if not failed:
        return _proof(report["parity"]["optimized"])
    more = f" {len(failed) - 1} more of {len(report['gates'])} gates failed." if len(failed) > 1 else ""
    return f"{_failure(failed[0])}.{more}"


def _proof(level: Level) -> str:
    if not level["values"]:
        return "No value was compared."
    if not level["mismatched"]:
        outputs = ", and its outputs are identical bit for bit" if level.get("outputs_identical") else ""
        return f"All {count(level['values'])} integers the runtime computed equal the calibrated model’s{outputs}."
    steps = "1 step" if level["max_lsb"] == 1 else f"{count(level['max_lsb'])} steps"
    end_to_end = f"End to end, {differ(level)} integers differ, by at most {steps}."
    if level.get("kernel_mismatched") == 0:
        return f"From its own inputs, every integer kernel computes exactly the calibrated model’s codes. {end_to_end}"
    return end_to_end


def _failure(gate: GateResult) -> str:
    found = "it was not measured" if gate["value"] is None else f"it is {significant(gate['value'], 6)}"
    return f"Gate {gate.get('expression', gate['name'])} failed: {found}"


def _wilson(share: float, samples: int) -> tuple[float, float]:
    """95 % interval of a share of independent samples.

    source: E. B. Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    z2 = Z_95**2 / samples
    centre, spread = share + z2 / 2, Z_95 * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples))
    return (centre - spread) / (1 + z2), (centre + spread) / (1 + z2)


def _scores(report: Report) -> list[dict[str, Any]]:
    """Rows of the accuracy table: label, score, its interval and a plot of both on a shared axis."""
    accuracy = report["accuracy"]
    if not accuracy or not accuracy["samples"]:
        return []
    rows: list[dict[str, Any]] = []
    top5: Mapping[str, Any] = accuracy.get("top5") or {}
    for label, key in (("float model", "float"), ("reference program", "reference"), ("in the runtime", "runtime")):
        value = _number(accuracy.get(key))
        if value is not None and 0 <= value <= 1:
            rows.append(
                {"label": label, "value": value, "top5": top5.get(key), "ci": _wilson(value, accuracy["samples"])}
            )
    if rows:
        low, high = min(row["ci"][0] for row in rows), max(row["ci"][1] for row in rows)
        for row in rows:
            row["plot"] = _interval_svg(row["value"], row["ci"], (low, high))
    return rows


# --- plots -----------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 256, 26  # viewBox of the plots inside table rows


def _interval_svg(value: float, interval: tuple[float, float], domain: tuple[float, float]) -> Markup:
    """Dot and whisker on a shared axis, for a table cell."""
    span = (domain[1] - domain[0]) or 1.0
    x, low, high = (8 + (v - domain[0]) / span * (_WIDTH - 16) for v in (value, *interval))
    return Markup(
        f'<svg class="strip" viewBox="0 0 {_WIDTH} 18" aria-hidden="true">'
        f'<path class="whisker" d="M{low:.1f} 9H{high:.1f}M{low:.1f} 5v8M{high:.1f} 5v8"/>'
        f'<circle class="dot" cx="{x:.1f}" cy="9" r="4.5"/></svg>'
    )


def _range_svg(layer: LayerEntry) -> Markup:
    """Histogram of the observed values (log height) over the chosen range; what lies outside is drawn as clipped."""
    lo, hi = layer["lo"], layer["hi"]
    seen_lo, seen_hi = (_number(layer.get(key)) for key in ("observed_lo", "observed_hi"))
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


def _sqnr_svg(layers: Sequence[LayerEntry], worst: Mapping[str, int], salt: str) -> Markup:
    """Bars of SQNR in graph order; the worst ones carry the number under which the caption names them."""
    values = [_number(layer.get("sqnr_db")) for layer in layers]
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


def _layer_groups(report: Report, worst: int = 3) -> list[dict[str, Any]]:
    """Activations and weights: rows with their plots, the worst of them, the overview figure."""
    groups = []
    for kind, title in (("activation", "Activations"), ("weight", "Weights")):
        layers = [layer for layer in report.get("layers", []) if layer["kind"] == kind]
        if not layers:
            continue
        noise = [_number(layer.get("sqnr_db")) for layer in layers]
        measured = sorted((n, index) for index, n in enumerate(noise) if n is not None and math.isfinite(n))
        lowest = [layers[index] for _, index in measured[:worst]] if len(measured) > worst else []
        numbers = {layer["site"]: index for index, layer in enumerate(lowest, start=1)}
        top = measured[-1][0] if measured else 0.0
        rows = [
            {"layer": layer, "plot": _range_svg(layer), "share": _share(n, top), "key": _sort_key(n)}
            for layer, n in zip(layers, noise, strict=True)
        ]
        figure = _sqnr_svg(layers, numbers, f"intact-{kind}")
        groups.append({"kind": kind, "title": title, "rows": rows, "worst": lowest, "figure": figure})
    return groups


def _sort_key(noise: float | None) -> float:
    """What the table sorts by: unmeasured sites first, exact ones last; no script reads "inf" as a number."""
    return -1e9 if noise is None else min(noise, 1e9)


def _share(part: object, whole: object) -> float:
    """The quotient in 0..1, 0 where either is missing."""
    top, bottom = _number(part), _number(whole)
    if top is None or not bottom or math.isinf(bottom):
        return 0.0
    return min(max(top / bottom, 0.0), 1.0)


# --- HTML ------------------------------------------------------------------------------------------------------------

_SCRIPT: Final = """
for (const head of document.querySelectorAll('th[data-sort]')) {
  head.tabIndex = 0; head.title = 'sort';
  const sort = () => {
    const body = head.closest('table').tBodies[0], column = head.cellIndex;
    const down = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
    for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', down === 1 ? 'ascending' : 'descending');
    const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent.trim();
    const compare = (a, b) => isNaN(a) || isNaN(b) ? String(a).localeCompare(b) : a - b;
    body.append(...[...body.rows].sort((a, b) => down * compare(key(a), key(b))));
  };
  head.addEventListener('click', sort);
  head.addEventListener('keydown', event => { if (event.key === 'Enter') sort(); });
}
addEventListener('beforeprint', () => { for (const part of document.querySelectorAll('details')) part.open = true; });
"""


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("exporter"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (count, compact, percent, points, decibel, size, duration, significant, differ, surprises)
    environment.filters |= {function.__name__: function for function in filters}
    environment.tests["integer_kernel"] = is_integer_kernel
    return environment.get_template("report.html.j2")


def render_html(report: Report) -> str:
    """The whole page, verdict first."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    text = _template().render(
        r=report,
        headline=headline(report),
        scores=_scores(report),
        groups=_layer_groups(report),
        levels=_levels(report),
        sizes=_parts((report["size"].get("by_type") or {}).items(), names=_TYPES),
        times=_parts(report["time_s"].items()),
        speed=_ratio(report["latency_ms"] or {}, "float", "quantized"),
        shrink=_ratio(report["size"], "float_bytes", "bytes"),
        config_text=dump_json(report.get("config", {})),
        script=Markup(_SCRIPT),
        script_digest=digest,
    )
    return text.encode("utf-8", "replace").decode()  # a name with a lone surrogate must not stop the export


def _ratio(block: Mapping[str, Any], before: str, after: str) -> float | None:
    """How many times smaller the second number is."""
    first, second = _number(block.get(before)), _number(block.get(after))
    return first / second if first and second else None


def _levels(report: Report) -> list[dict[str, Any]]:
    """The two optimisation levels, the shipped one first."""
    titles = (("optimized", "Optimisations on", "integer kernels, as deployed"),
              ("unoptimized", "Optimisations off", "float arithmetic between dequantize and quantize"))  # fmt: skip
    parity = report["parity"]
    return [
        {"title": title, "note": note, "level": parity[key], "gated": key == "optimized"}  # type: ignore[literal-required]
        for key, title, note in titles
    ]


def _parts(items: Iterable[tuple[str, Any]], names: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Parts of a whole with their shares, for a stacked bar."""
    numbers = [(name, _number(value) or 0.0) for name, value in items]
    total = sum(value for _, value in numbers)
    return [
        {"name": (names or {}).get(name, name), "value": value, "share": _share(value, total)}
        for name, value in numbers
    ]


# --- JUnit -----------------------------------------------------------------------------------------------------------

_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 cannot hold


def render_junit(report: Report) -> str:
    """JUnit XML: suites gates, parity per level, fold, coverage, lint. A failed case always means a failed verdict."""
    parity = report["parity"]
    gates = [
        _case(gate.get("expression", gate["name"]), failure="" if gate["passed"] else _failure(gate))
        for gate in report["gates"]
    ]
    document = junitparser.JUnitXml("intact")
    document.add_testsuite(_suite("gates", gates))
    document.add_testsuite(_parity_suite("optimized", parity["optimized"]))
    document.add_testsuite(_parity_suite("unoptimized", parity["unoptimized"]))
    document.add_testsuite(_fold_suite(report))
    document.add_testsuite(_coverage_suite(report))
    document.add_testsuite(_lint_suite(report))
    return str(document.tostring().decode("utf-8")) + "\n"  # type: ignore[no-untyped-call]


def _suite(name: str, cases: Iterable[junitparser.TestCase]) -> junitparser.TestSuite:
    suite = junitparser.TestSuite(f"intact.{name}")
    for case in cases:
        case.classname = f"intact.{name}"
        suite.add_testcase(case)
    return suite


def _case(name: str, *, failure: str = "", skipped: str = "", note: str = "") -> junitparser.TestCase:
    case = junitparser.TestCase(_xml(name), time=0)
    if failure:
        case.result = [junitparser.Failure(_xml(failure))]
    elif skipped:
        case.result = [junitparser.Skipped(_xml(skipped))]
    if note:
        case.system_out = _xml(note)
    return case


def _xml(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _parity_suite(key: str, level: Level) -> junitparser.TestSuite:
    """One case per compared site and output, one for the kernels; where the default gates forbid it a case fails."""
    gated = key == "optimized"
    cases = []
    for node in level.get("nodes") or level.get("worst") or []:
        message = f"{differ(node)} values differ, by at most {node['max_lsb']} ({node['kernel']})"
        cases.append(_case(node["site"], failure="" if is_legal(node) or not gated else message, note=message))
    for output in level.get("outputs", []):
        message = f"differs by {significant(output.get('relative'))} of its largest value"
        cases.append(_case(f"output {output['name']}", failure=message if gated and not output["legal"] else ""))
    if gated and "unplanned" in level:
        cases.append(_case("kernels as planned", failure=surprises(level["unplanned"])))
    return _suite(f"parity.{key}", cases)


def _fold_suite(report: Report) -> junitparser.TestSuite:
    fold = report["fold"]
    cases = []
    for item in fold.get("folded", []):
        note = f"kernel {item['kernel']}, relative error {item['rel_error']:.3g} in float64"
        cases.append(_case(f"folded {item['where']}", note=note))
    cases.extend(_case(f"not folded {item['where']}", skipped=item["why"]) for item in fold["refused"])
    return _suite("fold", cases)


def _coverage_suite(report: Report) -> junitparser.TestSuite:
    coverage = report["coverage"]
    nodes = f"{coverage['integer_nodes']} of {coverage['compute_nodes']} compute nodes"
    cases = [_case("integer share", note=f"{nodes}, {percent(coverage['integer_macs'])} of the multiply-accumulates")]
    cases.extend(
        _case(f"{node['name']} ({node.get('op', '?')})", skipped=node.get("why", "executed in float"))
        for node in coverage["float_nodes"]
    )
    return _suite("coverage", cases)


def _lint_suite(report: Report) -> junitparser.TestSuite:
    cases = []
    for entry in report.get("lint", []):
        failure = entry["message"] if entry["severity"] == "error" else ""
        cases.append(_case(f"{entry['rule']} at {entry['where']}", failure=failure, note=entry["message"]))
    return _suite("lint", cases)
