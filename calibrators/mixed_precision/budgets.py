"""What a network may cost: limits on its bytes, its bits, its operations or its accuracy, read from text.

Must not know: graphs, torch, how bits are allocated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from calibrators.errors import InputError, UnknownNameError

__all__ = ["ACCURACY", "QUANTITIES", "SIZES", "Budget", "parse_budgets"]

ACCURACY = "accuracy_drop"
SIZES = {
    "weight_bytes": "bytes that the weights take in the file, as weight_storage stores them",
    "avg_weight_bits": "mean bits of a weight",
    "bops": "bit operations of one sample: multiply-accumulates x bits of the weight x bits of the activation",
}
QUANTITIES = {
    **SIZES,
    ACCURACY: "loss of top-1 on the calibration samples; without labels the share of predictions that change",
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
        """The budget that `weight_bytes<=0.6M` gives; units are k, M, G, T (powers of 1000) and %.

        raises: InputError for text of another form or a limit that is not positive, UnknownNameError for a quantity.
        """
        found = LIMIT.fullmatch(text.strip())
        if found is None:
            raise InputError(f"budget {text!r} cannot be read; write for example 'weight_bytes<=0.6M'.")
        if found["quantity"] not in QUANTITIES:
            raise UnknownNameError("quantity of a budget", found["quantity"], QUANTITIES)
        try:
            limit = float(found["number"]) * UNITS[found["unit"]]
        except ValueError:
            limit = math.nan
        if not 0 < limit < math.inf:
            raise InputError(f"budget {text!r} has no limit above 0; write for example '{found['quantity']}<=1'.")
        return cls(found["quantity"], limit)

    def __str__(self) -> str:
        return f"{self.quantity}<={self.limit:.10g}"


def parse_budgets(texts: Iterable[str]) -> tuple[Budget, ...]:
    """The budgets of several texts, of which no two limit the same quantity.

    raises: InputError.
    """
    budgets = tuple(map(Budget.parse, texts))
    for index, budget in enumerate(budgets):
        if budget.quantity in (other.quantity for other in budgets[:index]):
            raise InputError(f"{budget.quantity} has two budgets; leave one out.")
    return budgets
