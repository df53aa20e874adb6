"""Goals: limits on figures of held-out data, which gates and the ladder of methods share.

Must not know: how figures are measured, gates, methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["DEFAULT_GOAL", "DROP", "DROPS", "FIGURES", "ROOM", "Goal", "agreement_for", "reaches", "with_room"]

Goal = Mapping[str, float]
"""Least values of figures, by their names:

agreement:        share of the samples for which both networks decide alike; of the first output.
sqnr_db:          signal over noise of the first output in dB.
lowest_agreement: the lowest agreement of the outputs that decide: logits and integers.
lowest_sqnr_db:   the lowest sqnr_db of all other outputs.
"""

FIGURES: Final = ("agreement", "sqnr_db", "lowest_agreement", "lowest_sqnr_db")
DROPS: Final = ("accuracy_drop", "accuracy_drop_lower", "accuracy_drop_upper", "reference_drop")
"""Figures that need labels, with greatest values in place of least ones."""

DEFAULT_GOAL: Final[Goal] = MappingProxyType({"lowest_agreement": 0.95, "lowest_sqnr_db": 15.0})
DROP: Final = 0.01
"""With labels one point; without, 95 % of the decisions, and noise of 3 % of the energy (docs/gates.md says why)."""

ROOM: Final = 0.5
"""Share of what a limit allows that has to be left on calibration samples: these are often those of training, on which
networks are surer. MobileNetV2 of the results disagrees with its float network in 3.5 % of held-out training images and
in 7 % of the test images (W4A4, gptq)."""


def agreement_for(drop: float) -> float:
    """Return the agreement that stands in for a limit on the drop, in the proportion of the defaults, from 0 to 1.

    Where accuracy has to rise, that is full agreement: calibration cannot aim at more.
    """
    return min(max(1 - drop / DROP * (1 - DEFAULT_GOAL["lowest_agreement"]), 0.0), 1.0)


def with_room(name: str, limit: float, room: float = ROOM) -> float:
    """Return the limit of a figure with a share of what it allows left: for 95 % and half, 97.5 %; for dB, 3 more."""
    if name in DROPS:
        return limit * (1 - room)
    return limit - 10 * math.log10(1 - room) if name.endswith("sqnr_db") else 1 - (1 - limit) * (1 - room)


def reaches(name: str, value: float, limit: float) -> bool:
    """Return whether a figure keeps its limit; a value that is not a number never does."""
    return value <= limit if name in DROPS else value >= limit
