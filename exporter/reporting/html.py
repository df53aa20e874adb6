"""The report for people (one HTML file) and for dashboards (JUnit XML): two views of the same report.json.

The HTML needs nothing from outside: styles, plots (SVG) and one small script are inline, and its content policy forbids
the rest. Blocks that the report lacks are not drawn. Both texts depend on the report only: no time of day, no ids
made at random.

Must not know: files, graphs, ONNX, how a number was measured.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final

import jinja2
import junitparser
from markupsafe import Markup

from exporter.reporting.number_format import (
    compact,
    compared,
    count,
    decibel,
    differ,
    duration,
    measured,
    percent,
    points,
    significant,
    size,
)
from exporter.reporting.plots import (
    error_plot,
    front_plot,
    interval_plot,
    loss_plot,
    matrix_plot,
    range_plot,
    sensitivity_plot,
    sqnr_plot,
)
from exporter.reporting.schema import (
    GateResult,
    Grouping,
    Level,
    Report,
    ScaleSensitivity,
    dump_json,
    is_integer_kernel,
    is_legal,
)

__all__ = ["headline", "render_html", "render_junit"]

Z_95: Final = 1.959963984540054  # two-sided 95 % point of the normal distribution
_TYPES: Final = {
    "FLOAT": "float32",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "FLOAT16": "float16",
}


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


def surprises(unplanned: Mapping[str, int]) -> str:
    """{"QLinearConv": -1} -> 1 QLinearConv fewer than planned."""
    return ", ".join(f"{abs(n)} {name} {'more' if n > 0 else 'fewer'} than planned" for name, n in unplanned.items())


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
        value = measured(accuracy.get(key))
        if value is not None and 0 <= value <= 1:
            rows.append(
                {"label": label, "value": value, "top5": top5.get(key), "ci": _wilson(value, accuracy["samples"])}
            )
    if rows:
        low, high = min(row["ci"][0] for row in rows), max(row["ci"][1] for row in rows)
        for row in rows:
            row["plot"] = interval_plot(row["value"], row["ci"], (low, high))
    return rows


# --- HTML ------------------------------------------------------------------------------------------------------------


def _layer_groups(report: Report, worst: int = 3) -> list[dict[str, Any]]:
    """Activations and weights: rows with their plots, the worst of them, the overview figure."""
    groups = []
    for kind, title in (("activation", "Activations"), ("weight", "Weights")):
        layers = [layer for layer in report.get("layers", []) if layer["kind"] == kind]
        if not layers:
            continue
        noise = [measured(layer.get("sqnr_db")) for layer in layers]
        finite = sorted((n, index) for index, n in enumerate(noise) if n is not None and math.isfinite(n))
        lowest = [layers[index] for _, index in finite[:worst]] if len(finite) > worst else []
        numbers = {layer["site"]: index for index, layer in enumerate(lowest, start=1)}
        top = finite[-1][0] if finite else 0.0
        rows = [
            {"layer": layer, "plot": range_plot(layer), "share": _share(n, top), "key": _sort_key(n)}
            for layer, n in zip(layers, noise, strict=True)
        ]
        figure = sqnr_plot(layers, numbers, f"intact-{kind}")
        groups.append({"kind": kind, "title": title, "rows": rows, "worst": lowest, "figure": figure})
    return groups


def _reconstruction(report: Report) -> dict[str, Any] | None:
    """Units with what training left of their error, and the figure of all."""
    entry = report.get("reconstruction")
    if not entry or not entry["units"]:
        return None
    units, grouping = entry["units"], entry.get("grouping")
    before, after = ([unit[key] for unit in units] for key in ("before", "after"))
    left = [_quotient(*errors) for errors in zip(after, before, strict=True)]
    return {
        "rows": [{"unit": unit, "left": share} for unit, share in zip(units, left, strict=True)],
        "better": sum(share is not None and share < 1 for share in left),
        "figure": error_plot(before, after, salt="intact-reconstruction"),
        "joined": len(grouping["units_before"]) - len(units) if grouping else 0,
        "oscillation": _oscillation(grouping) if grouping else "",
    }


def _oscillation(grouping: Grouping) -> Markup:
    """Errors of the units trained alone and, where any were joined, of the same units afterwards."""
    curves = {
        label: grouping[key]  # type: ignore[literal-required]
        for label, key in (("every unit trained alone (short run)", "losses"), ("joined as shaded", "losses_after"))
        if key in grouping
    }
    if not curves:
        return Markup()
    return error_plot(*curves.values(), salt="intact-oscillation", groups=grouping.get("groups", ()), labels=[*curves])


_RANGES: Final = {
    "minmax": "min-max",
    "percentile": "percentile",
    "mse": "least squared error",
    "init": "start of the joint search",
    "final": "after the joint search",
}


def _lapq(report: Report) -> dict[str, Any] | None:
    """The search of scales by the network's loss; what the record lacks is left out."""
    record = report.get("lapq")
    if not record:
        return None
    losses, parabola = record.get("losses", {}), record.get("parabola", {})
    worst = max(filter(None, map(measured, losses.values())), default=0.0)
    powers = {entry["p"]: measured(entry["loss"]) for entry in record.get("powers", [])}
    landscape = record.get("landscape", {})
    return {
        "losses": [
            {"name": _RANGES.get(name, name), "loss": loss, "share": _share(loss, worst)}
            for name, loss in losses.items()
        ],
        "start": losses.get("init"),
        "end": losses.get("final"),
        "parabola": parabola,
        "figure": loss_plot(
            {p: math.nan if loss is None else loss for p, loss in powers.items()},
            parabola.get("coefficients", []),
            parabola.get("vertex"),
            "intact-powers",
        ),
        "bends": [
            {"bits": bits, "bend": bend, "plot": matrix_plot(bend["hessian"])}
            for bits, bend in sorted(landscape.get("bits", {}).items(), key=lambda item: (len(item[0]), item[0]))
        ],
        "sites": landscape.get("sites", []),
    }


def _sensitivity(report: Report) -> dict[str, Any] | None:
    """What the bits of weights and of activations cost: a figure and a table of each."""
    entry = report.get("sensitivity")
    if not entry or not entry["scales"]:
        return None
    finest = measured(entry["finest"]["loss"]) or 0.0
    groups = []
    for kind, title in (("weight", "Weights"), ("activation", "Activations")):
        scales = [scale for scale in entry["scales"] if scale["kind"] == kind]
        widths = sorted({w["bits"] for scale in scales for w in scale["widths"]})
        rows = [
            {"scale": scale, "cells": [_added_loss(scale, bits, finest) for bits in widths[:-1]]} for scale in scales
        ]
        if rows:
            figure = sensitivity_plot(scales, finest, f"intact-sensitivity-{kind}")
            groups.append({"kind": kind, "title": title, "widths": widths[:-1], "rows": rows, "figure": figure})
    return {"groups": groups}


def _added_loss(scale: ScaleSensitivity, bits: int, finest: float) -> dict[str, Any]:
    losses = {w["bits"]: measured(w["loss"]) for w in scale["widths"]}
    loss = losses.get(bits)
    return {"loss": None if loss is None else max(loss - finest, 0.0), "chosen": scale.get("bits") == bits}


def _mixed(report: Report) -> dict[str, Any] | None:
    """The choice of bits beside uniform ones of no smaller size, and the front."""
    entry = report.get("mixed_precision")
    if not entry:
        return None
    axis, found = entry["axis"], entry["found"]
    rows = sorted(entry["front"], key=lambda choice: (choice[axis], "uniform" in choice))
    return {"rows": [{"choice": found, "chosen": True}, *({"choice": row, "chosen": False} for row in rows)],
            "figure": front_plot(entry, "intact-front")}  # fmt: skip


def _quotient(part: object, whole: object) -> float | None:
    top, bottom = measured(part), measured(whole)
    return top / bottom if top is not None and bottom else None


def _sort_key(noise: float | None) -> float:
    """What the table sorts by: unmeasured sites first, exact ones last; no script reads "inf" as a number."""
    return -1e9 if noise is None else min(noise, 1e9)


def _share(part: object, whole: object) -> float:
    """The quotient in 0..1, 0 where either is missing."""
    top, bottom = measured(part), measured(whole)
    if top is None or not bottom or math.isinf(bottom):
        return 0.0
    return min(max(top / bottom, 0.0), 1.0)


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
    filters = (count, compact, compared, percent, points, decibel, size, duration, significant, differ, surprises)
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
        reconstruction=_reconstruction(report),
        lapq=_lapq(report),
        sensitivity=_sensitivity(report),
        mixed=_mixed(report),
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
    first, second = measured(block.get(before)), measured(block.get(after))
    return first / second if first and second else None


def _levels(report: Report) -> list[dict[str, Any]]:
    """The optimisation levels, the shipped one first, and OpenVINO where it was asked for."""
    titles = (("optimized", "Optimisations on", "integer kernels, as deployed"),
              ("unoptimized", "Optimisations off", "float arithmetic between dequantize and quantize"))  # fmt: skip
    parity = report["parity"]
    levels: list[dict[str, Any]] = [
        {"title": title, "note": note, "level": parity[key], "gated": key == "optimized"}  # type: ignore[literal-required]
        for key, title, note in titles
    ]
    if "openvino" in parity:
        second = parity["openvino"]
        note = "every kernel from its own inputs; single steps next to ties are legal"
        levels.append({"title": f"OpenVINO {second['version']}", "note": note, "level": second, "gated": True})
    return levels


def _parts(items: Iterable[tuple[str, Any]], names: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Parts of a whole with their shares, for a stacked bar."""
    numbers = [(name, measured(value) or 0.0) for name, value in items]
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
    if "openvino" in parity:
        document.add_testsuite(_parity_suite("openvino", parity["openvino"]))
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
    gated = key != "unoptimized"
    cases = []
    for node in level.get("nodes") or level.get("worst") or []:
        message = f"{differ(node)} values differ, by at most {node['max_lsb']} ({node['kernel']})"
        cases.append(_case(node["site"], failure="" if is_legal(node) or not gated else message, note=message))
    for output in level.get("outputs", []):
        message = f"differs by {significant(output.get('relative'))} of its largest value"
        cases.append(_case(f"output {output['name']}", failure=message if gated and not output["legal"] else ""))
    unplanned = level.get("unplanned")
    if gated and unplanned is not None:
        cases.append(_case("kernels as planned", failure=surprises(unplanned)))
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
