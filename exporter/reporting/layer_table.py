"""The rows of the page's table of layers: each node that computes, with the sites of its weight and of its result.

Sites that no such node writes have rows of their own: inputs, moves, tables. Rows stand in the order of the graph.

Must not know: how pages look, how anything was measured.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import attrgetter
from typing import Any

from markupsafe import Markup, escape

from exporter.reporting.layer_sections import LayerEntry
from exporter.reporting.number_format import decibel, differ, measured, percent, significant
from exporter.reporting.schema import Report
from runtime_tests.measure.histograms import BEYOND
from runtime_tests.parity.results import NodeParity

__all__ = ["LayerRow", "layer_details", "layer_rows", "linker", "noisiest"]

DIGITS = string.digits + string.ascii_lowercase
"""Heights of the bins of a histogram, as the script of the page reads them."""

GRADES = (10.0, 20.0, 30.0, 40.0)
"""Decibels at which the colour of the map changes."""

NOISIEST = 3


@dataclass(frozen=True)
class LayerRow:
    """One row; what is None was not measured or does not exist.

    anchor: id of the row in the page; node: name in the optimized graph, "" where the runtime has no such node.
    """

    anchor: str
    name: str
    module: str
    op: str
    kernel: str
    integer: bool
    node: str = ""
    why: str = ""
    macs: int | None = None
    bytes: int | None = None
    time: float | None = None
    weight: LayerEntry | None = None
    result: LayerEntry | None = None
    parity: NodeParity | None = None

    @property
    def clipped(self) -> float | None:
        """Share of the values of the result that lie beyond its range; of the weight where nothing is written."""
        entry = self.result or self.weight
        return entry.clipped if entry is not None else None

    @property
    def total_db(self) -> float | None:
        """Signal over all noise at the result."""
        return measured(self.result.sqnr_db) if self.result is not None else None

    @property
    def added_db(self) -> float | None:
        """Signal over the noise that the layer itself adds."""
        added = measured(getattr(self.weight, "noise_added", None))
        if added is None:
            return None
        return -10 * math.log10(added) if added > 0 else math.inf

    @property
    def grade(self) -> str:
        """Name of its colour in the map: "0", the noisiest, to "4"; "f" in float, "" where nothing was measured."""
        if not self.integer:
            return "f"
        return "" if self.total_db is None else str(sum(self.total_db >= limit for limit in GRADES))

    def notes(self) -> list[str]:
        """Return sentences on the row, and one if there is nothing else to show of it."""
        found = [self.why] if self.why else []
        if self.parity is not None and self.parity.mismatched:
            found.append(f"{differ(self.parity)} integers differ, by at most {self.parity.max_lsb}")
        return found if found or self.weight or self.result else ["It has no quantized value of its own."]


def layer_details(rows: Sequence[LayerRow]) -> dict[str, list[Any]]:
    """Return what the page shows of opened rows, as its script reads it.

    returns: "layers": for each row its notes and its sites, for each of which title, name, heights of floats and of
             codes, and facts; "grids": the texts that facts number.
    """
    grids: dict[str, int] = {}
    layers = []
    for row in rows:
        entries = (("weights", row.weight), ("result", row.result))
        sites = [_site(title, entry, grids) for title, entry in entries if entry is not None]
        layers.append([row.notes(), sites])
    return {"layers": layers, "grids": [*grids]}


def _site(title: str, entry: LayerEntry, grids: dict[str, int]) -> list[object]:
    grid = f"{entry.bits} bits, one scale per {entry.granularity}{'' if entry.symmetric else ', zero point'}"
    if entry.input_bits:
        grid += f", input of {entry.input_bits} bits"
    if entry.tap_bits:
        grid += f", identity taps of {entry.tap_bits} bits"
    return [
        title,
        entry.site,
        *_heights(entry),
        f"{significant(entry.lo, 3)} … {significant(entry.hi, 3)}",
        f"{significant(entry.observed_lo, 3)} … {significant(entry.observed_hi, 3)}",
        grids.setdefault(grid, len(grids)),
        significant(entry.scale_max, 3),
        significant(entry.zero_point),
        decibel(entry.sqnr_db),
        percent(entry.clipped, 3),
    ]


def _heights(entry: LayerEntry) -> tuple[str, str]:
    """Return the heights of the bins of floats and of codes as digits: the logarithm of the density of values."""
    if not entry.floats or not entry.codes:
        return "", ""
    parts = (len(entry.floats) - 2 * BEYOND) / len(entry.codes)  # of the bins of floats in a bin of codes
    densities = entry.floats, [count / parts for count in entry.codes]
    top = math.log1p(max(map(max, densities))) or 1.0
    last = len(DIGITS) - 1
    floats, codes = (
        "".join(DIGITS[max(1, round(last * math.log1p(density) / top)) if density else 0] for density in each)
        for each in densities
    )
    return floats, codes


def layer_rows(report: Report) -> tuple[LayerRow, ...]:
    """Return the rows of a report."""
    rows = sorted(_rows(report), key=lambda placed: placed[0])
    return tuple(replace(row, anchor=f"layer-{number}") for number, (_, row) in enumerate(rows, start=1))


def _rows(report: Report) -> Iterator[tuple[float, LayerRow]]:
    """Yield every row with its place in the graph: that of its result, or right after what it reads."""
    results = {entry.site: entry for entry in report.layers or () if entry.kind == "activation"}
    weights = {entry.site: entry for entry in report.layers or () if entry.kind == "weight"}
    places = {site: float(place) for place, site in enumerate(results)}
    parity = {node.site: node for node in report.parity.optimized.nodes}
    times = report.time_shares.nodes if report.time_shares else {}
    reasons = {node.name: node.why for node in report.coverage.float_nodes}
    shown: set[str] = set()
    place = 0.0
    for node in report.coverage.nodes:
        weight = next((weights[site] for site in node.reads if site in weights), None)
        result = results.get(node.writes or "") if node.writes not in shown else None
        after = (places[site] + 0.5 for site in node.reads if site in places)
        place = places[result.site] if result is not None else max(after, default=place)
        shown |= {entry.site for entry in (weight, result) if entry is not None}
        yield (
            place,
            LayerRow(
                anchor="",
                name=node.module or node.name,
                module=node.module,
                op=node.layer.removeprefix(f"{node.module}.") or node.kernel,
                kernel=node.kernel,
                integer=node.integer,
                node=node.name,
                why=reasons.get(node.name, ""),
                macs=node.macs,
                bytes=node.bytes or None,
                time=times.get(node.name),
                weight=weight,
                result=result,
                parity=parity.get(node.writes or ""),
            ),
        )
    for entry in report.layers or ():
        if entry.site not in shown:
            yield places.get(entry.site, math.inf), _of_site(entry, parity.get(entry.site))


def _of_site(entry: LayerEntry, found: NodeParity | None) -> LayerRow:
    """Return the row of a site that no computing node writes, or of a weight that none reads."""
    is_weight = entry.kind == "weight"
    return LayerRow(
        anchor="",
        name=entry.site,
        module=entry.module,
        op=entry.op,
        kernel=found.kernel if found is not None else "",
        integer=found is None or found.is_integer,
        why=found.reason if found is not None else "",
        weight=entry if is_weight else None,
        result=None if is_weight else entry,
        parity=found,
    )


def noisiest(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """Return the rows that add most noise, or that hold most where that was not measured; none of few rows."""
    for noise in map(attrgetter, ("added_db", "total_db")):
        found = [row for row in rows if noise(row) is not None and noise(row) < math.inf]
        if len(found) > NOISIEST:
            return sorted(found, key=noise)[:NOISIEST]
    return []


_NAME = re.compile(r"[\w.\[\]]*\w")


def linker(rows: Sequence[LayerRow]) -> Callable[[object], Markup]:
    """Return a function that escapes a text, with links to the rows of the layers, nodes and sites that it names.

    The name of a module leads to the first layer inside. A name of one plain word is linked only where it is the whole
    text.
    """
    anchors: dict[str, str] = {}
    for row in rows:
        sites = [entry.site for entry in (row.weight, row.result) if entry is not None]
        for name in (*sites, row.name, row.node, row.module):
            anchors.setdefault(name, row.anchor)
    for row in rows:
        for above in accumulate(row.module.split("."), "{}.{}".format):
            anchors.setdefault(above, row.anchor)
    anchors.pop("", None)

    def link(name: str) -> Markup:
        return Markup('<a href="#{}">{}</a>').format(anchors[name], name)

    def linked(text: object) -> Markup:
        text = str(text)
        if text in anchors:
            return link(text)
        found, end = Markup(), 0
        for match in _NAME.finditer(text):
            if match[0] in anchors and re.search(r"[\d._]", match[0]):
                found += escape(text[end : match.start()]) + link(match[0])
                end = match.end()
        return found + escape(text[end:])

    return linked
