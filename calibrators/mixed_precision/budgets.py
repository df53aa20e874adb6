"""Limits on what a network costs: its bytes, its bits, its operations or its accuracy, parsed from text.

Must not know: graphs, torch, how bits are allocated.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from calibrators.errors import InputError, UnknownNameError

__all__ = ["ACCURACY", "QUANTITIES", "SIZES", "Budget", "Budgets"]

ACCURACY = "accuracy_drop"
SIZES = {
    "weight_bytes": "bytes that the weights take in the file, as weight_storage stores them",
    "avg_weight_bits": "mean bits of a weight",
    "bops": "bit operations of one sample: multiply-accumulates x bits of the weight x bits of the activation",
}
QUANTITIES = {
    **SIZES,
    ACCURACY: "loss of top-1 on the calibration samples; without labels, the share of predictions that change",
}

LIMIT = re.compile(r"(?P<quantity>\w+)\s*<=\s*(?P<number>[\d.]+(?:e[+-]?\d+)?)\s*(?P<unit>[kMGT%]?)", re.ASCII)
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "%": 0.01}


@dataclass(frozen=True)
class Budget:
    """An upper limit on one of QUANTITIES."""

    quantity: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Return the budget of a text such as `weight_bytes<=0.6M`; units are k, M, G, T (powers of 1000) and %.

        raises: InputError for text of another form or a limit that is not positive, UnknownNameError.
        """
        found = LIMIT.fullmatch(text.strip())
        if found is None:
            raise InputError(f"budget {text!r} cannot be parsed; write for example 'weight_bytes<=0.6M'.")
        if found["quantity"] not in QUANTITIES:
            raise UnknownNameError("quantity of a budget", found["quantity"], QUANTITIES)
        try:
            limit = float(found["number"]) * UNITS[found["unit"]]
        except ValueError:
            limit = math.nan
        if not 0 < limit < math.inf:
            raise InputError(
                f"the limit of budget {text!r} is not above 0; write for example '{found['quantity']}<=1'."
            )
        return cls(found["quantity"], limit)

    def __str__(self) -> str:
        return f"{self.quantity}<={self.limit:.10g}"


def _listed(given: object) -> object:
    return [given] if isinstance(given, str) else given


def _parsed(given: object) -> object:
    return Budget.parse(given) if isinstance(given, str) else given


def _distinct(budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
    quantities = [budget.quantity for budget in budgets]
    for quantity in quantities:
        if quantities.count(quantity) > 1:
            raise InputError(f"two budgets limit {quantity}; leave one out.")
    return budgets


Budgets = Annotated[
    tuple[Annotated[Budget, BeforeValidator(_parsed), PlainSerializer(str)], ...],
    BeforeValidator(_listed),
    AfterValidator(_distinct),
]
"""Budgets from one or more texts; raises InputError if two limit the same quantity."""
