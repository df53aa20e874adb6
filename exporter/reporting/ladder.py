"""The ladder of `--method auto` in words: what each rung cost and gave, and why the last one was the last.

Must not know: pages, how anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from calibrators.ladder_record import HeldOutFigure, Ladder, Rung
from exporter.reporting.metrics import quantity_of
from exporter.reporting.number_format import count, duration, significant
from exporter.reporting.quantities import written

__all__ = ["figure_text", "outcome", "rung_rows", "why_it_stopped"]

LOSSES: Final = {"kl": "divergence", "mse": "relative error", "share": "differing share"}


def rung_rows(ladder: Ladder) -> Iterator[tuple[str, str]]:
    """Yield for every rung its name and what it cost and gave, and last what was chosen and why."""
    for rung in ladder.rungs:
        loss = f"{LOSSES[ladder.loss]} {significant(rung.loss, 3)}"
        yield rung.name, ", ".join((duration(rung.seconds), *map(figure_text, rung.figures), loss))
    yield "exported", f"{ladder.chosen} ({why_it_stopped(ladder)})"


def figure_text(figure: HeldOutFigure) -> str:
    """Write a figure with its interval: lowest_agreement 96.1 % (93 to 97.9)."""
    quantity = quantity_of(figure.metric)
    low, value, high = (written(float(f"{x:.3g}"), quantity) for x in (figure.low, figure.value, figure.high))
    return f"{figure.metric} {value} ({low.split()[0]} to {high.split()[0]})"


def outcome(rung: Rung) -> str:
    """Return whether a rung is good enough."""
    if rung.reached is not None:
        return "good enough" if rung.reached else "not good enough"
    return "" if rung.change is None else "gains" if rung.change[2] < 1 else "gains no more than noise"


def why_it_stopped(ladder: Ladder) -> str:
    """Return why no further rung was tried, and on how many samples that rests."""
    limits = [each for each in ladder.rungs[-1].figures if each.limit is not None]
    goal = " and ".join(f"{each.metric} {written(each.limit, quantity_of(each.metric))}" for each in limits)
    reasons = {
        "goal": f"reaches {goal}",
        "gain": "the next rung gains no more than noise",
        "end": f"the best of all, though none reaches {goal}" if goal else "the best of all",
    }
    total = count(ladder.held_out + ladder.calibrated)
    return (
        f"{reasons[ladder.stopped]} on the {count(ladder.held_out)} of {total} calibration samples that were held out"
    )
