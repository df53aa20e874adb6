"""The page in a real browser: what it shows at three widths, by keyboard, to a screen reader and on paper."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from exporter.pipeline import export
from exporter.reporting.html import render_html
from exporter.reporting.schema import validate_report
from tests.exporter.reporting.sample_report import failing, infected, sample_report, with_openvino
from tests.support.architectures import construct
from tests.support.browser import AXE, Browser, Page, chromium

HOSTILE = "\"'><img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>\u2028 😈" + "w" * 200
PAPER = 718
"""Pixels between the margins of a portrait A4 page."""

REQUIRED = "INTACT_REQUIRED_BROWSER"
"""Environment variable with which a missing browser is a failure."""

SCREENSHOTS = "INTACT_SCREENSHOTS"
"""Environment variable that names a folder for a picture of each report at each width."""

WIDER = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .skip, svg') &&
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 120))"""
# Wide figures scroll on a screen, not on paper.
CLIPPED = """[...document.querySelectorAll('.scroll, .panel, td, dd, .tiles div')].filter(e => e.offsetParent &&
  e.scrollWidth > e.clientWidth + 1 && (PAPER || !e.querySelector('.figure, #map')))
  .map(e => e.outerHTML.slice(0, 120))"""
VIOLATIONS = """axe.run().then(found => found.violations.filter(each => ['serious', 'critical'].includes(each.impact))
  .map(each => [each.id, each.help, each.nodes.slice(0, 3).map(node => node.html.slice(0, 200))]))"""
ORDER = "[...document.querySelectorAll('#layer-table tbody tr[data-path] a')].map(a => a.textContent)"
SHOWN = "[...document.querySelectorAll('#layer-table tbody tr[data-path]')].filter(r => r.offsetParent).length"


def _small() -> dict[str, Any]:
    report = sample_report(9)
    for key in ("lapq", "ladder", "mixed_precision", "sensitivity", "reconstruction", "rules", "preparation"):
        del report[key]
    return report


def _exported() -> dict[str, Any]:
    """Export a network with float operators, low bits and an output that no kernel quantizes."""
    network, images = construct("vit", batch=16)
    with tempfile.TemporaryDirectory() as out:
        return export(network, images, eval_data=images, out=Path(out) / "vit", weight_bits=4, latency_runs=3)


REPORTS = {
    "pass": _small,
    "fail": failing,
    "budget": lambda: sample_report(9),
    "openvino": lambda: with_openvino(_small()),
    "large": lambda: sample_report(300),
    "export": _exported,
    "hostile": lambda: infected(sample_report(6), HOSTILE),
}
THREE_WIDTHS = pytest.mark.parametrize("width", [360, 768, 1280])
EVERY_REPORT = pytest.mark.parametrize("name", REPORTS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium()
    if program is None:
        reason = "no Chromium: `make browser` installs it where apt may, INTACT_CHROMIUM names another one"
        (pytest.fail if REQUIRED in os.environ else pytest.skip)(reason)
    with Browser(program) as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


def page_of(name: str, folder: Path) -> Path:
    """Return the path of a report's page."""
    path = folder / f"{name}.html"
    path.write_text(_html(name), encoding="utf-8")
    return path


@cache
def _html(name: str) -> str:
    return render_html(validate_report(REPORTS[name]()))


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(400):
        page.press("Tab")
        if page.run(f"document.activeElement.matches({json.dumps(selector)})"):
            return
    pytest.fail(f"no {selector} can be reached with the keyboard")


def follow(page: Page, anchor: str) -> None:
    """Go to an anchor, and wait until the page has acted on it."""
    go = f"location.hash = '{anchor}'"
    page.run(
        f"new Promise(done => {{ addEventListener('hashchange', () => setTimeout(done), {{ once: true }}); {go} }})"
    )


def opened(page: Page) -> None:
    """Open everything that can be opened."""
    page.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    follow(page, "layer-1")


def test_the_page_works_in_a_browser(browser: Browser, folder: Path) -> None:
    """One case in every run of the tests; the lane `browser` has the rest."""
    with browser.page(page_of("pass", folder), 360) as page:
        assert page.run(WIDER) == [] and page.errors == []
        before = page.run(ORDER)
        tab_to(page, "#layer-table th[data-sort] button")
        page.press("Enter")
        assert page.run(ORDER) == before and page.run("document.querySelector('th[aria-sort]').ariaSort") == "ascending"
        page.press("Enter")
        assert page.run(ORDER) == before[::-1]
        follow(page, "layer-2")
        assert page.run("document.querySelectorAll('#details svg.histogram').length") == 2
        assert page.errors == []


@pytest.mark.browser
@THREE_WIDTHS
@EVERY_REPORT
def test_nothing_overflows_and_the_console_is_silent(browser: Browser, folder: Path, name: str, width: int) -> None:
    with browser.page(page_of(name, folder), width) as page:
        if shots := os.environ.get(SCREENSHOTS):
            Path(shots, f"{name}-{width}.png").write_bytes(page.screenshot())
        opened(page)
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run(WIDER) == []
        assert page.run(CLIPPED.replace("PAPER", "false")) == [] or name == "hostile", "words of 200 letters scroll"
        assert page.errors == []
        assert page.run("window.hacked") is None


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@EVERY_REPORT
def test_axe_finds_nothing_serious(browser: Browser, folder: Path, name: str, dark: bool) -> None:
    if not AXE.is_installed:
        reason = "axe-core is not installed: `make browser` installs it"
        (pytest.fail if REQUIRED in os.environ else pytest.skip)(reason)
    source = (AXE.folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    with browser.page(page_of(name, folder), 1280, dark=dark) as page:
        opened(page)
        page.run(source)
        assert page.run(VIOLATIONS) == []


@pytest.mark.browser
@EVERY_REPORT
def test_tables_are_whole_on_paper(browser: Browser, folder: Path, name: str) -> None:
    with browser.page(page_of(name, folder), PAPER) as page:
        page.print_media()
        assert page.run(CLIPPED.replace("PAPER", "true")) == [] and page.run(WIDER) == []
        assert page.run(SHOWN) == page.run(f"{ORDER}.length")


def number_in(text: str) -> float:
    """Return the number that a cell shows."""
    number, _, unit = text.partition(" ")
    factors = {"": 1, "%": 1, "B": 1, "k": 1e3, "M": 1e6, "G": 1e9, "kB": 1e3, "MB": 1e6}
    return math.inf if text == "exact" else float(number.replace(",", "").replace("−", "-")) * factors[unit]


@pytest.mark.browser
@THREE_WIDTHS
def test_every_column_sorts_by_its_values(browser: Browser, folder: Path, width: int) -> None:
    with browser.page(page_of("budget", folder), width) as page:
        columns = page.run("document.querySelectorAll('#layer-table th').length")
        for column in range(columns):
            page.run(f"document.querySelectorAll('#layer-table th button')[{column}].click()")
            texts = page.run(
                f"[...document.querySelectorAll('#layer-table tbody tr')].map(r => r.cells[{column}].textContent)"
            )
            shown = [text for text in texts if text != "–"]
            assert texts == [*shown, *["–"] * texts.count("–")], "what was not measured comes last"
            numbers = [number_in(text) for text in shown] if column in range(3, columns) else []
            assert numbers == sorted(numbers)


@pytest.mark.browser
def test_layers_are_filtered_and_opened_by_keyboard(browser: Browser, folder: Path) -> None:
    with browser.page(page_of("large", folder), 1280) as page:
        assert page.run(SHOWN) == 30 and page.run("document.querySelector('#shown').textContent") == "300 of 300 layers"
        tab_to(page, "#filter")
        for letter in "stages.8. qlinear":
            page.press(letter)
        assert page.run("document.querySelector('#shown').textContent") == "3 of 300 layers" and page.run(SHOWN) == 3
        tab_to(page, "#layer-table td a")
        page.press("Enter")
        page.run("new Promise(done => setTimeout(done, 50))")
        assert page.run("document.querySelector('#details').previousSibling.offsetParent !== null")
        assert page.run("document.querySelector('#details h3').textContent") == "weights"
        assert page.run("document.activeElement.closest('tr').classList.contains('open')")
        tab_to(page, "#details button")
        page.press("Enter")
        assert page.run("document.querySelector('#details')") is None
        follow(page, "layer-250")
        assert page.run("document.querySelector('#layer-250').classList.contains('open')"), "links end the filter"
        assert page.run(SHOWN) == 300


@pytest.mark.browser
def test_the_map_is_walked_by_arrows_and_filters(browser: Browser, folder: Path) -> None:
    with browser.page(page_of("budget", folder), 1280) as page:
        tab_to(page, "#map button")
        names = []
        for key in ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowUp"):
            page.press(key)
            names.append(page.run("document.activeElement.textContent"))
        assert names == ["0", "1", "0.conv", "1"]
        page.press("Enter")
        assert page.run("document.querySelector('#filter').value") == "stages.1" and page.run(SHOWN) == 4
        wide = "document.querySelector('#map').children[1].style.width"
        before = page.run(wide)
        page.run("const s = document.querySelector('#map-by'); s.value = 'time'; s.dispatchEvent(new Event('change'))")
        assert page.run("document.querySelector('#map button').ariaLabel").endswith("% of time")
        assert page.run(wide) != "" and before != ""


@pytest.mark.browser
def test_findings_open_their_layer(browser: Browser, folder: Path) -> None:
    with browser.page(page_of("budget", folder), 1280) as page:
        page.run("document.querySelector('.note a').click(), new Promise(done => setTimeout(done, 50))")
        assert page.run("document.querySelector('tr.open a').textContent") == "stages.0.0.conv"
        assert page.run("Math.abs(document.querySelector('tr.open').getBoundingClientRect().top) < innerHeight")
