"""Costs of operators on a runtime: nanoseconds from the shapes of a call.

Must not know: graphs, which operators there are, how costs were measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Cost", "Costs", "Work", "kind_of_convolution"]

LANES = 16
"""Channels that the kernels compute together: they round channels up to a multiple of it."""


@dataclass(frozen=True)
class Work:
    """The work of one call.

    elements: values of the output; for operators without weights, of the larger of output and input.
    macs:     multiply-accumulates, with the output channels of each group rounded up to LANES.
    gathered: input values that are laid out as the columns of a product.
    runs:     runs of neighbouring ones: one per place of the output, tap of the kernel, and group.
    """

    elements: float
    macs: float = 0.0
    gathered: float = 0.0
    runs: float = 0.0

    @classmethod
    def of_product(cls, output: Sequence[float], weight: Sequence[int], groups: int) -> Work:
        """Return the work of a convolution or linear layer from its output [1, channels, ...] and its weight."""
        places, columns = math.prod(output[2:]), math.prod(weight[1:])
        if groups > 1 and weight[1] == 1:
            return cls(math.prod(output), places * weight[0] * columns)
        rounded = groups * LANES * math.ceil(weight[0] / groups / LANES)
        runs = places * groups * math.prod(weight[2:])
        return cls(math.prod(output), places * rounded * columns, places * groups * columns, runs)


@dataclass(frozen=True)
class Cost:
    """Nanoseconds of a call: of the node, and for each unit of its Work."""

    node: float = 0.0
    element: float = 0.0
    mac: float = 0.0
    gathered: float = 0.0
    run: float = 0.0

    def of(self, work: Work) -> float:
        """Return the nanoseconds of a call."""
        products = self.element * work.elements + self.mac * work.macs
        return self.node + products + self.gathered * work.gathered + self.run * work.runs


@dataclass(frozen=True)
class Costs:
    """The cost of an operator in float, and of its integer kernel."""

    float: Cost = Cost()
    integer: Cost = Cost()


def kind_of_convolution(weight: Sequence[int], groups: int) -> str:
    """Return the row of a convolution; each has kernels of its own.

    Depthwise integer kernels are slow unless the channels are a multiple of LANES.
    """
    if groups > 1 and weight[1] == 1:
        return "depthwise" if groups % LANES == 0 else "uneven depthwise"
    if groups > 1:
        return "grouped"
    return "pointwise" if math.prod(weight[2:]) == 1 else "dense"
