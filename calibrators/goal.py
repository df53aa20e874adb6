"""What is good enough: limits on figures of held-out data, which gates and the ladder of methods share.

Must not know: how figures are measured, gates, methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["DEFAULT_GOAL", "FIGURES", "ROOM", "Goal", "reaches", "with_room"]

Goal = Mapping[str, float]
"""Limits by the name of the figure:

accuracy_drop:    share of right decisions lost against the float network, at most; needs labels.
agreement:        share of the samples for which both networks decide alike, at least; of the first output.
sqnr_db:          signal over noise of the first output in dB, at least.
lowest_agreement: the lowest agreement of the outputs without labels that decide: logits and integers.
lowest_sqnr_db:   the lowest sqnr_db of all other outputs.
"""

FIGURES: Final = ("accuracy_drop", "agreement", "sqnr_db", "lowest_agreement", "lowest_sqnr_db")

DEFAULT_GOAL: Final[Goal] = MappingProxyType({"accuracy_drop": 0.01, "lowest_agreement": 0.95, "lowest_sqnr_db": 15.0})
"""One point, 95 %, and noise of 3 % of the energy (docs/gates.md says why)."""


ROOM: Final = 0.5
"""Share of what a limit allows that has to be left on calibration samples: these are often those of training, on which
networks are surer. MobileNetV2 of the results disagrees with its float network in 3.5 % of held-out training images and
in 7 % of the test images (W4A4, gptq)."""


def with_room(name: str, limit: float, room: float = ROOM) -> float:
    """Return the limit of a figure with a share of what it allows left: for 95 % and half, 97.5 %; for dB, 3 more."""
    if name == "accuracy_drop":
        return limit * (1 - room)
    return limit - 10 * math.log10(1 - room) if name.endswith("sqnr_db") else 1 - (1 - limit) * (1 - room)


def reaches(name: str, value: float, limit: float) -> bool:
    """Return whether a figure keeps its limit; a value that is not a number never does."""
    return value <= limit if name == "accuracy_drop" else value >= limit
