"""The difference of two exports as people read it: a sentence, and tables of text for the terminal and the pages.

Must not know: terminals, HTML, Markdown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from exporter.reporting.difference import Difference, Figure, GateChange, LayerChange, Unit, ValueChange
from exporter.reporting.number_format import count, decibel, points, significant
from exporter.reporting.quantities import Quantity, written

__all__ = ["Section", "sections", "summary"]

LISTED = 20
"""Rows of a table; the JSON has all."""
SURE = 0.05
"""Probability below which a difference is called one."""

NONE = "–"


@dataclass(frozen=True)
class Section:
    """A table: its title, the titles of its columns, its rows, and how many rows were left out."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    more: int = 0


def summary(found: Difference) -> list[str]:
    """Return the sentences that answer whether the later export is better or worse, the verdicts first."""
    sentences = [f"The verdict was {found.verdicts[0].upper()} and is {found.verdicts[1].upper()}."]
    if found.identical:
        sentences.append("Both model files hold the same bytes.")
    if found.drop is not None:
        drop = found.drop
        low, high = points(-drop.drop.high), points(-drop.drop.low)
        interval = f"95 % interval {low.removesuffix(' points')} to {high}, p = {significant(drop.p_value, 2)}"
        judged = "changed" if drop.p_value < SURE else "did not change by more than chance"
        sentences.append(
            f"Accuracy {judged}: {points(-drop.drop.value)} ({interval}); of {count(drop.samples)} samples "
            f"{count(drop.lost)} were lost and {count(drop.gained)} gained."
        )
    if found.error is not None:
        low, high = significant(found.error.low, 3), significant(found.error.high, 3)
        times = significant(found.error.value, 3)
        change = "what it was" if times == "1" else f"{times} times the earlier one"
        sentences.append(f"The error against the float model is {change} (95 % interval of the ratio {low} to {high}).")
    return [*sentences, *found.notes]


def sections(found: Difference) -> list[Section]:
    """Return the tables that have rows."""
    layers = sorted(found.layers, key=_importance)
    placed = [*((name, "not in float", "in float") for name in found.now_float),
              *((name, "in float", "not in float") for name in found.now_integer)]  # fmt: skip
    return [
        section
        for section in (
            _section("Figures", ("", "before", "after", "change"), map(_figure, found.figures)),
            _section("Gates", ("gate", "before", "after"), map(_gate, found.gates)),
            _section("Nodes", ("node", "before", "after"), placed),
            _section("Layers", ("site", "kind", "bits", "scale", "SQNR before", "SQNR after"), map(_layer, layers)),
            _section("Settings", ("setting", "before", "after"), _values(found.settings)),
            _section("Origins", ("", "before", "after"), _values(found.origins)),
        )
        if section.rows
    ]


def _section(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Section:
    every = tuple(rows)
    return Section(title, columns, every[:LISTED], max(len(every) - LISTED, 0))


def _importance(layer: LayerChange) -> tuple[bool, float]:
    """Order layers: other bits first, then by the decibels that were lost."""
    return layer.bits[0] == layer.bits[1], -layer.noise_added_db


_QUANTITIES: dict[Unit, Quantity] = {"bytes": "bytes", "share": "share", "dB": "dB", "ms": "ms"}
"""Units of figures that have a quantity of their own; the others are numbers."""


def _figure(figure: Figure) -> tuple[str, ...]:
    before, after = (_written(value, figure.unit) for value in (figure.before, figure.after))
    return figure.name, before, after, _change(figure)


def _written(value: float | None, unit: Unit) -> str:
    if value is None:
        return NONE
    return count(value) if unit == "count" else written(value, _QUANTITIES.get(unit, "number"))


def _change(figure: Figure) -> str:
    if figure.before is None or figure.after is None:
        return NONE
    if figure.before == figure.after:
        return "same"
    difference = figure.after - figure.before
    if figure.unit == "share":
        return points(difference)
    if figure.unit == "dB":
        return f"{significant(difference, 2)} dB"
    return NONE if figure.ratio is None else _times(figure.ratio)


def _times(ratio: float) -> str:
    text = significant(ratio, 3)
    return "same" if text == "1" else f"x {text}"


def _layer(layer: LayerChange) -> tuple[str, ...]:
    before, after = ("float" if bits is None else str(bits) for bits in layer.bits)
    bits = before if before == after else f"{before} to {after}"
    scale = NONE if layer.scale is None else _times(layer.scale)
    return layer.site, layer.kind, bits, scale, *map(decibel, layer.sqnr_db)


def _gate(gate: GateChange) -> tuple[str, ...]:
    return gate.expression, _outcome(gate.before), _outcome(gate.after)


def _outcome(passed: bool | None) -> str:
    return NONE if passed is None else ("passed" if passed else "failed")


def _values(changes: Sequence[ValueChange]) -> Iterator[tuple[str, ...]]:
    for each in changes:
        texts = (value if isinstance(value, str) else json.dumps(value) for value in (each.before, each.after))
        yield each.name, *texts
