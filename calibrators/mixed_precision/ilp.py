"""Choose bits for every scale so that the network loses least within its budgets: an integer program.

    minimize    sum of loss[s, b] x[s, b]
    subject to  sum over b of x[s, b] = 1 for every scale s, x in {0, 1}
                cost of every limited quantity <= its limit

Bit operations are the bits of a weight times those of the activation that it multiplies. For a layer where both are
open, variables y[b, c] for pairs of widths, whose sums over one side are the x of the other, keep that linear.

Must not know: graphs, tensors, how losses are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

__all__ = ["Costs", "Layer", "Losses", "Stored", "Widths", "allocate", "monotone"]

Widths = Mapping[str, int]
"""Bits of scales, by the name of the site."""

Losses = Mapping[str, Mapping[int, float]]
"""Loss by scale and bits, for scales whose bits are open and the bits that they may have."""

Stored = Callable[[int, int, int], int]
"""A function that returns the bytes of a weight in the file from its number of values, its bits and its wide taps."""

NODES = 100_000
"""Nodes after which the search ends; a count and not a time, so that a slow machine finds the same."""


@dataclass(frozen=True)
class Layer:
    """A weighted operator: multiply-accumulates for one sample, and the scales of its weight and its input."""

    name: str
    macs: int
    weight: str
    activation: str


@dataclass(frozen=True, eq=False)
class Costs:
    """The costs of widths.

    sizes:  number of values of every weight, by site; taps: number of wide taps among them, and their bits.
    widths: bits of every weight and activation scale whose bits are not open.
    stored: the bytes of a weight in the file.
    """

    layers: Sequence[Layer]
    sizes: Mapping[str, int]
    taps: Mapping[str, tuple[int, int]]
    widths: Widths
    stored: Stored

    def of(self, quantity: str, widths: Widths) -> float:
        """Return a quantity of budgets.SIZES at these widths."""
        bits = {**self.widths, **widths}
        if quantity == "bops":
            return float(sum(layer.macs * bits[layer.weight] * bits[layer.activation] for layer in self.layers))
        return sum(self.of_weight(quantity, name, bits[name]) for name in self.sizes) / self.unit(quantity)

    def of_weight(self, quantity: str, name: str, bits: int) -> int:
        """Return what one weight contributes to weight_bytes or avg_weight_bits, before division by the unit."""
        size, (taps, wide) = self.sizes[name], self.taps.get(name, (0, 0))
        if quantity == "weight_bytes":
            return self.stored(size, bits, taps if bits < wide else 0)
        return size * bits + taps * max(wide - bits, 0)

    def unit(self, quantity: str) -> int:
        """Return the divisor of a quantity: the number of values of all weights for an average, else 1."""
        return self._values if quantity == "avg_weight_bits" else 1

    @cached_property
    def _values(self) -> int:
        return sum(self.sizes.values())


def allocate(losses: Losses, costs: Costs, limits: Mapping[str, float]) -> Widths | None:
    """Return the bits of every open scale with the least sum of losses under all limits, or None.

    The finest grids are taken that cost no loss: a preference is smaller than what the solver tells apart.
    """
    widths = _IntegerProgram(losses, costs).solve(limits)
    if widths is None:
        return None
    for name, options in losses.items():
        for bits in sorted(options, reverse=True):
            finer = {**widths, name: bits}
            if bits <= widths[name]:
                break
            if options[bits] <= options[widths[name]] and _keeps(costs, finer, limits):
                widths = finer
                break
    return widths


def _keeps(costs: Costs, widths: Widths, limits: Mapping[str, float]) -> bool:
    return all(costs.of(quantity, widths) <= limit for quantity, limit in limits.items())


@dataclass
class _IntegerProgram:
    """The program in matrix form. Variables: one per open scale and width, then those of pairs of widths."""

    losses: Losses
    costs: Costs
    index: dict[tuple[str, ...], int] = field(default_factory=dict)
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, options in self.losses.items():
            variables = [self._variable(name, str(bits)) for bits in options]
            self.rows.append((dict.fromkeys(variables, 1.0), 1.0, 1.0))
        self.binary = len(self.index)

    def _variable(self, *key: str) -> int:
        return self.index.setdefault(key, len(self.index))

    def solve(self, limits: Mapping[str, float]) -> Widths | None:
        for quantity, limit in limits.items():
            coefficients, fixed = self._bops() if quantity == "bops" else self._of_weights(quantity)
            self.rows.append((coefficients, -np.inf, limit - fixed))
        objective = np.zeros(len(self.index))
        worst = max((max(options.values()) for options in self.losses.values()), default=0.0) or 1.0
        for name, options in self.losses.items():
            for bits, loss in options.items():
                objective[self.index[name, str(bits)]] = loss / worst
        from scipy.optimize import Bounds, LinearConstraint, milp  # imported only where a budget is given
        from scipy.sparse import csr_array

        lines = [(row, column, value) for row, (line, *_) in enumerate(self.rows) for column, value in line.items()]
        rows, columns, values = zip(*lines, strict=True)
        places = np.array([rows, columns], np.int32)  # scipy 1.14 converts no others for its solver
        matrix = csr_array((values, (*places,)), shape=(len(self.rows), len(self.index)))
        bounds = ([lo for _, lo, _ in self.rows], [hi for *_, hi in self.rows])
        solution = milp(
            objective,
            integrality=(np.arange(len(objective)) < self.binary).astype(np.int64),
            bounds=Bounds(0.0, 1.0),
            constraints=LinearConstraint(matrix, *bounds),
            options={"mip_rel_gap": 1e-6, "node_limit": NODES},
        )
        if solution.x is None:
            return None
        return {n: next(b for b in o if solution.x[self.index[n, str(b)]] > 0.5) for n, o in self.losses.items()}

    def _of_weights(self, quantity: str) -> tuple[dict[int, float], float]:
        """Return the coefficients of a sum over weights, and the contribution of weights whose bits are not open."""
        costs, coefficients, unit = self.costs, {}, self.costs.unit(quantity)
        for name, options in self.losses.items():
            if name in costs.sizes:
                for bits in options:
                    coefficients[self.index[name, str(bits)]] = costs.of_weight(quantity, name, bits) / unit
        given = costs.sizes.keys() - self.losses.keys()
        return coefficients, sum(costs.of_weight(quantity, name, costs.widths[name]) for name in given) / unit

    def _bops(self) -> tuple[dict[int, float], float]:
        coefficients: dict[int, float] = {}
        fixed = 0.0
        for layer in self.costs.layers:
            open_scales = [name for name in (layer.weight, layer.activation) if name in self.losses]
            if len(open_scales) == 2:
                coefficients |= self._pairs(layer)
                continue
            widths = [self.costs.widths[name] for name in (layer.weight, layer.activation) if name not in self.losses]
            work = float(layer.macs * np.prod(widths))
            fixed += 0.0 if open_scales else work
            for scale in open_scales:
                for bits in self.losses[scale]:
                    variable = self.index[scale, str(bits)]
                    coefficients[variable] = coefficients.get(variable, 0.0) + work * bits
        return coefficients, fixed

    def _pairs(self, layer: Layer) -> dict[int, float]:
        """Return the bit operations of a layer's pairs of widths; the variables are linked to those of both scales."""
        sides = [(name, self.losses[name]) for name in (layer.weight, layer.activation)]
        pairs = {(b, c): self._variable(layer.name, str(b), str(c)) for b in sides[0][1] for c in sides[1][1]}
        for side, (name, options) in enumerate(sides):
            for bits in options:
                shares = {variable: 1.0 for pair, variable in pairs.items() if pair[side] == bits}
                self.rows.append((shares | {self.index[name, str(bits)]: -1.0}, 0.0, 0.0))
        return {variable: float(layer.macs * b * c) for (b, c), variable in pairs.items()}


def monotone(losses: Mapping[int, float]) -> dict[int, float]:
    """Return losses by bits without the noise of measurement: none is below 0, and none rises with the bits."""
    result: dict[int, float] = {}
    floor = 0.0
    for bits in sorted(losses, reverse=True):
        floor = max(floor, losses[bits])
        result[bits] = floor
    return dict(sorted(result.items()))
