"""The HTML page and the JUnit file: what they show, what they escape, what they may never contain."""

from __future__ import annotations

import copy
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import xmlschema

from exporter.reporting import headline as wording
from exporter.reporting import html as pages
from exporter.reporting import junit
from exporter.reporting.layer_table import layer_rows, linker, noisiest
from exporter.reporting.number_format import (
    compact,
    count,
    decibel,
    duration,
    percent,
    points,
    significant,
    size,
)
from exporter.reporting.plots import error_plot, loss_plot, matrix_plot
from exporter.reporting.schema import dump, validate_report
from runtime_tests.parity.results import Level
from tests.exporter.reporting.sample_report import failing, infected, layer, sample_report
from tests.support.html_page import HtmlPage

# Limit of a page of 500 layers with a section of every method: it is attached to mails and kept by CI for every build.
MAX_BYTES = 1_000_000
OPTIONAL = ("tool", "model", "environment", "layers", "saturation", "simplifier", "emission", "lint", "warnings",
            "config", "data", "reconstruction", "lapq", "sensitivity", "mixed_precision", "ladder", "rules",
            "preparation", "settled", "limited_weights", "unsigned_weights",
            "portability", "metric", "sizes")  # fmt: skip
STEPS = {"samples": 8, "step": 0.1}
UNMEASURED = {"hessian": [[None]], "share": None, "eigenvalues": [], "mean_diagonal": None, "mean_off_diagonal": None,
              "p": 2.0, "powers": []}  # fmt: skip

HUNDREDTH = 0.01001
"""Points to which coordinates of a figure are written; the rest is the error of floats."""


def headline(report: dict[str, Any]) -> str:
    return wording.headline(validate_report(report))


def render_html(report: dict[str, Any]) -> str:
    return pages.render_html(validate_report(report))


def render_junit(report: dict[str, Any]) -> str:
    return junit.render_junit(validate_report(report))


def _bare() -> dict[str, Any]:
    report = {key: value for key, value in sample_report().items() if key not in OPTIONAL}
    report["accuracy"] = report["latency_ms"] = None
    report["fold"] = {"regions": 0, "max_rel_error": 0.0, "refused": [], "folded": []}
    report["parity"] = {key: asdict(Level.of([], [], samples=0)) for key in ("unoptimized", "optimized")}
    report["coverage"] |= {"integer_nodes": 0, "compute_nodes": 0, "integer_macs": 0.0, "float_nodes": [], "by_op": {}}
    report["size"] = {"float_bytes": 0, "bytes": 0, "by_type": {}}
    return report


@pytest.mark.parametrize(
    "report",
    [sample_report(1), sample_report(3), sample_report(500), failing(), _bare()],
    ids=["1-layer", "3-layers", "500-layers", "failing", "fixed-keys-only"],
)
def test_page_is_well_formed_small_and_offline(report: dict[str, Any]) -> None:
    html = render_html(report)
    page = HtmlPage(html)
    assert len(html.encode()) < MAX_BYTES
    assert "default-src 'none'" in html
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert value is not None and value.startswith("#"), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", html)


def test_verdict_comes_first_and_says_what_was_proved() -> None:
    report = sample_report(3)
    page = HtmlPage(render_html(report))
    assert next(attributes for tag, attributes in page.tags if tag == "section")["class"] == "verdict pass"
    assert headline(report) == (
        "All 1,204,224 integers in the runtime equal those of the calibrated model, "
        "and the outputs are identical bit for bit."
    )
    assert headline(report) in page.text


def test_surprises_of_the_runtime_are_shown() -> None:
    report = sample_report(3)
    assert "as planned" in HtmlPage(render_html(report)).text
    report["parity"]["optimized"].update(violations=2, unplanned={"QLinearConv": -3})
    page = HtmlPage(render_html(report))
    assert "3 QLinearConv fewer than planned" in page.text
    assert "sites and outputs that differ by more than is allowed" in page.text
    assert sum(attributes.get("class") == "bad" for tag, attributes in page.tags if tag == "dd") == 2


def test_headline_never_claims_more_than_was_measured() -> None:
    report = sample_report(9)
    assert headline(report).endswith("End to end, 3 of 3,612,672 integers differ, by at most 1 step.")
    assert headline(report).startswith("From its own inputs, every integer kernel")
    report["parity"]["optimized"]["kernel_mismatched"] = 1
    assert headline(report) == "End to end, 3 of 3,612,672 integers differ, by at most 1 step."
    report["parity"]["optimized"].update(mismatched=0, outputs_identical=False)
    assert "identical" not in headline(report)
    assert headline(_bare()) == "No value was compared."


def test_failing_verdict_names_the_gate_the_value_and_the_rest() -> None:
    page = HtmlPage(render_html(failing()))
    assert (
        headline(failing())
        == "Gate accuracy_drop<=0.01 failed: it is 3.41 points, the limit is 1 point. 1 more of 2 gates failed."
    )
    assert "not measured" in page.text
    assert next(attributes for tag, attributes in page.tags if tag == "section")["class"] == "verdict fail"


def test_every_block_shows_its_numbers() -> None:
    text = " ".join(HtmlPage(render_html(sample_report(9))).text.split())
    for shown in (
        "90.35 %", "88.98 % … 91.57 %", "[−0.12, 0.32]", "99.10 %", "31.4 dB", "41 of 3,612,672", "99.87 %",
        "14 of 16 compute nodes", "head.norm", "kept in float by --exclude", "21.5 dB", "a ReLU stands between",
        "3.1e-15", "7.99 MB", "int8", "3.17x faster", "37.4 s", "61,200", "Needs VNNI", "bias scale was widened",
        "fell from 58 to 57", "avx512_vnni", "7,839,146", "float32[batch, 3, 64, 64]", "abababababababab…",
        '"grid": 80', "2 channels of stages.0.0.conv are dead", "1,024", "7 of 9 units improved", "stages.2.0",
        "0.0222", "0.0167", "75.0 %", "0.20 %", "1 min 52 s", "3.22 GB of activations",
        "0.0198 → 0.0121 in 287 evaluations, 1 min 11 s", "on 512 calibration samples", "min-max", "0.0812",
        "vertex of the parabola at p = 2.5, tried at p = 2.5 with a loss of 0.02", "1.843", "20.0 % coupling",
        "5.0 % coupling", "0.005 … 0.88", "first and last layer", "stem.conv, head",
        "granularity tensor, symmetric true", "none: later rules decide",
        "1 pair equalized in 17 sweeps", "0.775 … 24.5", "0.54", "its result has 2 readers", "2 layers with absorbed",
        "57 of 64", "38.2 dB", "40.5 dB", "uint8 weights in 1 layer", "stages.1.0.add", "−23",
        "1 of 7 kernels differ", "31 of 65,536", "x86-avx2, arm64", "5 of 48", "3.22", "exact", "0.00076",
        "the input of stages.0.0.conv is padded with zeros",
        "0 of 12,544 integers of 16 samples differ; outputs identical", "✓ proved",
        "top1 on 2,000 held-out samples (the reference program on the first 512)",
        "measured until the intervals were tight",
    ):  # fmt: skip
        assert shown in text, shown


@pytest.mark.parametrize("key", OPTIONAL)
def test_a_missing_block_is_not_drawn(key: str) -> None:
    report = sample_report(3)
    del report[key]
    text = HtmlPage(render_html(report)).text
    headings = {
        "layers": "8 / 8", "saturation": "16-bit saturation", "simplifier": "Simplifier",
        "settled": "Ties between processors", "limited_weights": "Coarser scales", "unsigned_weights": "uint8 weights",
        "model": "parameters", "environment": "Environment", "warnings": "1 warning", "data": "sha256",
        "config": "Configuration", "lint": "Rules of the target", "tool": "intact 0.1.0", "emission": "opset",
        "reconstruction": "Reconstruction", "lapq": "Search of scales", "rules": "Rules for layers",
        "preparation": "Ranges of neighbouring layers", "sensitivity": "Sensitivity",
        "mixed_precision": "Mixed precision", "ladder": "Methods tried", "portability": "Cost of portability",
        "metric": "mean_iou", "sizes": "Free sizes",
    }  # fmt: skip
    assert headings[key] in HtmlPage(render_html(sample_report(3))).text
    assert headings[key] not in text


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "</style><b>", "$x_1$ & 层"]
)
def test_names_are_escaped_everywhere(hostile: str) -> None:
    report = sample_report(6)

    ill = infected(report, hostile)
    clean, page = HtmlPage(render_html(report)), HtmlPage(render_html(ill))
    shapes = [[tag for tag, _ in each.tags if tag not in ("a", "wbr")] for each in (page, clean)]
    assert shapes[0] == shapes[1]
    assert json.loads(_details(render_html(ill))), "the data of the script stay JSON"
    assert page.text.count(hostile) > 50
    assert {name for _, attributes in page.tags for name in attributes} == {
        name for _, attributes in clean.tags for name in attributes
    }
    ET.fromstring(render_junit(ill))


def test_only_the_script_of_the_template_may_run() -> None:
    html = render_html(sample_report(3))
    assert html.count("<script>") == 1
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}='", html)


def test_rendering_is_deterministic_and_leaves_the_report_alone() -> None:
    report = sample_report(5)
    before = copy.deepcopy(report)
    assert render_html(report) == render_html(report)
    assert render_junit(report) == render_junit(report)
    assert report == before


def test_plots_follow_the_theme_and_share_no_ids() -> None:
    html = render_html(sample_report(9))
    figures = re.findall(r'<svg class="figure".*?</svg>', html, flags=re.DOTALL)
    assert len(figures) == 4
    for figure in figures:
        assert "var(--accent)" in figure and "var(--muted)" in figure and "#0102" not in figure
        assert "font-family" not in figure
        assert "matplotlib" not in figure.lower() and "<metadata" not in figure
        assert "fill: #ffffff" not in figure, "a white background in a dark page"
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def _details(html: str) -> str:
    (found,) = re.findall(r'<script type="application/json" id="layer-details">(.*?)</script>', html, flags=re.DOTALL)
    return str(found)


def test_histograms_are_logarithms_of_densities() -> None:
    report = sample_report(1)
    floats = [0, 2, 0, 0, *[0, 1, 100, 1] * 2, 0, 0, 0, 0]  # four bins of floats to a code
    report["layers"] = [layer(0) | {"bits": 1, "floats": floats, "codes": [8, 0]}]
    ((_, ((_, _, drawn, codes, *_),)),) = json.loads(_details(render_html(report)))["layers"]
    heights = [int(digit, 36) for digit in drawn]
    assert [height > 0 for height in heights] == [count > 0 for count in floats]
    assert max(heights) == heights[6] == 35 and heights[1] > heights[5] > 0
    assert codes == drawn[1] + "0", "8 codes over four bins are as dense as 2 floats in one"


def test_layers_are_rows_in_the_order_of_the_graph() -> None:
    report = sample_report(9)
    report["layers"].insert(0, layer(0) | {"site": "image", "module": "", "op": "image"})
    report["parity"]["optimized"]["nodes"][2] |= {"mismatched": 7, "max_lsb": 2}
    rows = layer_rows(validate_report(report))
    assert [row.name for row in rows] == ["image", *(f"stages.{i // 4}.{i % 4}.conv" for i in range(9))]
    assert [row.anchor for row in rows] == [f"layer-{number}" for number in range(1, 11)]
    first = rows[1]
    assert (first.kernel, first.macs, first.bytes, first.time) == ("QLinearConv", 100_000, 2_000, 1 / 81)
    assert first.weight is not None and first.result is not None and first.grade == "4"
    assert rows[7].grade == "f" and not rows[7].integer
    assert rows[3].notes() == ["7 of 401,408 integers differ, by at most 2"]
    worst = min(rows, key=lambda row: math.inf if row.added_db is None else row.added_db)
    assert noisiest(rows)[0] is worst and len(noisiest(rows)) == 3 and noisiest(rows[:3]) == []


def test_layers_without_sites_and_sites_without_layers_have_rows() -> None:
    report = sample_report(2)
    first, second = report["coverage"]["nodes"]
    first |= {"writes": None, "macs": None}
    second |= {"reads": ["stages.0.0.conv.activation"], "writes": "stages.0.1.conv.activation", "module": ""}
    rows = layer_rows(validate_report(report))
    assert [(row.name, row.macs) for row in rows] == [
        ("stages.0.0.conv", None),
        ("stages.0.0.conv.activation", None),
        ("stages.0.1.conv.Conv_token_1", 200_000),
        ("stages.0.1.conv.weight", None),
    ]
    report["coverage"]["nodes"], report["time_shares"] = [], None
    assert len(layer_rows(validate_report(report))) == 4, "reports of earlier versions have sites only"
    HtmlPage(render_html(report))


def test_findings_lead_to_layers() -> None:
    link = linker(layer_rows(validate_report(sample_report(3))))
    assert link("stages.0.1.conv.weight") == '<a href="#layer-2">stages.0.1.conv.weight</a>'
    assert link("2 of stages.0.2.conv, <b>") == '2 of <a href="#layer-3">stages.0.2.conv</a>, &lt;b&gt;'
    assert link("stages.0.2.convolution") == "stages.0.2.convolution"
    assert link("in stages.0.2") == 'in <a href="#layer-3">stages.0.2</a>', "the first layer of a module"
    assert link("stages") == '<a href="#layer-1">stages</a>' and link("all stages") == "all stages"
    report = sample_report(3)
    report["coverage"]["nodes"][0]["module"] = "head"
    link = linker(layer_rows(validate_report(report)))
    assert link("head") == '<a href="#layer-1">head</a>' and link("the head of it") == "the head of it"
    html = render_html(sample_report(3))
    for anchor in re.findall(r'href="#([^"]+)"', html):
        assert html.count(f' id="{anchor}"') == 1, anchor


@pytest.mark.parametrize(
    "change",
    [
        {"floats": [], "codes": []}, {"floats": [0] * 72, "codes": [0] * 64}, {"clipped": None},
        {"observed_lo": None, "observed_hi": None}, {"lo": 0.0, "hi": 0.0},
        {"observed_lo": 0.0, "observed_hi": 0.0, "lo": 0.0, "hi": 0.0}, {"sqnr_db": None}, {"sqnr_db": math.inf},
        {"sqnr_db": -3.0}, {"sqnr_db": math.nan},
    ],
    ids=repr,
)  # fmt: skip
def test_degenerate_layers_are_drawn(change: dict[str, Any]) -> None:
    report = sample_report(4)
    report["layers"][1].update(change)
    html = render_html(report)
    assert not re.search(r"\bnan\b", html, flags=re.IGNORECASE)
    HtmlPage(html)
    report["layers"] = [report["layers"][1]]
    HtmlPage(render_html(report))


@pytest.mark.parametrize(
    "change",
    [
        {"after": 0.0},
        {"before": None, "after": None},
        {"before": 0.0, "after": 0.0},
        {"before": math.inf},
        {"seconds": None},
    ],
    ids=repr,
)
def test_degenerate_units_are_drawn(change: dict[str, Any]) -> None:
    report = sample_report(4)
    report["reconstruction"]["units"][1].update(change)
    html = render_html(report)
    assert not re.search(r"\bnan\b", html, flags=re.IGNORECASE)
    HtmlPage(html)
    report["reconstruction"]["units"] = [report["reconstruction"]["units"][1]]
    HtmlPage(render_html(report))
    report["reconstruction"]["units"] = []
    assert "units improved" not in render_html(report)


def test_the_curve_of_errors_has_a_point_per_unit_on_a_logarithmic_axis() -> None:
    svg = error_plot([10.0**-i for i in range(5)], [10.0 ** (-i - 1) for i in range(5)], salt="x")
    before, after = (
        [float(y) for y in re.findall(rf'<use [^>]*y="([\d.]+)" style="fill: var\(--{color}\)', svg)]
        for color in ("muted", "accent")
    )
    steps = [b - a for curve in (before, after) for a, b in pairwise(curve)]
    assert len(before) == len(after) == 5
    assert min(steps) > 0 and max(steps) - min(steps) <= 2 * HUNDREDTH, "equal ratios are equal distances"


def test_units_that_were_joined_are_told_with_the_errors_that_decided_it() -> None:
    report = sample_report(4)
    assert "before neighbours were joined" not in render_html(report)
    names = [f"early.{i}" for i in range(6)]
    report["reconstruction"]["grouping"] = {
        "granularity": "loss",
        "units_before": names,
        "losses": [0.1 / (i + 1) for i in range(6)],
    }
    html = render_html(report)
    assert "6 units before neighbours were joined (loss)" in HtmlPage(html).text
    assert all(name in html for name in names)
    assert html.count('<svg class="figure"') == render_html(sample_report(4)).count('<svg class="figure"') + 1
    report["reconstruction"]["grouping"] |= {
        "groups": [[1, 2], [4, 5]],
        "losses_after": [0.08 / (i + 1) for i in range(6)],
    }
    both = render_html(report)
    assert "joined as shaded" in both and "every unit trained alone" in both
    assert both.count("opacity: 0.18") == html.count("opacity: 0.18") + 2, "one band per group"
    report["reconstruction"]["grouping"] = {"granularity": "block", "units_before": names[:4]}
    assert "before neighbours were joined" not in render_html(report)


def test_the_fitted_parabola_has_its_lowest_point_at_the_vertex() -> None:
    powers = {p: (p - 2.25) ** 2 + 1 for p in (1.0, 2.0, 3.0, 4.0)}
    svg = loss_plot(powers, [1.0, -4.5, 2.25**2 + 1], 2.25, "x")
    (line,) = re.findall(r'<path d="([^"]+)"[^>]*style="[^"]*stroke: var\(--warn\); stroke-width: 1.4', svg)
    curve = [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line)]
    (vertex,) = re.findall(r'<path d="M ([\d.]+) [^"]*"[^>]*stroke-dasharray', svg)
    dots = [float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)" [^>]*style="fill: var\(--accent\)', svg)]
    assert len(dots) == 4
    unit = dots[2] - dots[1]
    assert float(vertex) == pytest.approx(dots[1] + unit / 4, abs=HUNDREDTH)
    lowest, _ = max(curve, key=lambda point: point[1])  # y grows downwards
    assert abs(lowest - float(vertex)) < unit / 50, "as near as the polyline tells"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"parabola": {"coefficients": [], "vertex": None, "verdict": "2 values"}}, id="no parabola"),
        pytest.param({"parabola": {"coefficients": [-1.0, 2.0, 9.0], "vertex": None, "verdict": "a hill"}}, id="hill"),
        pytest.param({"powers": [{"p": 1.0, "loss": None}, {"p": 2.0, "loss": math.inf}]}, id="nothing finite"),
        pytest.param({"powers": [{"p": 1.0, "loss": 0.5}, {"p": 2.0, "loss": 0.5}]}, id="flat"),
        pytest.param({"losses": {"minmax": None, "init": math.inf, "final": 0.0, "new": 0.5}}, id="odd losses"),
        pytest.param({"multipliers": {}}, id="nothing searched"),
        pytest.param({"landscape": {"sites": [], **STEPS, "bits": {}}}, id="empty landscape"),
        pytest.param({"landscape": {"sites": ["a"], **STEPS, "bits": {"4": UNMEASURED}}}, id="unmeasured"),
    ],
)  # fmt: skip
def test_degenerate_searches_are_drawn(change: dict[str, Any]) -> None:
    report = sample_report(3)
    report["lapq"] |= change
    html = render_html(report)
    assert not re.search(r"\bnan\b", html, flags=re.IGNORECASE)
    HtmlPage(html)
    assert dump(validate_report(report))["lapq"].keys() == sample_report(3)["lapq"].keys()


def test_the_choice_stands_in_the_front_and_its_bits_among_the_sensitivities() -> None:
    html = render_html(sample_report(9))
    text = HtmlPage(html).text
    for shown in ("avg_weight_bits<=4.25", "4.2 bits per weight on average", "in the network found: 0.87", "all 4",
                  "512 calibration samples", "31"):  # fmt: skip
        assert shown in text, shown
    assert "bits per weight" in text and html.count("<b>0.0") + html.count("<b>0.00") >= 9, "chosen bits are bold"
    assert "mean bits of a weight" in html and "added loss" in html


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"front": []}, id="no front"),
        pytest.param({"rank_correlation": None}, id="no correlation"),
        pytest.param({"axis": "bops"}, id="bit operations"),
    ],
)
def test_degenerate_allocations_are_drawn(change: dict[str, Any]) -> None:
    report = sample_report(3)
    report["mixed_precision"] |= change
    for scale in report["sensitivity"]["scales"]:
        for width in scale["widths"]:
            width |= {"loss": None, "accuracy_drop": None}
    html = render_html(report)
    assert not re.search(r"\bnan\b", html, flags=re.IGNORECASE)
    HtmlPage(html)
    dump(validate_report(report))
    report["sensitivity"]["scales"] = report["sensitivity"]["scales"][:1]
    HtmlPage(render_html(report))


def test_names_that_are_keys_are_escaped() -> None:
    report = sample_report(3)
    hostile = "<img src=x onerror=alert(1)>"
    report["lapq"]["multipliers"][hostile] = 1.0
    report["lapq"]["losses"][hostile] = 1.0
    page = HtmlPage(render_html(report))
    assert page.text.count(hostile) == 2 and "img" not in {tag for tag, _ in page.tags}


def test_a_matrix_is_drawn_cell_by_cell() -> None:
    svg = matrix_plot([[4.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, float("nan")]])
    assert 'viewBox="0 -0.5 3 3"' in svg, "lines of width 1 run through the middle of the cells"
    cells = {
        (css, float(opacity)): path
        for css, opacity, path in re.findall(r'class="(\w+)" opacity="([\d.]+)" d="([^"]+)"', svg)
    }
    assert cells == {
        ("plus", 1.0): "M0 0h1",
        ("plus", 0.5): "M1 1h2M1 2h1",
        ("minus", 0.5): "M1 0h1M0 1h1",
    }
    assert len(matrix_plot([[1.0 + (i * j) % 7 for j in range(150)] for i in range(150)])) < 500_000


def test_the_page_shows_every_output_the_users_metric_and_free_sizes() -> None:
    page = HtmlPage(render_html(sample_report(9))).text
    words = " ".join(page.split())
    assert "output logits , same decision in 99.10 % 31.4 dB" in words and "output index identical" in words
    assert "mean_iou in the runtime, 0.71 with the float model 0.7" in page
    assert "Free sizes: height, width of image. Compared on samples of 3 × 32 × 32, 3 × 49 × 16." in page


def test_without_labels_the_page_shows_agreement() -> None:
    report = sample_report(3)
    report["accuracy"].update(metric="agreement", float=None, reference=None, runtime=None, top5=None, drop_ci=None)
    text = HtmlPage(render_html(report)).text
    assert "agreement with float" in text
    assert "top1 in the runtime" not in text and "agreement in the runtime" not in text


def test_without_classes_the_page_shows_decibels() -> None:
    report = sample_report(3)
    report["accuracy"].update(metric="sqnr_db", float=None, reference=38.5, runtime=38.3346, top5=None, drop_ci=None)
    text = HtmlPage(render_html(report)).text
    assert "38.3 dB" in text and "3833" not in text


def test_the_page_says_where_the_time_goes_and_what_helps() -> None:
    report = sample_report(3)
    text = HtmlPage(render_html(report)).text
    assert "62 % of the time" in text and "quantizers 12.0 %" in text
    assert "batch norm folds into the layer before it" in text
    report["coverage"] |= {"integer_macs": None, "uncounted": ["Scan loop"]}
    text = HtmlPage(render_html(report)).text
    assert "An unknown share of multiply-accumulates" in text and "cannot be counted: Scan loop" in text


def test_differences_that_are_no_faults_are_explained_where_they_are_shown() -> None:
    report = sample_report(3)
    words = "without optimizations onnxruntime computes in float32"
    assert report["parity"]["unoptimized"]["mismatched"] and words in HtmlPage(render_html(report)).text
    report["parity"]["unoptimized"]["nodes"][1].update(mismatched=9)
    noted = [each.text or "" for each in ET.fromstring(render_junit(report)).iter("system-out")]
    assert any("9 of 401,408" in text and words in text for text in noted)
    report["parity"]["unoptimized"]["mismatched"] = 0
    assert words not in HtmlPage(render_html(report)).text


def test_what_grew_and_slowed_down_is_said_so() -> None:
    report = sample_report(3)
    report["size"] |= {"float_bytes": 1000, "bytes": 2500}
    report["latency_ms"] |= {"float": 1.0, "quantized": 4.0, "ratio": 4.0, "ratio_interval": [3.9, 4.1]}
    text = HtmlPage(render_html(report)).text
    assert "2.50x larger" in text and "4.00x slower" in text


def test_junit_opens_with_one_suite_per_group() -> None:
    root = ET.fromstring(render_junit(sample_report(9)))
    suites = {suite.get("name"): suite for suite in root.iter("testsuite")}
    assert list(suites) == [
        "intact.gates", "intact.parity.optimized", "intact.parity.unoptimized", "intact.proved_on", "intact.fold",
        "intact.coverage", "intact.lint",
    ]  # fmt: skip
    assert [suite.get("tests") for suite in suites.values()] == ["5", "11", "10", "2", "4", "3", "1"]
    assert [suite.get("skipped") for suite in suites.values()] == ["0", "0", "0", "0", "1", "2", "0"]
    assert root.findall(".//failure") == []


@pytest.mark.parametrize("missing", ["", "lint", "proved_on", "golden"])
def test_junit_is_valid_for_jenkins(missing: str) -> None:
    """Jenkins' schema refuses a suite without a case."""
    report = {key: value for key, value in sample_report(9).items() if key != missing}
    report["gates"] = [gate | {"passed": False} for gate in report["gates"]]
    schema = xmlschema.XMLSchema(Path(__file__).with_name("jenkins-junit-10.xsd"))
    schema.validate(ET.fromstring(render_junit(report)))


def test_junit_failures_carry_the_message() -> None:
    report = failing()
    report["lint"] = [{"rule": "axis", "severity": "error", "where": "fc", "message": "axis is 1"}]
    report["parity"]["optimized"]["kernel_mismatched"] = 2
    report["parity"]["optimized"]["nodes"][0].update(mismatched=2, max_lsb=1, legal=False)
    report["parity"]["optimized"]["outputs"][0].update(legal=False, relative=0.00123)
    report["parity"]["optimized"]["unplanned"] = {"QLinearConv": -1, "QGemm": 2}
    report["parity"]["unoptimized"]["nodes"][1].update(mismatched=9, legal=False)
    messages = [failure.get("message") for failure in ET.fromstring(render_junit(report)).iter("failure")]
    assert messages == [
        "Gate accuracy_drop<=0.01 failed: it is 3.41 points, the limit is 1 point",
        "Gate agreement>=0.9 failed: it was not measured, the limit is 90 %",
        "2 of 401,408 values differ, by at most 1 (QLinearConv)",
        "the output differs by 0.00123 of its largest value",
        "1 QLinearConv fewer than planned, 2 QGemm more than planned",
        "axis is 1",
    ]


def test_junit_survives_characters_that_xml_cannot_hold() -> None:
    report = validate_report(failing())
    level = report.parity.optimized
    strange = replace(level, nodes=(replace(level.nodes[0], site="conv\x00\x1b\ud800"), *level.nodes[1:]))
    report = replace(report, parity=replace(report.parity, optimized=strange))
    root = ET.fromstring(junit.render_junit(report))
    assert root.find(".//testsuite[@name='intact.parity.optimized']/testcase").get("name") == "conv���"  # type: ignore[union-attr]
    assert "conv" in pages.render_html(report)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (count, 12_345_678, "12,345,678"), (count, None, "–"), (count, math.nan, "–"),
        (compact, 999, "999"), (compact, 9_999, "9,999"), (compact, 12_345, "12.3 k"), (compact, 12_345_678, "12.3 M"),
        (percent, 0.9035, "90.35 %"), (percent, 1.0, "100.00 %"), (percent, 0.999999, "99.99 %"),
        (percent, 0.0, "0.00 %"), (percent, 1e-7, "0.01 %"), (percent, None, "–"),
        (points, 0.001, "0.10 points"), (points, -0.0012, "−0.12 points"),
        (decibel, 31.42, "31.4 dB"), (decibel, math.inf, "exact"),
        (size, 512, "512 B"), (size, 2048, "2.05 kB"), (size, 999_999, "1 MB"), (size, 7_991_296, "7.99 MB"),
        (size, 3 * 2**30, "3.22 GB"),
        (duration, 2.14, "2.1 s"), (duration, 83.0, "1 min 23 s"), (duration, 59.7, "1 min 00 s"),
        (significant, -0.00012345, "−0.0001234"), (significant, 3.1e-15, "3.1e-15"),
    ],
)  # fmt: skip
def test_numbers_read_well(function: Any, value: object, text: str) -> None:
    assert function(value) == text
