"""The report for people: one HTML file.

It needs nothing from outside: styles, plots (SVG) and one small script are inline, and its content policy forbids the
rest. Blocks that the report lacks are not drawn. The text depends on the report only (no time of day, no random ids),
and advice on how the caller writes arguments.

Must not know: files, graphs, ONNX, how a number was measured.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from operator import attrgetter
from typing import Any, Final

import jinja2
from markupsafe import Markup

from calibrators.errors import argument
from calibrators.intervals import share_interval
from calibrators.record import Grouping, ScaleSensitivity
from exporter.reporting import number_format, plots
from exporter.reporting.difference_tables import sections, summary
from exporter.reporting.failures import failures, layer_rules, unplanned_kernels
from exporter.reporting.headline import headline, tone, verdict_title
from exporter.reporting.ladder import figure_text, outcome, why_it_stopped
from exporter.reporting.layer_table import layer_details, layer_rows, linker, noisiest
from exporter.reporting.metrics import quantity_of
from exporter.reporting.number_format import measured
from exporter.reporting.proofs import OPENVINO_DIFFERS, UNOPTIMIZED_DIFFERS, found_on
from exporter.reporting.quantities import written
from exporter.reporting.schema import Report, dump_json
from exporter.reporting.speed import TIMED_IN, other_runtime, speed
from exporter.reporting.templates import environment
from exporter.reporting.where import where_rows
from exporter.reporting.widths import activation_bits, weight_bits
from runtime_tests.measure.profile import TimeShares

__all__ = ["render_html"]

_GRADES: Final = (
    *(("0", "below 10 dB"), ("1", "10 to 20 dB"), ("2", "20 to 30 dB"), ("3", "30 to 40 dB"), ("4", "above 40 dB")),
    *(("f", "in float"), ("", "not quantized")),
)
"""Legend of the map: the grades of layer_table.LayerRow."""


def _scores(report: Report) -> list[dict[str, Any]]:
    """Return the rows of the accuracy table: label, score, its interval and a plot of both on a shared axis."""
    accuracy = report.accuracy
    if not accuracy or not accuracy.samples:
        return []
    rows: list[dict[str, Any]] = []
    for label, key in (("float model", "float"), ("reference program", "reference"), ("in the runtime", "runtime")):
        value = measured(getattr(accuracy, key))
        if value is not None and 0 <= value <= 1:
            few = accuracy.reference_samples if key == "reference" else None
            interval = share_interval(value, accuracy.samples if few is None else few)
            rows.append({"label": label, "value": value, "top5": getattr(accuracy.top5, key, None), "ci": interval})
    if rows:
        low, high = min(row["ci"][0] for row in rows), max(row["ci"][1] for row in rows)
        for row in rows:
            row["plot"] = plots.interval_plot(row["value"], row["ci"], (low, high))
    return rows


def _reconstruction(report: Report) -> dict[str, Any] | None:
    """Return the units with their errors before and after training, and the figure of all."""
    if not report.reconstruction or not report.reconstruction.units:
        return None
    units, grouping = report.reconstruction.units, report.reconstruction.grouping
    left = [_quotient(unit.after, unit.before) for unit in units]
    figure = plots.error_plot([u.before for u in units], [u.after for u in units], salt="intact-reconstruction")
    return {
        "rows": [{"unit": unit, "left": share} for unit, share in zip(units, left, strict=True)],
        "better": sum(share is not None and share < 1 for share in left),
        "trained": any(unit.undecided is not None for unit in units),
        "figure": figure,
        "joined": len(grouping.units_before) - len(units) if grouping else 0,
        "oscillation": _oscillation(grouping) if grouping else "",
    }


def _oscillation(grouping: Grouping) -> Markup:
    """Plot the errors of the units trained alone and, where any were joined, of the same units afterwards."""
    curves = {"every unit trained alone (short run)": grouping.losses, "joined as shaded": grouping.losses_after}
    measured_curves = {label: losses for label, losses in curves.items() if losses is not None}
    if not measured_curves:
        return Markup()
    groups = grouping.groups or ()
    return plots.error_plot(
        *measured_curves.values(), salt="intact-oscillation", groups=groups, labels=[*measured_curves]
    )


_JOINTS: Final = re.compile(r"(?<=[._])(?=\w)|(?<=[a-z])(?=[A-Z])")
_RANGES: Final = {
    "minmax": "min-max",
    "percentile": "percentile",
    "mse": "least squared error",
    "init": "start of the joint search",
    "final": "after the joint search",
}


def _lapq(report: Report) -> dict[str, Any] | None:
    """Return what the page shows of the search of scales by the network's loss (LAPQ)."""
    record = report.lapq
    if not record:
        return None
    worst = max(filter(None, map(measured, record.losses.values())), default=0.0)
    curvatures = record.landscape.bits if record.landscape else {}
    return {
        "losses": [
            {"name": _RANGES.get(name, name), "loss": loss, "share": _share(loss, worst)}
            for name, loss in record.losses.items()
        ],
        "start": record.losses.get("init"),
        "end": record.losses.get("final"),
        "parabola": record.parabola,
        "figure": plots.loss_plot(
            {power.p: power.loss for power in record.powers},
            record.parabola.coefficients,
            record.parabola.vertex,
            "intact-powers",
        ),
        "curvatures": [
            {"bits": bits, "of": curvature, "plot": plots.matrix_plot(curvature.hessian)}
            for bits, curvature in sorted(curvatures.items(), key=lambda item: (len(item[0]), item[0]))
        ],
        "sites": record.landscape.sites if record.landscape else (),
    }


def _sensitivity(report: Report) -> dict[str, Any] | None:
    """Return the costs of the bits of weights and of activations: a figure and a table of each."""
    entry = report.sensitivity
    if not entry or not entry.scales:
        return None
    finest = measured(entry.finest.loss) or 0.0
    groups = []
    for kind, title in (("weight", "Weights"), ("activation", "Activations")):
        scales = [scale for scale in entry.scales if scale.kind == kind]
        widths = sorted({width.bits for scale in scales for width in scale.widths})
        rows = [
            {"scale": scale, "cells": [_added_loss(scale, bits, finest) for bits in widths[:-1]]} for scale in scales
        ]
        if rows:
            figure = plots.sensitivity_plot(scales, finest, f"intact-sensitivity-{kind}")
            groups.append({"kind": kind, "title": title, "widths": widths[:-1], "rows": rows, "figure": figure})
    return {"groups": groups}


def _added_loss(scale: ScaleSensitivity, bits: int, finest: float) -> dict[str, Any]:
    losses = {width.bits: measured(width.loss) for width in scale.widths}
    loss = losses.get(bits)
    return {"loss": None if loss is None else max(loss - finest, 0.0), "chosen": scale.bits == bits}


def _mixed(report: Report) -> dict[str, Any] | None:
    """Return the chosen bits, the measured front, and uniform bits for comparison."""
    entry = report.mixed_precision
    if not entry:
        return None
    cost = attrgetter(entry.axis)
    rows = sorted(entry.front, key=lambda choice: (cost(choice), choice.uniform is not None))
    return {
        "rows": [{"choice": entry.found, "chosen": True}, *({"choice": row, "chosen": False} for row in rows)],
        "figure": plots.front_plot(entry, "intact-front"),
    }


def _quotient(part: object, whole: object) -> float | None:
    top, bottom = measured(part), measured(whole)
    return top / bottom if top is not None and bottom else None


def _breakable(name: str) -> Markup:
    """Return a name that may be broken after dots and underscores, and before capitals."""
    return Markup("<wbr>").join(_JOINTS.split(name))


def _script_data(value: object) -> Markup:
    """Return a value as JSON that a script element may hold."""
    return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def _share(part: object, whole: object) -> float:
    """Return the quotient in 0..1, 0 where either is missing."""
    top, bottom = measured(part), measured(whole)
    if top is None or not bottom or math.isinf(bottom):
        return 0.0
    return min(max(top / bottom, 0.0), 1.0)


def _part(name: str) -> str:
    return files("exporter").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    pages = environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    pages.filters |= {name: getattr(number_format, name) for name in number_format.__all__}
    pages.filters |= {"unplanned_kernels": unplanned_kernels, "breakable": _breakable, "written": written}
    pages.filters |= {"figure_text": figure_text, "outcome": outcome, "why_it_stopped": why_it_stopped}
    pages.filters |= {"argument": argument, "layer_rule": lambda escape: layer_rules({escape.layer: escape.settings})}
    pages.tests["number"] = lambda value: measured(value) is not None  # NaN is none
    return pages.get_template("report.html.j2")


def render_html(report: Report) -> str:
    """Return the whole page, verdict first."""
    script, rows = _part("report.js"), layer_rows(report)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    latency = report.latency_ms
    text = _template().render(
        r=report,
        title=verdict_title(report),
        tone=tone(report),
        bits=(weight_bits(report), activation_bits(report)),
        headline=headline(report),
        failures=failures(report),
        quantity_of=quantity_of,
        scores=_scores(report),
        layers=rows,
        noisiest=noisiest(rows),
        grades=_GRADES,
        linked=linker(rows),
        details=_script_data(layer_details(rows)),
        levels=_levels(report),
        reconstruction=_reconstruction(report),
        lapq=_lapq(report),
        sensitivity=_sensitivity(report),
        mixed=_mixed(report),
        sizes=_parts(({"FLOAT": "float32"}.get(name, name.lower()), n) for name, n in report.size.by_type.items()),
        times=_parts(vars(report.time_s).items()),
        time_shares=_time_shares(report.time_shares),
        other=other_runtime(report.target),
        timed_in=TIMED_IN,
        speed=speed(latency) if latency else None,
        shrink=_quotient(report.size.float_bytes, report.size.bytes),
        found_on=found_on,
        where=tuple(where_rows(report.holds or (), report.emission.min_onnxruntime if report.emission else None)),
        environment=vars(report.environment) if report.environment else {},
        config_text=dump_json(report.config or {}),
        difference=sections(report.baseline) if report.baseline else (),
        difference_summary=summary(report.baseline) if report.baseline else (),
        style=Markup(_part("colours.css") + _part("report.css")),
        script=Markup(script),
        script_digest=digest,
    )
    return text.encode("utf-8", "replace").decode()  # a name with a lone surrogate must not stop the export


def _levels(report: Report) -> list[dict[str, Any]]:
    """Return the optimization levels, the deployed one first, and OpenVINO where it was asked for."""
    parity = report.parity
    off = "float arithmetic between dequantize and quantize"
    rows = [
        ("Optimizations on", "integer kernels, as deployed", "", parity.optimized, True),
        ("Optimizations off", off, UNOPTIMIZED_DIFFERS, parity.unoptimized, False),
    ]
    if parity.openvino:
        note = "every kernel from its own inputs; differences of one step next to ties are allowed"
        rows.append((f"OpenVINO {parity.openvino.version}", note, OPENVINO_DIFFERS, parity.openvino, True))
    return [
        {"title": title, "note": note, "why": why if level.mismatched else "", "level": level, "gated": gated}
        for title, note, why, level, gated in rows
    ]


def _time_shares(shares: TimeShares | None) -> list[dict[str, Any]]:
    """Return the shares of the runtime's time for a stacked bar."""
    if shares is None:
        return []
    titles = {"integer": "integer kernels", "float": "float operators", "quantizers": "quantizers", "moves": "moves"}
    return _parts((title, getattr(shares, name)) for name, title in titles.items())


def _parts(items: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Return the parts of a whole with their shares, for a stacked bar."""
    numbers = [(name, measured(value) or 0.0) for name, value in items]
    total = sum(value for _, value in numbers)
    return [{"name": name, "value": value, "share": _share(value, total)} for name, value in numbers]
